"""Multi-token prediction as DeepSeek-V3 defines it (arXiv 2412.19437, section 2.2).

Each depth reads a sequence one token shorter than the depth before, document by document. Megatron
shifts and masks instead.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from support.samples import BATCH, SEQ, global_batch
from support.tiny import Tiny


def expected_gradients(tiny: Tiny, seed: int) -> dict[str, Tensor]:
    """Global name -> gradient of the main loss plus all depths' losses, in a world of one rank."""
    model = tiny.chunks[0].module
    bounds = tiny.packing.bounds if tiny.packing else (0, SEQ)
    loss = sum(_loss(model, row, bounds) for row in global_batch(seed)) / BATCH
    weights = list(model.parameters())
    found = torch.autograd.grad(loss, weights)
    gradients = {id(weight): grad for weight, grad in zip(weights, found, strict=True)}
    return tiny.assemble(lambda weight: gradients[id(weight)])


def _loss(model, row: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """The loss of one sequence and its next token, `[SEQ + 1]`."""
    config, weight = model.config, model.shared_embedding_or_output_weight()
    sums = torch.zeros(1 + config.mtp_num_layers)
    counts = torch.zeros(1 + config.mtp_num_layers)
    for start, stop in pairwise(bounds):
        embedded = weight[row[start:stop]][:, None]  # [s, 1, d]
        hidden = model.decoder(hidden_states=embedded, attention_mask=None)
        labels = row[start + 1 : stop + 1]
        for depth in range(1 + config.mtp_num_layers):
            if depth:
                layer = model.mtp.layers[depth - 1]
                joined = [layer.enorm(embedded[depth:]), layer.hnorm(hidden[:-1])]
                hidden = torch.cat(joined, -1) @ layer.eh_proj.weight.T
                if not len(hidden):
                    break
                hidden, _ = layer.mtp_model_layer(hidden_states=hidden, attention_mask=None)
                hidden = layer.final_layernorm(hidden)
            logits = (hidden[:, 0] @ weight.T).log_softmax(-1)
            own = labels[depth:]
            sums[depth] -= logits[torch.arange(len(own)), own].sum()
            counts[depth] += len(own)
    main, *ahead = sums / counts
    return main + config.mtp_loss_scaling_factor * sum(ahead) / len(ahead)
