"""Flags of RoPE: what each kind of attention understands, and YaRN for the latent family.

Megatron's argument parser has two sets of names for YaRN, and RoPE variants that only Megatron's
attention reads. Here one set of names works, and flags that would be ignored are refused.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_mlra.command_line.parser import flag
from megatron_mlra.layers.config import MLRAConfig

_FLAGS = {
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
"""Field of MLRAConfig -> Megatron's argument."""

_NEUTRAL = {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
"""Values of YaRN's other arguments under which they have no effect."""


class YarnConfig(MLRAConfig):
    """MLRA's configuration with `rope_type` "yarn", which Megatron passes to its own MLA alone."""

    def __post_init__(self) -> None:
        self.rope_type = "yarn"
        super().__post_init__()


def check_rope(args: Namespace) -> None:
    """Refuse RoPE flags that would have no effect; set YaRN's fields of MLRAConfig from the flags.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    kind = args.attention
    if args.position_embedding_type != "rope":
        asked, fix = args.position_embedding_type, "leave it out"
        if kind == "mlra":
            instead = {"yarn": "use --rope-type yarn", "none": "use --qk-rope-head-dim 0"}
            fix = instead.get(asked, fix)
        raise ValueError(f"--position-embedding-type {asked}: {fix}")
    for name in ("rotary_seq_len_interpolation_factor", "use_rope_scaling"):
        if getattr(args, name) and kind != "gqa":
            raise ValueError(
                f"{flag(name)} does not reach --attention {kind}; use --rotary-base"
                f"{', or --rope-type yarn' if kind == 'mlra' else ''}"
            )
    if args.rope_type != "yarn":
        asked = [name for name in _FLAGS.values() if getattr(args, name) is not None]
        asked += [name for name, none in _NEUTRAL.items() if getattr(args, name) != none]
        if asked:
            value = getattr(args, asked[0])
            raise ValueError(
                f"{flag(asked[0])} {value} has no effect without --rope-type yarn; add it, or leave"
                f" {flag(asked[0])} out"
            )
        return
    if kind != "mlra":
        raise ValueError(
            f"--rope-type yarn needs --attention mlra; a longer context of --attention {kind} comes"
            " by --rotary-base"
        )
    if args.yarn_original_max_position_embeddings is None:
        raise ValueError(
            "--rope-type yarn needs --yarn-original-max-position-embeddings, the sequence length"
            " that the model was trained at"
        )
    if args.yarn_correction_range_round_to_int is False:
        raise ValueError("--no-yarn-correction-range-round-to-int is not supported; leave it out")
    for field, name in _FLAGS.items():
        if (value := getattr(args, name)) is not None:
            setattr(args, field, value)
