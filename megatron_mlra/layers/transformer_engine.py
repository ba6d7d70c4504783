"""Transformer Engine's linear in the role of LatentColumnParallelLinear; imported only where it
exists."""

from __future__ import annotations

import copy
from collections.abc import Callable

from megatron.core.extensions.transformer_engine import TELinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor


class TELatentColumnParallelLinear(TELinear):
    """Column-parallel te.Linear that leaves its input's communication to LatentParallel.

    Transformer Engine sees a linear of this rank's rows without a tensor-parallel group, in
    "column" mode so that its weight is marked tensor-parallel and drawn from the rank's own random
    state.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        init_method: Callable[[Tensor], None],
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_group,
        name: str | None = None,
    ) -> None:
        assert not gather_output and not bias and not is_expert
        config = copy.copy(config)
        # Its user buffers overlap a communication that this linear does not do.
        config.tp_comm_overlap = False
        super().__init__(
            input_size,
            divide(output_size, tp_group.size()),
            parallel_mode="column",
            config=config,
            init_method=init_method,
            bias=False,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=False,
            tp_group=None,
            name=name,
        )
        self._tp_group = tp_group

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """`weight`, rows split over the tensor-parallel group."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
