"""Every public function of the kernels: right for what it takes, one line for everything else.

Arguments are drawn right, then up to two are spoilt: other strides, dtypes, devices, shapes, types,
lengths, page ids, slots, positions. A function then raises ValueError with one line, or returns
what float64 loops return for plain copies of its arguments.

The kernels themselves run in Triton's interpreter, in a child process, on fewer examples.
"""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlra_kernels.benchmarks import operators
from mlra_kernels.latent_projections import reference
from support import kernel_calls as calls
from support import operator_calls as others
from support.interpreted import INTERPRETING, run_interpreted

TOLERANCES = {
    torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2,
}  # fmt: skip
ON_TORCH = {
    "latent_decode": calls.latent_decode_calls(),
    "grouped_decode": calls.grouped_decode_calls(),
    "latent_cache_append": calls.append_calls(),
    "merge_states": calls.merge_calls(),
}
PURE = {
    "rope_tables": others.table_calls(),
    "split_cache": others.split_calls(),
    "key_ranges": others.span_calls(),
}
KERNELS_ONLY = {
    "decoder": others.decoder_calls(),
    "latent_projections": others.projection_calls(),
    "one_shot": others.one_shot_calls(),
    "products": others.product_calls(),
}


def examples(count: int):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def call_holds(call: calls.Call, arguments: dict, **options) -> bool:
    """Whether the call returned, what it should; False: it refused, in one line."""
    tensors = {k: x for k, x in arguments.items() if isinstance(x, torch.Tensor)}
    plain = {k: x.clone(memory_format=torch.contiguous_format) for k, x in tensors.items()}
    try:
        found = call.function(**arguments, **options)
    except ValueError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 400, said
        return False
    found = found if isinstance(found, tuple) else (found,)
    if any(x.is_meta for x in tensors.values()):
        assert all(x.is_meta for x in tensors.values()) and all(x.is_meta for x in found)
        return True
    for ours, theirs in zip(found, call.expected(**arguments | plain), strict=True):
        tolerance = TOLERANCES.get(ours.dtype, 0.0)
        theirs = theirs.to(ours.dtype).double()
        torch.testing.assert_close(
            ours.double(), theirs, rtol=tolerance, atol=tolerance, equal_nan=True
        )
    return True


def holds_for_all(strategy, count: int, **options) -> None:
    """Every example holds, and at least a tenth of them are calls that return."""
    returned = []

    @examples(count)
    @given(st.data())
    def holds(data):
        call = data.draw(strategy)
        returned.append(call_holds(call, data.draw(calls.spoilt_arguments(call)), **options))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        holds()
    assert len(returned) >= count / 2 and sum(returned) >= len(returned) / 10


if not INTERPRETING:

    @pytest.mark.parametrize("name", ON_TORCH)
    def test_torch(name):
        holds_for_all(ON_TORCH[name], 500, backend="torch")

    @pytest.mark.parametrize("name", PURE)
    def test_pure(name):
        holds_for_all(PURE[name], 500)

    def test_references_of_the_projections():
        def on_reference(call):
            return call._replace(function=getattr(reference, call.function.__name__ + "_reference"))

        @examples(100)
        @given(others.projection_calls().map(on_reference))
        def holds(call):
            assert call_holds(call, call.arguments)

        holds()

    @examples(500)
    @given(st.data())
    def test_what_needs_a_gpu_says_so(data):
        strategies = [others.core_calls(), *KERNELS_ONLY.values(), *ON_TORCH.values()]
        call = data.draw(st.sampled_from(strategies).flatmap(lambda strategy: strategy))
        assert not call_holds(call, data.draw(calls.spoilt_arguments(call)))

    def test_kernels_under_the_interpreter():
        printed = run_interpreted(__file__)
        assert " passed" in printed and "skipped" not in printed

else:

    @pytest.mark.parametrize("name", ON_TORCH | KERNELS_ONLY)
    def test_kernels(name):
        holds_for_all((ON_TORCH | KERNELS_ONLY)[name], 40)

    def test_benchmark_of_the_operators_compares_what_it_times():
        sizes = operators.Sizes(
            tokens=9, batch=3, length=64, hidden=48, mlp=40, heads=4, kv_heads=2, dim=64, rope=32
        )
        names = set()
        for case in operators.cases(sizes, torch.float16, "cpu", seed=1):
            assert operators.error(case) < operators.ERROR_LIMIT, case.name
            names.add(case.name)
        assert len(names) == 9
