"""Products of a layer with what is fused to them, in plain torch. A backend overrides what it has a
kernel for. Letters as in base.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from mlra_kernels import absorption


@dataclass(frozen=True)
class Unnormed:
    """A norm's input, for a backend whose products norm their inputs."""

    x: Tensor
    """`[T, d]`."""
    weight: Tensor
    """`[d]`."""
    eps: float


Normed = Tensor | Unnormed
"""The output of a norm `[T, d]`, or what it is computed from."""


class TorchProducts:
    """torch's products, and the backend's own elementwise operations, one after the other."""

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Normed:
        """The norm of x `[T, d]`."""
        return self.rms_norm(x, weight, eps)

    def plain(self, x: Normed) -> Tensor:
        """`[T, d]`."""
        return x if isinstance(x, Tensor) else self.rms_norm(x.x, x.weight, x.eps)

    def linear(self, x: Normed, weight: Tensor) -> Tensor:
        """x `[T, d]` times weight `[R, d]`, transposed: `[T, R]`."""
        return linear(self.plain(x), weight)

    def linear_add_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Normed]:
        """The sum of a product and the residual `[T, d]`, and the norm of the sum."""
        return self.add_rms_norm(linear(x, weight), residual, norm, eps)

    def swiglu(self, x: Normed, fc1: Tensor) -> Tensor:
        """x `[T, d]`, fc1 `[2 f, d]` -> silu(gate) * up `[T, f]`."""
        return self.silu_mul(linear(self.plain(x), fc1))

    def gated(self, out: Tensor, x: Normed, gate: Tensor) -> Tensor:
        """out `[T, f]` times the sigmoid of x times gate `[f, d]`, transposed."""
        gates = linear(self.plain(x), gate).float()
        return out * torch.sigmoid(gates).to(out.dtype)

    def rotated_queries(
        self, x: Normed, weight: Tensor, head: int, start: int, tables, positions: Tensor
    ) -> Tensor:
        """Queries `[T, H, head]` of x `[T, d_q]`, with dims `start:` of every head rotated."""
        q = linear(self.plain(x), weight).unflatten(1, (-1, head))
        return self.rotate(q, start, *tables, positions)

    def absorb_queries(self, q_nope: Tensor, w_uk: Tensor, branches: int) -> Tensor:
        """`mlra_kernels.absorption.absorb_queries`."""
        return absorption.absorb_queries(q_nope, w_uk, branches)

    def sum_branches(self, z: Tensor, w_uv: Tensor) -> Tensor:
        """`mlra_kernels.absorption.sum_branches`."""
        return absorption.sum_branches(z, w_uv)
