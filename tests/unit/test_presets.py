"""Every preset: its keys are flags; its parameter count is right to the digit, counted thrice."""

import argparse
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments

from megatron_mlra.accounting import ModelShape, parameters
from megatron_mlra.arguments import add_mlra_arguments, load_preset
from megatron_mlra.baseline_config import BaselineConfig
from megatron_mlra.config import MLRAConfig
from megatron_mlra.layer_specs import layer_spec
from megatron_mlra.projections import RMSNorm

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
BASES = {"paper_recipe"}

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
PRESETS = sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem not in BASES)


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

    def parse(name: str) -> argparse.Namespace:
        return argparse.Namespace(**plain | load_preset(CONFIGS / f"{name}.yaml", parser))

    return parse


def test_all_published_configurations_have_a_preset():
    assert set(PUBLISHED) | {"debug", "mlra4_350m"} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name, arguments, groups, monkeypatch):
    args = arguments(name)
    counted = parameters(ModelShape.from_args(args))
    real = build_and_count(args, groups, monkeypatch)
    assert real == counted.total == counted.active
    assert real == PUBLISHED.get(name, real)
    comment = (CONFIGS / f"{name}.yaml").read_text().partition("\n")[0]
    (stated,) = re.findall(r"^# .*: ([\d,]+) parameters\.$", comment)
    assert int(stated.replace(",", "")) == real


def build_and_count(args: argparse.Namespace, groups, monkeypatch) -> int:
    """Parameters of the embedding, num_layers times one layer, and the final norm, on meta."""
    # Megatron allocates on the current CUDA device.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    for name, value in {
        "params_dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "perform_initialization": False,
        "transformer_impl": "local",
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "overlap_p2p_comm": False,
        "multi_latent_attention": False,
        "cp_comm_type": ["p2p"],
    }.items():
        setattr(args, name, value)
    kind = MLRAConfig if args.attention == "mlra" else BaselineConfig
    config = core_transformer_config_from_args(args, kind)
    embedding = LanguageModelEmbedding(
        config,
        args.padded_vocab_size,
        args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        tp_group=groups.tp,
    )
    layer = build_module(layer_spec(config), config=config, layer_number=1, pg_collection=groups)
    norm = RMSNorm(config, config.hidden_size)
    assert not args.untie_embeddings_and_output_weights
    assert all(p.is_meta for m in (embedding, layer, norm) for p in m.parameters())
    return count(embedding) + args.num_layers * count(layer) + count(norm)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_vocabulary_is_the_same_at_every_tensor_parallel_size(arguments):
    for name in PUBLISHED:
        args = arguments(name)
        assert args.padded_vocab_size == args.vocab_size == 50304
        assert args.padded_vocab_size % (8 * 16) == 0
        assert args.null_tokenizer_eod_id == 50256, "the end of text among GPT-2's tokens"
