"""Pure torch reference of the absorbed core, fp32 inside; differentiable, any device.

Letters: s queries and t keys per sequence, b sequences, P (branch, head) pairs, G key heads.
"""

import torch
from torch import Tensor

from mlra_kernels.latent_attention.spans import key_ranges


def latent_attention_reference(
    query: Tensor,
    key: Tensor,
    latent_dim: int,
    scale: float,
    ranges: Tensor | None = None,
    *,
    causal: bool = True,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention whose values are the first `latent_dim` columns of its keys.

    Arguments as in `ops.latent_attention_with_lse`. All scores of all heads are in memory at once.

    Returns:
        out `[s, b, P, latent_dim]` in query's dtype and the natural log-sum-exp `[b, P, s]` fp32.
    """
    if tiles is not None:  # sorted tiles are spans
        ranges = key_ranges([tuple(x) for x in sorted(tiles.tolist())]).to(tiles.device)
    s, t = len(query), len(key)
    wide = key.float().repeat_interleave(query.shape[2] // key.shape[2], 2)
    scores = torch.einsum("sbpe,tbpe->bpst", query.float(), wide) * scale
    if ranges is not None or causal:
        place = torch.arange(t, device=query.device)
        if ranges is None:
            first, last = torch.zeros_like(place[:s]), torch.arange(t - s, t, device=query.device)
        else:
            first, last = ranges
        unread = (place < first[:, None]) | (place > last[:, None])
        scores = scores.masked_fill(unread, -torch.inf)
    out = torch.einsum("bpst,tbpl->sbpl", scores.softmax(-1), wide[..., :latent_dim])
    return out.to(query.dtype), scores.logsumexp(-1)
