"""Muon takes the matrices of the method, and its update is one rank's in every layout.

The expected update is written here from the definitions: the quintic Newton-Schulz iteration of
Jordan et al. (2024) on each matrix, times sqrt(max(rows, columns)) (Liu et al., arXiv 2502.16982).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.drivers.muon import LAYOUTS, gradient

H, L, N, D_H, D_R, D_V, D_C = 8, 4, 4, 16, 8, 24, 64
"""Sizes of the tiny model, MLRA-4."""
LR = 1e-3
ADAM = ("norm", "embedding")


@pytest.fixture(scope="module")
def results(run_driver) -> Path:
    """Run all cases once."""
    return run_driver("muon", timeout=600)


def load(results: Path, name: str):
    return torch.load(results / f"{name}.pt")


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic iteration in float64, scaled."""
    rows, columns = matrix.shape
    x = matrix.double() if rows <= columns else matrix.double().T
    x = x / x.norm()
    for a, b, c in (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ):
        g = x @ x.T
        x = a * x + (b * g + c * g @ g) @ x
    return (x if rows <= columns else x.T) * max(rows, columns) ** 0.5


def by_matrices(name: str, whole: torch.Tensor) -> torch.Tensor:
    """The update's direction of one layer's weight, matrix by matrix, in loops."""
    out = torch.empty_like(whole, dtype=torch.float64)
    if name.endswith("linear_kv_up_proj.weight"):
        for branch in range(N):
            for head in range(H):
                for part in (slice(0, D_H), slice(D_H, D_H + D_V)):
                    out[branch, head, part] = orthogonalized(whole[branch, head, part])
    elif name.endswith("linear_q_up_proj.weight"):
        for head in range(H):
            start = head * (D_H + D_R)
            for part in (slice(start, start + D_H), slice(start + D_H, start + D_H + D_R)):
                out[part] = orthogonalized(whole[part])
    elif name.endswith("linear_kv_down_proj.weight"):
        d_l = D_C // L
        for latent in range(L):
            part = slice(latent * d_l, (latent + 1) * d_l)
            out[part] = orthogonalized(whole[part])
        out[D_C:] = orthogonalized(whole[D_C:])
    else:
        out = orthogonalized(whole)
    return out


def test_each_matrix_is_orthogonalized_by_itself(results: Path) -> None:
    update = load(results, "MLRA-4")["update"]
    checked = 0
    gradients = {name: gradient(name, tuple(u.shape)) for name, u in update.items()}
    for name, found in update.items():
        if any(word in name for word in ADAM):
            continue
        for layer in range(2):
            wanted = by_matrices(name, gradients[name][layer])
            # The scale of the gradient (clipped, times 1 - momentum) does not matter to Muon.
            error = (found[layer] / -LR - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-4, f"{name} of layer {layer} is off by {error:.1e}"
            checked += 1
    assert checked == 2 * 7


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_update_is_that_of_one_rank(name: str, results: Path) -> None:
    expected, found = load(results, LAYOUTS[name][0])["update"], load(results, name)["update"]
    assert expected.keys() == found.keys()
    for key, theirs in expected.items():
        assert theirs.abs().max() > 0
        error = float((found[key] - theirs).abs().max() / theirs.abs().max())
        assert error <= 1e-5, f"{key} is off by {error:.1e}"


def test_the_table_says_what_goes_where(results: Path) -> None:
    lines = load(results, "MLRA-4")["table"].splitlines()
    assert lines[0] == "optimizer muon, weights of this rank:"
    said = {line.split()[0].rsplit("self_attention.", 1)[-1]: line for line in lines[1:]}
    assert "[4 x 8 x 40 x 16]" in said["linear_kv_up_proj.weight"]
    assert (
        "muon: 32 of [16 x 16], a branch's and head's key; 32 of [24 x 16], its value (2 weights)"
        in said["linear_kv_up_proj.weight"]
    )
    assert (
        "4 of [16 x 64], a latent head; 1 of [8 x 64], the RoPE key"
        in said["linear_kv_down_proj.weight"]
    )
    assert said["kv_norm.weight"].split()[-3] == "adam"
    normed = load(results, "MLRA-4 query norm tp2")["table"].splitlines()
    (norm,) = (line.split() for line in normed if "query_head_norm.weight" in line)
    assert norm[1:3] == ["[96]", "adam"]
    twin = load(results, "GQA")["table"]
    assert "8 of [16 x 64], a query; 4 of [16 x 64], a key; 4 of [16 x 64], a value" in twin
    cut = load(results, "GQA tp8")["table"]
    assert "2 of [16 x 64], a query (gathered); 1 of [16 x 64], a key (gathered); 1 of" in cut
