"""Queries into latent space and results out of it: the products around an absorbed core.

Letters: T tokens, n branches, h heads of the core, l latent dim, d_h and d_v dims of a head's key
(without RoPE) and value.
"""

import torch
from torch import Tensor


def absorb_queries(q_nope: Tensor, w_uk: Tensor, branches: int) -> Tensor:
    """q_nope `[T, h, d_h]`, w_uk `[h, d_h, n l]` -> queries of every branch `[T, n, h, l]`."""
    head = torch.bmm(q_nope.transpose(0, 1), w_uk)
    return head.unflatten(2, (branches, -1)).permute(1, 2, 0, 3)


def sum_branches(z: Tensor, w_uv: Tensor, out: Tensor | None = None) -> Tensor:
    """z `[T, n, h, l]`, w_uv `[h, n l, d_v]` -> `[T, h, d_v]`: one product sums branches too.

    Written into `out` where it is given, without a copy.
    """
    own = None if out is None else out.transpose(0, 1)
    return torch.bmm(z.permute(2, 0, 1, 3).flatten(2), w_uv, out=own).transpose(0, 1)
