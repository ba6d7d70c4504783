"""The MLP: vLLM's, of a size that every rank can multiply by at full speed.

Letters: d hidden size, f MLP size, f' the padded one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.functional import pad
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader

from mlra_vllm.products import use_by
from mlra_vllm.shard import padded_mlp_size


class PaddedMLP(LlamaMLP):
    """SwiGLU whose f is padded with zeros, which add nothing: see `padded_mlp_size`."""

    def __init__(self, d: int, f: int, prefix: str, reduce_results: bool = True) -> None:
        padded = padded_mlp_size(f, get_tensor_model_parallel_world_size())
        super().__init__(d, padded, "silu", prefix=prefix, reduce_results=reduce_results)
        self.size, self.padding, self.prefix = f, padded - f, prefix
        use_by(get_current_vllm_config(), self.gate_up_proj, self.down_proj)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load gate and up `[f, d]` and down `[d, f]`, padded.

        Returns:
            The names of the loaded parameters.

        Raises:
            ValueError: a tensor's f is not that of config.json.
        """
        return AutoWeightsLoader(self).load_weights(
            (name, self._padded(name, tensor)) for name, tensor in weights
        )

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        dim = 1 if name.startswith("down_proj") else 0
        if tensor.size(dim) != self.size:
            raise ValueError(
                f"{self.prefix}: {name} is {tuple(tensor.shape)} and config.json makes its dim"
                f" {dim} {self.size}"
            )
        if not self.padding:
            return tensor
        whole = pad(tensor, (0, self.padding) if dim else (0, 0, 0, self.padding))
        if (part := getattr(tensor, "shard_id", None)) is not None:
            whole.shard_id = part  # vLLM's mark of gate or up
        return whole
