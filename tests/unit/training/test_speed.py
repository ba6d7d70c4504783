"""The speed that a run's lines show."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_mlra.cost.flops import TrainFlops
from megatron_mlra.training.speed import Clock, Speed
from megatron_mlra.training.speed import parts as line_parts


def test_throughput_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("megatron_mlra.training.speed.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    args = Namespace(consumed_train_samples=40, seq_length=10, train_iters=25)  # after a resume
    clock = Clock(args)
    assert clock.rate(11) is None and clock.left(11) is None
    now[0] += 2
    with clock.pause():
        now[0] += 50
    now[0] += 3
    args.consumed_train_samples += 20
    assert clock.rate(16) == 20 * 10 / 5
    assert clock.left(16) == 55 / 5 * 9  # what evaluation takes is part of what is left
    now[0] += 1
    args.consumed_train_samples += 4
    assert clock.rate(17) == 40


@pytest.mark.parametrize(
    ("device", "fp8", "packed", "said"),
    [
        ("NVIDIA H100 80GB HBM3", False, False, "MFU 20.0 %"),
        ("NVIDIA H100 80GB HBM3", True, True, "MFU at most 10.0 %"),
        ("NVIDIA H200", False, False, "MFU 20.0 %"),
        ("NVIDIA A100-SXM4-80GB", False, False, "MFU 63.4 %"),
        ("NVIDIA B200", False, False, "MFU 8.8 %"),
        ("NVIDIA GB200", False, False, "MFU 7.9 %"),
        ("NVIDIA H100 PCIe", False, False, "198 TFLOP/s a GPU"),
        ("NVIDIA H100 NVL", False, True, "at most 198 TFLOP/s a GPU"),
        ("NVIDIA H200 NVL", False, False, "198 TFLOP/s a GPU"),
        ("NVIDIA L4", False, False, "198 TFLOP/s a GPU"),
        (None, False, False, None),
    ],
)
def test_mfu_only_of_gpus_whose_peak_is_known(device, fp8, packed, said):
    speed = Speed(TrainFlops(197.8e9, 200e9), 2, device, fp8, packed)
    parts, points = line_parts(speed, 2000.0, 71.26, 3600.0)
    assert parts == ["2,000 tokens/s", *([said] if said else []), "71.3 GiB", "60 min left"]
    assert ("MFU" in points) == bool(said and "MFU" in said)
    assert points["model TFLOP per second and device"] == pytest.approx(197.8)
    assert (points["peak memory GiB"], points["hours left"]) == (71.26, 1.0)
