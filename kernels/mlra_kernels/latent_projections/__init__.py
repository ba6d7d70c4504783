"""Training in latent space: the passes around the core attention, each one read and one write."""

from mlra_kernels.latent_projections.ops import join_keys, rms_norm, rotate_absorb, sum_branches

__all__ = ["join_keys", "rms_norm", "rotate_absorb", "sum_branches"]
