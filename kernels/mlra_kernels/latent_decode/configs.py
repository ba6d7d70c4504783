"""Tile shapes of the decoding kernel: one small table from shape to configuration.

The measurements behind the choices are in docs/log/kernels.md.
"""

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class DecodeConfig:
    """How one launch of the decoding kernel is cut."""

    block_m: int
    """Query rows (query tokens x heads of one latent) per program."""
    block_n: int
    """Cached tokens per tile."""
    num_warps: int
    """Warps per program; with consumers, per consumer."""
    num_stages: int
    """Tiles in the software pipeline, or in the Hopper kernel's ring."""
    programs_per_sm: int
    """Programs resident on one multiprocessor, all row blocks and latents counted."""
    hopper: bool = False
    """Use the Hopper kernel (TMA ring, warp-specialised) instead of the portable one."""
    consumers: int = 1
    """Groups of `num_warps` warps that take a program's tiles in turn (Hopper kernel)."""
    registers: int = 0
    """Most registers per thread (Hopper kernel); 0: an equal share of the SM's registers."""
    min_tiles: int = 4
    """Fewest tiles that justify a program of their own."""

    def __post_init__(self) -> None:
        """Raise ValueError for a configuration that the kernels cannot run or cannot run safely."""
        for name, allowed in (
            ("block_m", (16, 32, 64, 128)),
            ("block_n", (16, 32, 64, 128, 256)),
            ("num_warps", (1, 2, 4, 8, 16)),
            ("num_stages", range(1, 17)),
            ("programs_per_sm", range(1, 33)),
            ("registers", range(256)),
            ("min_tiles", range(1, 2**20)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use {_choices(allowed)}")
        if self.hopper and (self.block_m != 64 or self.num_warps not in (4, 8)):
            raise ValueError(
                f"block_m is {self.block_m} and num_warps {self.num_warps} with hopper=True: use"
                " 64 and 4 or 8"
            )
        if self.consumers > 1 and (
            self.num_stages % self.consumers or self.num_stages == self.consumers
        ):
            # One parity bit tells a slot's fillings apart, so one consumer must see them all.
            raise ValueError(
                f"num_stages is {self.num_stages} for {self.consumers} consumers: make it a "
                f"multiple of {self.consumers} from {2 * self.consumers} up"
            )
        if self.consumers not in (1, 2, 3) or (self.consumers > 1 and self.num_warps != 4):
            raise ValueError(
                f"consumers is {self.consumers} with num_warps {self.num_warps}: use 1, or 2 or 3 "
                "with num_warps 4"
            )

    @property
    def warps_n(self) -> int:
        """Warps side by side over a tile's tokens; `block_m / 16` warps cover the query rows."""
        return self.num_warps * 16 // self.block_m

    @property
    def max_registers(self) -> int:
        """Registers per thread at launch: `registers`, or as many as let the programs fit an SM."""
        threads = 32 * (self.num_warps * self.consumers + 4)  # the loader fills a warpgroup
        return self.registers or min(255, 65536 // (self.programs_per_sm * threads) // 8 * 8)

    @property
    def consumer_registers(self) -> int:
        """Registers per thread of consumers 1 and 2: a share of what the loading warps leave."""
        warps = self.num_warps * self.consumers
        return min(240, (self.max_registers * (warps + 4) - 24 * 4) // warps // 8 * 8)

    def to_list(self) -> list[int]:
        """Return the fields as integers, as an operator's schema wants them."""
        return [int(value) for value in astuple(self)]

    @staticmethod
    def from_list(values: list[int]) -> "DecodeConfig":
        """Return the configuration that `to_list` gave `values` for."""
        return DecodeConfig(*values)

    def row_blocks(self, rows: int) -> int:
        """Number of programs that the query rows of one latent are cut into."""
        return -(-rows // self.block_m)

    def num_programs(self, rows: int, num_latents: int, sm_count: int) -> int:
        """Number of token ranges: the programs of one wave, shared by latents and row blocks."""
        columns = self.row_blocks(rows) * num_latents
        return max(1, sm_count * self.programs_per_sm // columns)


def _choices(allowed: range | tuple[int, ...]) -> str:
    if isinstance(allowed, range):
        return f"an integer from {allowed[0]} to {allowed[-1]}"
    return f"one of {allowed}"


def default_config(
    rows: int, latent_dim: int, element_size: int, page_size: int, hopper: bool
) -> DecodeConfig:
    """Return the configuration for `rows` = q_len * heads_per_latent query rows.

    `element_size` is the size of a cached latent element in bytes: 1 (FP8), 2 or 4; `hopper` says
    whether the device is a Hopper GPU. The Hopper kernel takes FP8 and 16-bit caches whose pages
    hold whole tiles of 64 tokens; the portable kernel takes all others.
    """
    if hopper and element_size <= 2 and page_size % 64 == 0:
        fp8 = element_size == 1
        if latent_dim > 256:
            return DecodeConfig(64, 64, 8, 2, 1, hopper=True)
        if latent_dim > 128:
            return DecodeConfig(64, 64, 4, 3, 1, hopper=True)
        if fp8:
            return DecodeConfig(64, 64, 4, 6, 1, hopper=True, consumers=2)
        # 136 registers leave room for programs of the combine kernel to wait on the same SM.
        return DecodeConfig(64, 64, 4, 4, 1, hopper=True, consumers=2, registers=136)
    block_m = min(64, max(16, 1 << (rows - 1).bit_length()))
    if latent_dim > 128:
        return DecodeConfig(block_m, 64 if latent_dim <= 256 else 32, 8, 3, 1)
    return DecodeConfig(block_m, 64, 4, 3, 2)


@dataclass(frozen=True)
class CombineConfig:
    """How one launch of the combine kernel is cut."""

    rows: int
    """Query rows that a program merges."""
    parts: int
    """Parts that a program loads at once."""
    columns: int
    """Columns of the latent dim that a program merges."""

    def to_list(self) -> list[int]:
        """Return the fields, as an operator's schema wants them."""
        return [self.rows, self.parts, self.columns]


def combine_config(num_programs: int, batch: int, latent_dim: int) -> CombineConfig:
    """Return the configuration that loads the usual number of parts per sequence at once."""
    usual_parts = max(1, num_programs // max(batch, 1))
    parts = min(512, max(2, 1 << (usual_parts - 1).bit_length()))
    # One sequence has few rows and many parts per row. With about one part per sequence there is
    # little to merge: use as few programs as possible, as most only find that nothing is to do.
    numbers = 8192 if batch == 1 or usual_parts == 1 else 2048
    columns = min(latent_dim, max(16, numbers // parts))
    rows = max(1, min(16 if usual_parts == 1 else 8, numbers // (parts * columns)))
    return CombineConfig(rows, parts, columns)
