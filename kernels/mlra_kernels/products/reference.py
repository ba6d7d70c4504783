"""The products in plain torch, the definition: float32 sums, rounded as separate operations are."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def product_reference(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: Tensor | None = None,
) -> Tensor:
    """`[T, R]`; arguments as in `ops.product`."""
    y = _product(x, weight, norm, eps)
    if residual is not None:
        return (y.float() + residual.float()).to(x.dtype)
    if gated is not None:
        gates = torch.sigmoid(y.float()).to(x.dtype)
        return (gated.float() * gates.float()).to(x.dtype)
    return y


def swiglu_product_reference(
    x: Tensor, weight: Tensor, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """`[T, R / 2]`; arguments as in `ops.swiglu_product`."""
    gate, up = _product(x, weight, norm, eps).float().chunk(2, -1)
    return (silu(gate) * up).to(x.dtype)


def rotated_product_reference(
    x: Tensor,
    weight: Tensor,
    head: int,
    start: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`[T, H, e]`; arguments as in `ops.rotated_product`."""
    q = _product(x, weight, norm, eps).float().unflatten(1, (-1, head))
    known = ((positions >= 0) & (positions < len(cos)))[:, None, None]
    at = positions.clamp(0, len(cos) - 1).long()
    cos, sin = (torch.where(known, table[at][:, None], torch.nan) for table in (cos, sin))
    first, second = q[..., start:].chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((q[..., :start], *turned), -1).to(x.dtype)


def absorb_queries_reference(q_nope: Tensor, w_uk: Tensor, branches: int) -> Tensor:
    """`[T, n, h, l]`; arguments as in `ops.absorb_queries`."""
    head = torch.einsum("thd,hdj->thj", q_nope.float(), w_uk.float())
    return head.unflatten(2, (branches, -1)).transpose(1, 2).to(q_nope.dtype)


def sum_branches_reference(z: Tensor, w_uv: Tensor) -> Tensor:
    """`[T, h, d_v]`; arguments as in `ops.sum_branches`."""
    joined = z.float().transpose(1, 2).flatten(2)
    return torch.einsum("thk,hkj->thj", joined, w_uv.float()).to(z.dtype)


def _product(x: Tensor, weight: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    if norm is not None:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        x = (wide * scale * norm.float()).to(x.dtype)
    return (x.float() @ weight.float().T).to(x.dtype)
