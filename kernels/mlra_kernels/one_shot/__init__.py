"""The sum over ranks behind a row-parallel product, fused with the residual add and RMSNorm."""

from mlra_kernels.one_shot.join import NoPeers, join_peers
from mlra_kernels.one_shot.ops import all_reduce_add_rms_norm
from mlra_kernels.one_shot.peers import Peers

__all__ = ["NoPeers", "Peers", "all_reduce_add_rms_norm", "join_peers"]
