"""The products around an absorbed core: queries into latent space, and results out of it.

Letters: T tokens, n branches, h heads of the core, l latent dim, d_h and d_v sizes of a head's key
(without RoPE) and value.
"""

import torch
from torch import Tensor


def absorb_queries(q_nope: Tensor, w_uk: Tensor, branches: int) -> Tensor:
    """Queries of every branch `[T, n, h, l]` from q_nope `[T, h, d_h]` and w_uk `[h, d_h, n l]`."""
    head = torch.bmm(q_nope.transpose(0, 1), w_uk)
    return head.unflatten(2, (branches, -1)).permute(1, 2, 0, 3)


def sum_branches(z: Tensor, w_uv: Tensor, out: Tensor | None = None) -> Tensor:
    """The sum over branches of z times w_uv, in one matrix product.

    Args:
        z: `[T, n, h, l]`.
        w_uv: `[h, n l, d_v]`.
        out: `[T, h, d_v]`, written without a copy if given.

    Returns:
        `[T, h, d_v]`.
    """
    own = None if out is None else out.transpose(0, 1)
    return torch.bmm(z.permute(2, 0, 1, 3).flatten(2), w_uv, out=own).transpose(0, 1)
