"""Plain torch references of the operations around the core: fp32, differentiable, any device.

Letters: s tokens, b batch, n branches, h attention heads, g head groups, l latent dim, `nope`,
`rope`, v head dims. Results have the dtype of the first argument.
"""

import torch
from torch import Tensor


def rotate_absorb_reference(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Absorbed queries `[s, b, n * h, l + rope]`; arguments as in `ops.rotate_absorb`."""
    n, _, nope, _ = w_uk.shape
    wide = q.float()
    absorbed = torch.einsum("sbhd,nhdl->sbnhl", wide[..., :nope], w_uk.float())
    turned = _rotate(wide[..., nope:], cos[:, None, None], sin[:, None, None])
    turned = turned[:, :, None].expand(-1, -1, n, -1, -1)
    return torch.cat((absorbed, turned), -1).flatten(2, 3).to(q.dtype)


def join_keys_reference(latents: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Absorbed keys `[s, b, n * g, l + rope]`; arguments as in `ops.join_keys`."""
    wide = latents.float().flatten(2, 3)
    turned = _rotate(k_rope.float(), cos[:, None], sin[:, None])
    turned = turned[:, :, None].expand(-1, -1, wide.shape[2], -1)
    return torch.cat((wide, turned), -1).to(latents.dtype)


def sum_branches_reference(z: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """Values `[s, b, h, v]`; arguments as in `ops.sum_branches`."""
    return (torch.einsum("sbnhl,nhvl->sbhv", z.float(), w_uv.float()) * scale).to(z.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """RMSNorm of each part; arguments as in `ops.rms_norm`."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * (weight.float() * scale)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE of the last dim."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
