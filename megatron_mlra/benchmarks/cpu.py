"""Training speed on the CPU: mlra pretrain against a plain torch loop of the same model.

Both run on the same threads in float32, with the same batch, attention core and torch AdamW. They
take turns, so that both are measured under the same load. Letters: b batch, s tokens, d hidden
size, h heads, n branches, g head groups, l latent dim.
"""

# ruff: noqa: E402  (`wait_passively` must run before torch is imported)

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from megatron_mlra.command_line.threads import wait_passively

wait_passively()

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mlra.benchmarks.commit import commit
from megatron_mlra.benchmarks.flags import measured, parser
from megatron_mlra.command_line.log_line import logged_steps
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.presets import find_preset, preset_name

TURNS = 3
"""Number of turns of each program."""


class Attention(nn.Module):
    """MLRA on `[b, s, d]`, absorbed or materialized, by torch's scaled_dot_product_attention."""

    def __init__(self, shape: ModelDescription, eps: float, rotary_base: float) -> None:
        super().__init__()
        self.shape, self.eps = shape, eps
        d, d_q, l = shape.hidden_size, shape.q_lora_rank, shape.latent_dim
        h, v = shape.num_attention_heads, shape.v_head_dim
        nope, rope = shape.qk_nope_head_dim, shape.qk_rope_head_dim
        self.q_down, self.q_norm = nn.Linear(d, d_q, bias=False), nn.RMSNorm(d_q, eps)
        self.q_up = nn.Linear(d_q, h * (nope + rope), bias=False)
        self.kv_down = nn.Linear(d, shape.kv_lora_rank + rope, bias=False)
        self.kv_norm = nn.Parameter(torch.ones(shape.num_latent_heads, l))
        self.kv_up = nn.Parameter(torch.empty(shape.num_branches, h, nope + v, l))
        self.out = nn.Linear(h * v, d, bias=False)
        self.q_scale, self.kv_scale = (d / d_q) ** 0.5, (d / l) ** 0.5
        frequency = rotary_base ** -(torch.arange(0, rope, 2) / rope)
        angle = torch.arange(shape.seq_length)[:, None, None] * frequency  # [s, 1, d_r / 2]
        self.cos, self.sin = angle.cos(), angle.sin()

    def rotate(self, x: Tensor) -> Tensor:
        """Half-split RoPE of `[b, s, heads, d_r]`."""
        (x, y), cos, sin = x.chunk(2, dim=-1), self.cos, self.sin
        return torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        shape, (b, s, _) = self.shape, x.shape
        L, n, h = shape.num_latent_heads, shape.num_branches, shape.num_attention_heads
        nope, rope = shape.qk_nope_head_dim, shape.qk_rope_head_dim
        q = self.q_up(self.q_norm(self.q_down(x)) * self.q_scale).view(b, s, h, nope + rope)
        q, q_rope = q.split((nope, rope), dim=-1)
        q_rope = self.rotate(q_rope).unsqueeze(2).expand(-1, -1, n, -1, -1)
        c, k_rope = self.kv_down(x).split((shape.kv_lora_rank, rope), dim=-1)
        c = F.rms_norm(c.unflatten(-1, (L, -1)), (shape.latent_dim,), eps=self.eps)
        c = c * (self.kv_norm * self.kv_scale)  # [b, s, n * g, l]
        k_rope = self.rotate(k_rope.unsqueeze(2))  # [b, s, 1, d_r]
        w_uk, w_uv = self.kv_up.split((nope, shape.v_head_dim), dim=2)
        if shape.absorbed:
            q = torch.einsum("bshd,nhdl->bsnhl", q, w_uk)
            key = value = c
        else:
            q = q.unsqueeze(2).expand(-1, -1, n, -1, -1)
            up = self.kv_up.unflatten(1, (L // n, -1))  # [n, g, h / g, d_h + d_v, l]
            kv = torch.einsum("bsngl,ngjel->bsngje", c.unflatten(2, (n, -1)), up).flatten(2, 4)
            key, value = kv.split((nope, shape.v_head_dim), dim=-1)
        key = torch.cat((key, k_rope.expand(-1, -1, key.size(2), -1)), dim=-1)
        qkv = (torch.cat((q, q_rope), dim=-1).flatten(2, 3), key, value)
        # Padded and repeated as core_attention.py does on a CPU.
        d_v, width = value.size(-1), max(key.size(-1), value.size(-1))
        q, k, v = (F.pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x in qkv)
        k, v = (x.repeat_interleave(n * h // key.size(2), dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(nope + rope) ** -0.5)
        z = z[..., :d_v].transpose(1, 2).unflatten(2, (n, h))  # [b, s, n, h, l or d_v]
        out = torch.einsum("bsnhl,nhvl->bshv", z, w_uv) if shape.absorbed else z.sum(2)
        return self.out((out * n**-0.5).flatten(2))


class Layer(nn.Module):
    """Attention and a SwiGLU MLP, each after an RMSNorm and with a residual."""

    def __init__(self, shape: ModelDescription, eps: float, rotary_base: float) -> None:
        super().__init__()
        d, f = shape.hidden_size, shape.ffn_hidden_size
        self.norm1, self.norm2 = nn.RMSNorm(d, eps), nn.RMSNorm(d, eps)
        self.attention = Attention(shape, eps, rotary_base)
        self.up, self.out = nn.Linear(d, 2 * f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.out(F.silu(gate) * up)


class Model(nn.Module):
    """Tokens `[b, s]` -> logits `[b, s, V]`; tied embeddings, output projections start at zero."""

    def __init__(self, shape: ModelDescription, eps: float, rotary_base: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.embedding_rows, shape.hidden_size)
        layers = (Layer(shape, eps, rotary_base) for _ in range(shape.num_layers))
        self.layers, self.norm = nn.Sequential(*layers), nn.RMSNorm(shape.hidden_size, eps)
        for name, weight in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(weight, std=0.0 if name.endswith("out.weight") else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.layers(self.embedding(tokens))), self.embedding.weight)


def plain_rates(model: Model, optimizer, preset: dict, steps: int) -> list[float]:
    """Tokens/s of each of `steps` training steps on random tokens.

    Args:
        preset: values of a preset.
    """
    b, s, rates = preset["global_batch_size"], preset["seq_length"], []
    for _ in range(steps):
        start = time.perf_counter()
        tokens = torch.randint(preset["vocab_size"], (b, s + 1))
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        rates.append(b * s / (time.perf_counter() - start))
    return rates


def megatron_rates(config: str | Path, steps: int) -> list[float]:
    """Tokens/s that `mlra pretrain` prints for `steps` steps, without its first step."""
    threads = str(torch.get_num_threads())
    env = os.environ | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    flags = f"--mock-data --train-iters {steps + 1} --lr-warmup-iters 0 --log-interval 1"
    command = [sys.executable, "-m", "megatron_mlra.training", "--config", config, *flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--eval-iters", "0", "--tensorboard-dir", f"{folder}/tensorboard"]
        run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    found = [told.tokens_per_second for told in logged_steps(run.stdout) if told.tokens_per_second]
    if run.returncode or len(found) != steps:
        sys.exit(f"error: the training entry failed\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return [float(rate) for rate in found]


def machine() -> dict:
    """Version, CPU, threads and commit, on which timings depend."""
    info = Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"model name\s*: (.*)", info.read_text())
    cpu, threads = found[1] if found else "unknown", torch.get_num_threads()
    return {"torch": torch.__version__, "cpu": cpu, "threads": threads, "commit": commit()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, then print a table and one line of JSON."""
    flags = parser()
    args = flags.parse_args(argv)
    try:
        preset = measured(args.config)
        shape = from_megatron_args(preset)
    except ValueError as error:
        flags.error(str(error))
    model = Model(shape, preset["norm_epsilon"], preset["rotary_base"])
    count, expected = sum(p.numel() for p in model.parameters()), parameters(shape).total
    if count != expected:
        sys.exit(f"error: the plain model has {count:,} parameters, {args.config} {expected:,}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset["lr"])
    megatron, plain, ratios, per_turn = [], [], [], -(-args.steps // TURNS)
    count_steps, preset_file = args.warmup + per_turn, find_preset(args.config).resolve()
    print(f"{TURNS} turns of {count_steps} steps each way, which takes minutes", file=sys.stderr)
    with bar(desc="measuring", total=2 * TURNS, unit="runs", every=10) as shown:
        for _ in range(TURNS):
            shown.set_description("mlra pretrain")
            megatron += megatron_rates(preset_file, count_steps)[args.warmup :]
            shown.update()
            shown.set_description("plain torch")
            plain += plain_rates(model, optimizer, preset, count_steps)[args.warmup :]
            shown.update()
            ratios.append(round(median(megatron[-per_turn:]) / median(plain[-per_turn:]), 3))
    fast, base = median(megatron), median(plain)
    result = {
        "config": preset_name(args.config),
        "parameters": count,
        "steps": len(plain),
    } | machine()
    result |= {"pretrain_mlra": round(fast), "plain_torch": round(base), "turn_ratios": ratios}
    result["ratio"] = round(fast / base, 3)
    for name, value in result.items():
        print(f"{name:14} {value}{' tokens/s' if name in ('pretrain_mlra', 'plain_torch') else ''}")
    print(json.dumps(result))
