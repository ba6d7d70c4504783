"""Products of a few rows with weight matrices: `product`, `swiglu_product`, `rotated_product`, and
per head `absorb_queries` and `sum_branches`."""

from mlra_kernels.products.configs import MOST_TOKENS, ProductConfig, few
from mlra_kernels.products.ops import (
    absorb_queries,
    product,
    rotated_product,
    sum_branches,
    swiglu_product,
)

__all__ = [
    "MOST_TOKENS",
    "ProductConfig",
    "absorb_queries",
    "few",
    "product",
    "rotated_product",
    "sum_branches",
    "swiglu_product",
]
