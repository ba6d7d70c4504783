"""What the benchmark of vLLM makes of profiled kernels, and its tables."""

from __future__ import annotations

from mlra_vllm.benchmarks.tables import profile_table, table
from mlra_vllm.benchmarks.workers import kernels

MATMUL, SUM = "gemv2T_kernel", "vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>"


def test_kernels_are_summed_per_step_and_pauses_counted():
    # Two steps: 4 us of product, a pause of 2 us, 3 us of all-reduce; 1 us under another kernel.
    events = [
        (name, step * 20_000 + at, ns)
        for step in range(2)
        for name, at, ns in ((SUM, 6_000, 3_000), (MATMUL, 0, 4_000), ("copy", 3_000, 1_000))
    ]
    found = kernels(events, 2)
    assert found["kernels"] == [(MATMUL, 1, 4.0), (SUM, 1, 3.0), ("copy", 1, 1.0)]
    assert found["all_reduce_us"] == 3.0
    assert found["step_us"] == (20 + 9) / 2
    assert found["idle_us"] == (2 + 11 + 2) / 2
    assert found["gaps"] == 3 / 2
    assert kernels([], 2) == {"error": "the profiler saw no kernel"}


def test_tables_show_what_was_measured_before_an_error():
    step = {"batch": 1, "context": 8192, "ms": 3.0, "graph_ms": 2.25, "host_ms_by_rank": [1.0, 2.5]}
    record = {"model": "mlra4", "model_runner": 2, "tp": 2, "steps": [step], "error": "exit code 1"}
    other = record | {"steps": [step | {"context": 32768, "graph_ms": None}]}
    first, second = table([record, other]).splitlines()[2:]
    assert first.startswith("| mlra4, 2, 2 | 3.00 (2.25, 2.50) |  |") and "exit code 1" in first
    assert "|  | 3.00 (no graph, 2.50) |" in second


def test_profiles_are_printed_with_what_is_missing():
    python = [("gpu/model_runner.py:1 execute_model", 1.0, 200.0, 900.0)]
    told = {"batch": 1, "context": 8192, "python": python}
    record = {"model": "mlra4", "tp": 2}
    whole = kernels([(MATMUL, 0, 4_000), (SUM, 4_500, 3_000)], 1)
    text = profile_table(record | {"profile": told | {"kernels": [whole, whole]}})
    assert "8 us a step, 7 us of kernels, 0 us idle in 0 gaps" in text
    assert "all-reduce by rank 3, 3 us" in text
    assert f"| 4.0 | 1.0 | 4.00 | {MATMUL} |" in text
    assert "| 900 | 200 | 1.0 | gpu/model_runner.py:1 execute_model |" in text
    none = told | {"kernels": [{"error": "no CUPTI"}], "python": {"error": "no"}}
    assert "no CUPTI" in profile_table(record | {"profile": none})
