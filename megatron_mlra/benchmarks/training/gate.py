"""The correctness gate: a case is timed only if its gradients agree with the torch layers'."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_mlra.benchmarks.training.case import Load, build_model, parse_case
from megatron_mlra.benchmarks.training.cases import Case

LAYERS, SEQUENCES, TOKENS = 2, 2, 512
TOLERANCE = {"bf16": 0.03, "fp8": 0.45}
"""Largest relative difference |found - expected| / |expected| of a parameter's gradient. FP8 rounds
values to 1/16 (e4m3) and gradients to 1/8 (e5m2) of themselves. The query's gradients are
differences of nearly equal terms in an untrained model, which magnifies the error."""

DELAYED_PASSES = 4
"""Passes before gradients of delayed scaling are compared. It takes its factors from the previous
pass, and starts with 1, which rounds small gradients to 0. The gradients of a linear are right one
pass after those of the next linear."""


def check(case: Case, load: Load) -> float:
    """The largest relative gradient difference in 2 layers of the case.

    Megatron's own MLA has no second implementation here, and a router's choice among experts turns
    on the last bit: there the loss must be finite.

    Raises:
        ValueError: a difference is beyond the tolerance; names the parameter.
    """
    if case.is_stock or case.has_experts:
        loss, _ = _run(case, load, None)
        if not torch.isfinite(loss):
            raise ValueError(f"{case}: the loss is {loss.item()}")
        return 0.0
    torch_layers = Case(case.variant, "bf16", case.form, case.seq_length)
    weights: dict[str, Tensor] = {}
    _, expected = _run(torch_layers, load, weights, "--transformer-impl", "local")
    _, found = _run(case, load, weights)
    limit = TOLERANCE["bf16" if case.recipe == "bf16" else "fp8"]
    differences = {n: float((found[n] - g).norm() / g.norm()) for n, g in expected.items()}
    name, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= limit:
        raise ValueError(f"{case}: gradient of {name} is off by {worst:.3g}, beyond {limit}")
    return worst


def _run(case: Case, load: Load, weights: dict[str, Tensor] | None, *flags: str):
    """(Loss, name in checkpoints -> gradient). `weights` is filled if empty, else loaded."""
    torch.manual_seed(1)
    cut = Load(LAYERS, SEQUENCES * TOKENS, 1, load.ffn_multiple, load.flags)
    short = Case(case.variant, case.recipe, case.form, min(TOKENS, case.seq_length))
    args, config = parse_case(
        short, cut, "--no-zero-init-output", "--no-gradient-accumulation-fusion", *flags
    )
    model = build_model(short, args, config)
    named = {} if weights is None else _by_checkpoint_name(model)
    with torch.no_grad():
        for name, param in named.items():
            if name in weights:
                param.copy_(weights[name])
    if weights is not None and not weights:
        weights.update({name: param.detach().clone() for name, param in named.items()})
    generator = torch.Generator().manual_seed(2)
    shape = (args.micro_batch_size, short.seq_length + 1)
    tokens = torch.randint(args.padded_vocab_size, shape, generator=generator).cuda()
    positions = torch.arange(short.seq_length, device=tokens.device)[None]
    labels = tokens[:, 1:].contiguous()
    for _ in range(DELAYED_PASSES if case.recipe == "delayed" else 1):
        model.zero_grad()
        model.set_is_first_microbatch()
        loss = model(tokens[:, :-1].contiguous(), positions, None, labels=labels).float().mean()
        loss.backward()
    return loss.detach(), {n: p.grad.float() for n, p in named.items()}


def _by_checkpoint_name(model) -> dict[str, torch.nn.Parameter]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    params = {p.data_ptr(): p for p in model.parameters()}
    named = {}
    for key, entry in model.sharded_state_dict(metadata={"dp_cp_group": group}).items():
        data = getattr(entry, "data", None)
        if isinstance(data, torch.Tensor) and data.data_ptr() in params:
            layer = key.split(".layers.")[1].split(".")[0] if ".layers." in key else ""
            named[f"{entry.key} {layer}"] = params[data.data_ptr()]
    assert len(named) == len(params)
    return named
