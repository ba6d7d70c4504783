"""Random queries over a paged latent cache."""

from __future__ import annotations

import math

import torch


def paged_case(lengths, *, q_len, latents, branches, heads, dim, rope, page, dtype, seed=0):
    """Random queries and a paged cache whose unused entries are NaN and unused page ids huge."""
    gen = torch.Generator().manual_seed(seed)
    pages = sum(-(-n // page) for n in lengths) + 2
    order = torch.randperm(pages, generator=gen)
    table = torch.full((len(lengths), max(-(-n // page) for n in lengths) + 1), 2**31 - 1)
    cache = torch.full((pages, page, latents * dim + rope), math.nan, dtype=dtype)
    used = 0
    for b, n in enumerate(lengths):
        for i in range(-(-n // page)):
            table[b, i] = order[used]
            rows = min(page, n - i * page)
            cache[order[used], :rows] = torch.randn(rows, cache.shape[2], generator=gen).to(dtype)
            used += 1
    shape = (len(lengths), q_len, latents, heads, dim)
    groups = latents // branches
    q_absorbed = torch.randn(*shape, generator=gen).to(dtype)
    q_rope = torch.randn(len(lengths), q_len, groups * heads, rope, generator=gen).to(dtype)
    return q_absorbed, q_rope, cache, table.int(), torch.tensor(lengths, dtype=torch.int32)
