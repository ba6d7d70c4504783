"""Products of a few rows with a weight matrix, with the operations around them in the same launch.

Letters: T tokens (1 to `configs.MOST_TOKENS`), K inputs, R outputs, h heads, n branches, l latent
dim, d_h and d_v sizes of a head's key and value. Inputs lie on one GPU in one dtype (bfloat16,
float16, float32); sums are float32. Every operation raises ValueError if an argument does not fit,
in one line that names the value and the fix.

Args that the operations share:
    norm: `[K]`, any float dtype: x is normed first, x / sqrt(mean(x^2) + eps) * norm, with
        statistics in float32, and rounded to x's dtype.
    early: start before the kernel in front has ended, and read weights meanwhile (GPUs of compute
        capability 9.0 or more). Only where no kernel writes the weights any more: the rule is in
        kernel.py.
"""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from mlra_kernels import checks
from mlra_kernels.products import kernel
from mlra_kernels.products.configs import MOST_TOKENS, ProductConfig, default_config, heads_cut
from mlra_kernels.products.heads_kernel import heads_kernel

MAX_INPUTS = 2**17
"""Most columns of W."""
MAX_OUTPUTS = 2**24
"""Most rows of W."""


def product(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: Tensor | None = None,
    early: bool = False,
    config: ProductConfig | None = None,
) -> Tensor:
    """x weight^T, plus `residual`; or `gated` times the sigmoid of the product.

    Args:
        x: `[T, K]` with contiguous rows.
        weight: `[R, K]` with contiguous rows.
        residual, gated: `[T, R]` with contiguous rows; at most one of them.
        config: the cut; None: `configs.default_config`'s.

    Returns:
        `[T, R]`.
    """
    _check(x, weight, norm, eps, early, config)
    if residual is not None and gated is not None:
        raise ValueError("residual and gated are both given: give one")
    epilogue, other = kernel.PLAIN, None
    for name, given, kind in (
        ("residual", residual, kernel.ADD), ("gated", gated, kernel.GATE),
    ):  # fmt: skip
        if given is not None:
            _check_other(name, given, x, weight)
            epilogue, other = kind, given
    return _launch(x, weight, norm, eps, early, config, epilogue, other=other)


def swiglu_product(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    early: bool = False,
    config: ProductConfig | None = None,
) -> Tensor:
    """silu(first half) * second half of x weight^T.

    Args:
        x: `[T, K]` with contiguous rows.
        weight: `[2 f, K]` with contiguous rows: gates, then ups.

    Returns:
        `[T, f]`.
    """
    _check(x, weight, norm, eps, early, config)
    if weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows: give [2 f, K], gates and ups")
    return _launch(x, weight, norm, eps, early, config, kernel.SWIGLU)


def rotated_product(
    x: Tensor,
    weight: Tensor,
    *,
    head: int,
    start: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    early: bool = False,
    config: ProductConfig | None = None,
) -> Tensor:
    """x weight^T as heads, whose dims from `start` on are rotated (half-split RoPE).

    Args:
        x: `[T, K]` with contiguous rows.
        weight: `[H head, K]` with contiguous rows.
        head: dims of a head, even.
        start: the first rotated dim, even, at most head - 2.
        cos, sin: `[positions, (head - start) / 2]` float32, contiguous.
        positions: `[T]` int32 or int64, contiguous. A position outside the tables gives NaN.

    Returns:
        `[T, H, head]`.
    """
    _check(x, weight, norm, eps, early, config)
    checks.check_tensors(x=x, cos=cos, sin=sin, positions=positions)
    checks.check_integer("head", head, 2, MAX_OUTPUTS)
    checks.check_integer("start", start, 0, head - 2)
    if head % 2 or start % 2 or weight.shape[0] % head:
        raise ValueError(
            f"head is {head}, start {start}, and weight has {weight.shape[0]} rows: give whole"
            " heads, and even numbers"
        )
    checks.check_rope_tables(cos, sin, (head - start) // 2, "positions")
    checks.check_dtype("positions", positions, checks.INDEX_DTYPES)
    if positions.shape != (x.shape[0],):
        raise ValueError(f"positions is {list(positions.shape)}: give [{x.shape[0]}]")
    checks.check_contiguous(positions=positions)
    tables = cos, sin, positions
    y = _launch(x, weight, norm, eps, early, config, kernel.ROTATE, head, start, tables)
    return y.unflatten(1, (-1, head))


def absorb_queries(q_nope: Tensor, w_uk: Tensor, branches: int, *, early: bool = False) -> Tensor:
    """Queries in latent space; for more tokens: `mlra_kernels.absorption`.

    Args:
        q_nope: `[T, h, d_h]`, last dim contiguous.
        w_uk: `[h, d_h, n l]`, contiguous.
        branches: n.

    Returns:
        `[T, n, h, l]`, contiguous.
    """
    _check_heads("q_nope", q_nope, "[T, h, d_h]", "w_uk", w_uk, early)
    checks.check_integer("branches", branches, 1)
    tokens, heads, inputs = q_nope.shape
    if w_uk.shape[:2] != (heads, inputs) or w_uk.shape[2] % branches or not w_uk.shape[2]:
        raise ValueError(
            f"w_uk is {list(w_uk.shape)}: give [{heads}, {inputs}, n l] with n = {branches}"
        )
    part = w_uk.shape[2] // branches
    out = q_nope.new_empty(tokens, branches, heads, part)
    strides = (*q_nope.stride()[:2], 0, out.stride(0), out.stride(2), out.stride(1))
    return _launch_heads(q_nope, w_uk, out, strides, inputs, part, early)


def sum_branches(
    z: Tensor, w_uv: Tensor, *, early: bool = False, out: Tensor | None = None
) -> Tensor:
    """The sum over branches of z times w_uv; for more tokens: `mlra_kernels.absorption`.

    Args:
        z: `[T, n, h, l]`, last dim contiguous.
        w_uv: `[h, n l, d_v]`, contiguous.
        out: `[T, h, d_v]`, last dim contiguous, to write into; None: new memory.

    Returns:
        `[T, h, d_v]`: out, or a contiguous tensor.
    """
    _check_heads("z", z, "[T, n, h, l]", "w_uv", w_uv, early)
    tokens, branches, heads, part = z.shape
    if w_uv.shape[:2] != (heads, branches * part) or not w_uv.shape[2]:
        raise ValueError(
            f"w_uv is {list(w_uv.shape)}: give [{heads}, {branches * part}, d_v], as z is"
            f" {list(z.shape)}"
        )
    shape = (tokens, heads, w_uv.shape[2])
    if out is None:
        out = z.new_empty(shape)
    else:
        checks.check_tensors(z=z, out=out)
        if out.shape != shape or out.dtype != z.dtype or out.stride(2) != 1:
            raise ValueError(
                f"out is {list(out.shape)} {out.dtype}: give {list(shape)} {z.dtype} with a"
                " contiguous last dim"
            )
    strides = (z.stride(0), z.stride(2), z.stride(1), *out.stride()[:2], 0)
    return _launch_heads(z, w_uv, out, strides, part, w_uv.shape[2], early)


def _check(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    eps: float,
    early: bool,
    config: ProductConfig | None,
) -> None:
    """Raise ValueError unless x, weight and norm fit each other."""
    checks.check_tensors(x=x, weight=weight, **({} if norm is None else {"norm": norm}))
    checks.check_device("x", x)
    checks.check_dims("x", x, "[T, K]")
    checks.check_dims("weight", weight, "[R, K]")
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    checks.check_number("eps", eps)
    _check_tokens("x", x)
    (_, inputs), outputs = x.shape, weight.shape[0]
    if not 1 <= inputs <= MAX_INPUTS or x.stride(1) != 1:
        raise ValueError(
            f"x is {list(x.shape)} with strides {x.stride()}: give [T, K] with contiguous rows of"
            f" 1 to {MAX_INPUTS} numbers"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x {x.dtype}: cast one of them")
    if weight.shape[1] != inputs or not 1 <= outputs <= MAX_OUTPUTS or weight.stride(1) != 1:
        raise ValueError(
            f"weight is {list(weight.shape)} with strides {weight.stride()}: give [R, {inputs}]"
            f" with contiguous rows, 1 to {MAX_OUTPUTS} of them"
        )
    if norm is not None:
        checks.check_dtype("norm", norm, checks.FLOAT_DTYPES)
        if norm.shape != (inputs,):
            raise ValueError(f"norm is {list(norm.shape)}: give [{inputs}], one number a column")
        checks.check_contiguous(norm=norm)
    _check_early(early)
    if config is not None and not isinstance(config, ProductConfig):
        raise ValueError(f"config is of type {type(config).__name__}: give a ProductConfig")


def _check_tokens(name: str, x: Tensor) -> None:
    if not 1 <= x.shape[0] <= MOST_TOKENS:
        raise ValueError(
            f"{name} has {x.shape[0]} rows: give 1 to {MOST_TOKENS}, and more to torch's products"
        )


def _check_early(early: bool) -> None:
    if not isinstance(early, bool):
        raise ValueError(f"early is of type {type(early).__name__}: give True or False")


def _check_other(name: str, other: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless `other` is a row of outputs for each row of x."""
    checks.check_tensors(x=x, **{name: other})
    shape = (x.shape[0], weight.shape[0])
    if other.shape != shape or other.dtype != x.dtype or other.stride(1) != 1:
        raise ValueError(
            f"{name} is {list(other.shape)} {other.dtype}: give {list(shape)} {x.dtype} with"
            " contiguous rows"
        )


def _check_heads(
    name: str, x: Tensor, dims: str, weight_name: str, weight: Tensor, early: bool
) -> None:
    """Raise ValueError unless a product per head can run on x and weight."""
    checks.check_tensors(**{name: x, weight_name: weight})
    checks.check_device(name, x)
    checks.check_dims(name, x, dims)
    checks.check_dims(weight_name, weight, "[h, inputs, outputs]")
    checks.check_dtype(name, x, checks.FLOAT_DTYPES)
    _check_tokens(name, x)
    checks.check_sizes(**{f"{name}_dim_{i}": size for i, size in enumerate(x.shape)})
    if weight.dtype != x.dtype:
        raise ValueError(f"{weight_name} is {weight.dtype}, {name} {x.dtype}: cast one of them")
    if x.stride(-1) != 1:
        raise ValueError(f"{name} needs a contiguous last dim: call .contiguous()")
    checks.check_reach(name, x)
    checks.check_contiguous(**{weight_name: weight})
    if weight.shape[0] > checks.MAX_GRID:
        raise ValueError(
            f"{weight_name} has {weight.shape[0]} heads: give at most {checks.MAX_GRID}"
        )
    _check_early(early)


def _can_start_early(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def _launch(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    eps: float,
    early: bool,
    config: ProductConfig | None,
    epilogue: tl.constexpr,
    head: int = 2,
    start: int = 0,
    tables: tuple[Tensor, Tensor, Tensor] | None = None,
    other: Tensor | None = None,
) -> Tensor:
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    pairs = epilogue.value >= kernel.SWIGLU.value
    count = outputs // 2 if pairs else outputs
    cut = config or default_config(outputs, inputs, pairs)
    out = x.new_empty(tokens, count if epilogue is kernel.SWIGLU else outputs)
    programs = -(-count // cut.rows)
    if cut.persistent:
        programs = min(programs, cut.persistent * _multiprocessors(x.device))
    early = early and _can_start_early(x)
    cos, sin, positions = tables or (x, x, x)  # any tensors: the kernel reads them for ROTATE only
    with torch.cuda.device_of(x):
        kernel.product_kernel[(programs,)](
            x, weight, x if norm is None else norm, x if other is None else other,
            cos, sin, positions, out, eps, x.stride(0), 0 if other is None else other.stride(0),
            len(cos), T=tokens, K=inputs, R=outputs, STRIDE=weight.stride(0), N=cut.rows,
            CHUNK=cut.chunk, NORM=norm is not None, EPILOGUE=epilogue.value, HEAD=head,
            START=start, EARLY=early, num_warps=cut.warps,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter's programs run one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch_heads(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    strides: tuple[int, ...],
    x_part: int,
    out_part: int,
    early: bool,
) -> Tensor:
    """Launch the product per head. strides: token, head and part of x, then of out."""
    heads, inputs, outputs = weight.shape
    rows, columns = heads_cut(heads, inputs, outputs)
    early, warps = early and _can_start_early(x), 4
    # A thread holds 16 bytes of a row of weights.
    across = min(rows, 32 * warps * (16 // weight.element_size()) // columns)
    with torch.cuda.device_of(x):
        heads_kernel[(-(-outputs // columns), heads)](
            x, weight, out, *strides, T=x.shape[0], K=inputs, J=outputs, X_PART=x_part,
            OUT_PART=out_part, ROWS=rows, PASS=across, COLUMNS=columns, EARLY=early,
            num_warps=warps, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out
