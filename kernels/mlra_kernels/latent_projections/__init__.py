"""Training in latent space: the operations around the core, each with one read and one write."""

from mlra_kernels.latent_projections.ops import join_keys, rms_norm, rotate_absorb, sum_branches

__all__ = ["join_keys", "rms_norm", "rotate_absorb", "sum_branches"]
