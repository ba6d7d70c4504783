"""The attentions MLRA is compared with: GTA, MFA, TPA (MHA, MQA and GQA are Megatron's)."""
