"""Every preset: its keys are flags; its parameter count is right to the digit, counted thrice."""

import argparse
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import transformer_config
from megatron.core.transformer.spec_utils import build_module
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments

from megatron_mlra.checkpoint.huggingface.config import from_hf_config, to_hf_config
from megatron_mlra.checkpoint.huggingface.names import rules
from megatron_mlra.checkpoint.rules import their_shapes
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.description.tensors import expected_tensors
from megatron_mlra.hf.configuration_mlra import MLRAConfig as HuggingFaceConfig
from megatron_mlra.hf.modeling_mlra import MLRAForCausalLM
from megatron_mlra.layers.baselines.config import BaselineConfig
from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.layers.projections import RMSNorm
from megatron_mlra.layers.specs import block_spec
from megatron_mlra.planner.twin import twin
from megatron_mlra.training.arguments import parse
from megatron_mlra.training.flags import add_mlra_arguments
from megatron_mlra.training.presets import load_preset
from support import CONFIGS, ROOT

LADDER = ROOT / "examples" / "reproduce" / "presets"
PUBLISHED = {
    "mlra4_2.9b": 2873220096,
    "mlra2_2.9b": 2872630272,
    "mla_2.9b": 2872052736,
    "gla2_2.9b": 2872630272,
    "gla4_2.9b": 2873220096,
    "mlra4_gated_2.9b": 2873220096,
    "mlra2_gated_2.9b": 2872630272,
    "mla_gated_2.9b": 2872052736,
    "gla2_gated_2.9b": 2872630272,
    "mha_2.9b": 2872593408,
    "mqa_2.9b": 2872003584,
    "gqa_2.9b": 2872593408,
    "gqa_gated_2.9b": 2872593408,
    "gta_2.9b": 2872003584,
    "mfa_2.9b": 2873232384,
    "tpa_2.9b": 2873183232,
}
# Preset, its twin, and whose dimensions and count the twin has.
TWINS = {
    "mlra4_7b": ("mla_7b", None),
    "mlra4_70b": ("gqa_70b", 70553706496),  # Llama-3 70B
    "mlra4_qwen_8b": ("gqa_qwen_8b", 8190735360),  # Qwen3-8B
    "mlra4_moe_16b": ("mla_moe_16b", 15706484224),  # DeepSeek-V2-Lite
}
LARGE = {name for preset, (twin, _) in TWINS.items() for name in (preset, twin)}
PRESETS = sorted(p.stem for p in CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def groups():
    """Megatron's process groups in a world of one."""
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def arguments():
    """Preset name -> parsed arguments: unknown keys and bad values raise."""
    parser = add_mlra_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    plain = vars(parser.parse_args([]))

    def parse(preset: str | Path) -> argparse.Namespace:
        return argparse.Namespace(**plain | load_preset(preset, parser))

    return parse


def test_all_published_configurations_have_a_preset():
    assert set(PUBLISHED) | {"debug", "mlra4_350m"} | LARGE == set(PRESETS)


def test_the_table_of_presets_is_theirs():
    table = (ROOT / "docs" / "presets.md").read_text()
    rows = re.findall(r"^\| \[(\S+)\]\(\S+/presets/\1\.yaml\) \| (.*?) \| ([\d,]+) \|", table, re.M)
    heads = [(CONFIGS / f"{name}.yaml").read_text().partition("\n")[0] for name, *_ in rows]
    assert heads == [f"# {what}: {count} parameters." for _, what, count in rows]
    assert sorted(name for name, *_ in rows) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name, arguments, groups, monkeypatch):
    args = arguments(name)
    counted = parameters(from_megatron_args(args))
    real = build_and_count(args, groups, monkeypatch)
    assert real == counted.total
    assert (counted.active < real) == bool(args.num_experts)
    assert real == PUBLISHED.get(name, real)
    comment = (CONFIGS / f"{name}.yaml").read_text().partition("\n")[0]
    (stated,) = re.findall(r"^# .*: ([\d,]+) parameters\.$", comment)
    assert int(stated.replace(",", "")) == real


@pytest.mark.parametrize("size", ["small", "large"])
def test_ladder_presets_are_twins(size, arguments, groups, monkeypatch):
    """Every model of the evidence is what tools/twin.py makes of that size's MLA, and has within
    0.1 % as many real parameters, in sizes that are multiples of 8."""
    reference = LADDER / f"{size}_mla.yaml"
    args = arguments(LADDER / f"{size}_mla.yaml")
    target = build_and_count(args, groups, monkeypatch)
    files = sorted(LADDER.glob(f"{size}_*.yaml"))
    assert len(files) == {"small": 13, "large": 5}[size]
    for file in files:
        args = arguments(file)
        assert abs(build_and_count(args, groups, monkeypatch) / target - 1) <= 1e-3
        assert args.ffn_hidden_size % 8 == 0
        if file != reference:
            made = twin(reference, file.stem.partition("_")[2])
            assert made.to_yaml(LADDER, reference.stem) == file.read_text()


@pytest.mark.parametrize("name", ["mla_moe_16b", "mlra4_moe_16b"])
def test_a_mixture_of_experts_is_converted_whole(name, arguments):
    model = from_megatron_args(arguments(name))
    count = parameters(from_megatron_args(arguments(name))).total
    shapes = expected_tensors(model)
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    assert (
        from_hf_config(to_hf_config(model), model.dtype).replace(
            tokenizer_type=model.tokenizer_type
        )
        == model
    )
    stored = their_shapes(model, rules(model))
    with torch.device("meta"):
        exported = MLRAForCausalLM(HuggingFaceConfig(**to_hf_config(model)))
    assert {name: tuple(p.shape) for name, p in exported.named_parameters()} == stored


def build_and_count(args: argparse.Namespace, groups, monkeypatch) -> int:
    """Parameters of embedding, layers, final norm and untied output layer in one process, built on
    the meta device: one layer of each kind (dense, mixture of experts), times how many there are.
    """
    # Megatron allocates on the current CUDA device.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    for name, value in {
        "params_dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "perform_initialization": False,
        "transformer_impl": "local",
        "no_persist_layer_norm": True,
        "gradient_accumulation_fusion": False,
        "overlap_p2p_comm": False,
        "multi_latent_attention": False,
        "cp_comm_type": ["p2p"],
        "sequence_parallel": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "pipeline_dtype": None,
        "moe_grouped_gemm": False,
    }.items():
        setattr(args, name, value)
    kind = MLRAConfig if args.attention == "mlra" else BaselineConfig
    config = core_transformer_config_from_args(args, kind)
    with torch.device("meta"):
        embedding = LanguageModelEmbedding(
            config,
            args.padded_vocab_size,
            args.max_position_embeddings,
            position_embedding_type=args.position_embedding_type,
            tp_group=groups.tp,
        )
        specs = block_spec(config).layer_specs
        kinds = {id(spec): spec for spec in specs}
        layers = {
            kind: build_module(spec, config=config, layer_number=1, pg_collection=groups)
            for kind, spec in kinds.items()
        }
        norm = RMSNorm(config, config.hidden_size)
    modules = [embedding, norm, *layers.values()]
    assert all(p.is_meta for m in modules for p in m.parameters())
    output = count(embedding) if args.untie_embeddings_and_output_weights else 0
    return count(embedding) + sum(count(layers[id(s)]) for s in specs) + count(norm) + output


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_vocabulary_is_the_same_at_every_tensor_parallel_size(arguments):
    for name in PUBLISHED:
        args = arguments(name)
        assert args.padded_vocab_size == args.vocab_size == 50304
        assert args.padded_vocab_size % (8 * 16) == 0
        assert args.null_tokenizer_eod_id == 50256, "the end of text among GPT-2's tokens"


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_of_one_size(name, arguments):
    twin, known = TWINS[name]
    shapes = [from_megatron_args(arguments(n)) for n in (name, twin)]
    ours, theirs = (parameters(shape).total for shape in shapes)
    assert abs(ours / theirs - 1) < 1e-3
    assert known in (None, theirs)
    assert shapes[0].attention_variant == "MLRA-4"
    for field in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "seq_length"):
        assert getattr(shapes[0], field) == getattr(shapes[1], field)


@pytest.mark.parametrize("name", sorted(LARGE))
def test_large_presets_suit_fp8_at_their_layout(name, arguments, monkeypatch):
    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda *_: True)
    args = arguments(name)
    tp = args.tensor_model_parallel_size
    args.params_dtype, args.multi_latent_attention, args.fp8 = torch.bfloat16, False, "hybrid"
    args.cp_comm_type, args.overlap_p2p_comm = ["p2p"], False
    kind = MLRAConfig if args.attention == "mlra" else BaselineConfig
    config = core_transformer_config_from_args(args, kind)
    assert config.fp8 and config.tensor_model_parallel_size == tp
    for width in (args.ffn_hidden_size, args.moe_ffn_hidden_size, args.padded_vocab_size):
        assert (width or 0) % (16 * tp) == 0


@pytest.mark.parametrize("name", sorted(LARGE))
def test_large_presets_pass_the_checks_of_a_launch(name):
    gpus = "1024" if "70b" in name else "64"
    args = parse(["--config", name, "--dry-run", gpus, "--mock-data"])
    assert args.world_size == int(gpus)
    with pytest.raises(ValueError, match=r"processes|micro-batches"):
        parse(["--config", name, "--dry-run", "7", "--mock-data"])
