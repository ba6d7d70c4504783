"""Runs vLLM engines, one after another in one process: `python -m support.drivers.vllm_engine
FOLDER` in vLLM's environment. Reads FOLDER/jobs.json, writes FOLDER/results.json.

A job: `{"name", "model", "options": arguments of LLM, "batches": [[prompt, ...], ...], "new",
"scores", "page_bytes"}`. The prompts of a batch are generated together, greedily. The result holds
tokens, log-probabilities, the scheduler's tokens per step, and the number of preemptions.
`page_bytes` lists tensor parallel sizes: for each, the result holds the bytes per page of a layer
that one rank asks of vLLM. The result of a job that vLLM refuses holds only `error`.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "seed": 0,
    "kv_cache_memory_bytes": 24 << 20,
    "max_num_seqs": 8,
    "disable_log_stats": True,
    "enable_prefix_caching": False,
    "enforce_eager": True,
}


class Watch:
    """Records the decisions of an engine's scheduler in this process."""

    def __init__(self, llm: Any) -> None:
        self.steps: list[dict[str, int]] = []
        self.preempted = 0
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            step = schedule(*args, **kwargs)
            self.steps.append(dict(step.num_scheduled_tokens))
            self.preempted += len(step.preempted_req_ids or ())
            return step

        scheduler.schedule = watched

    def report(self) -> dict[str, Any]:
        """What has happened since the last report."""
        steps = [list(step.values()) for step in self.steps if step]
        found = {"steps": steps, "preempted": self.preempted}
        self.steps, self.preempted = [], 0
        return found


def run(job: dict[str, Any], watched: bool) -> dict[str, Any]:
    """One engine and its batches."""
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    try:
        llm = LLM(job["model"], **DEFAULTS | job.get("options", {}))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    watch = Watch(llm) if watched else None
    params = SamplingParams(
        temperature=0,
        max_tokens=job["new"],
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0 if job.get("scores") else None,
    )
    layer = _latent_layer(llm) if watched else None
    found: dict[str, Any] = {"started_s": time.monotonic() - began, "batches": []}
    found["max_model_len"] = llm.llm_engine.vllm_config.model_config.max_model_len
    if (runner := _runner(llm) if watched else None) is not None:
        manager = getattr(runner, "cudagraph_manager", None)
        config = llm.llm_engine.vllm_config.compilation_config
        found["graphs"] = getattr(manager or config, "cudagraph_mode", config.cudagraph_mode).name
    if layer is not None:
        found |= {"row_bytes": layer.row_bytes}
        found["page_bytes"] = [_page_bytes(llm, tp) for tp in job.get("page_bytes", ())]
    for batch in job["batches"]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in batch], params, use_tqdm=False
        )
        found["batches"].append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "log_probs": [_log_probs(output) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
                **(watch.report() if watch else {}),
            }
        )
    # Otherwise workers of other ranks stay, with a gigabyte of memory each.
    llm.llm_engine.engine_core.shutdown()
    found["took_s"] = time.monotonic() - began
    return found


def _latent_layer(llm: Any) -> Any:
    """The first attention layer of this project; None for other models."""
    config = llm.llm_engine.vllm_config.compilation_config
    for layer in config.static_forward_context.values():
        if type(layer).__name__ == "LatentAttention":
            return layer
    return None


def _runner(llm: Any) -> Any:
    """vLLM's model runner in this process."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return getattr(executor.driver_worker.worker, "model_runner", None)


def _page_bytes(llm: Any, tp: int) -> int:
    """Bytes per page of a layer on the last of `tp` ranks."""
    from mlra_vllm.layer import LatentAttention
    from mlra_vllm.rope import rotary_tables
    from mlra_vllm.shard import plan

    vllm_config = llm.llm_engine.vllm_config
    config = vllm_config.model_config.hf_config
    shard = plan(
        config.num_attention_heads, config.num_latent_heads, config.num_branches, tp, tp - 1
    )
    layer = LatentAttention(vllm_config, shard, rotary_tables(config, 8), f"of {tp}", False)
    return layer.get_kv_cache_spec(vllm_config).page_size_bytes


def _log_probs(output: Any) -> list[float]:
    """Log-probabilities of the prompt's tokens (from the second) and the continuation's tokens, if
    present."""
    prompt = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
    new = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    return [found[token].logprob for token, found in (*prompt, *new) if found]


def main() -> None:
    """See the module."""
    folder = Path(sys.argv[1])
    results = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        # The scheduler is in this process unless tensor parallelism starts other processes.
        watched = job.get("options", {}).get("tensor_parallel_size", 1) == 1
        results[job["name"]] = run(job, watched)
        print(job["name"], json.dumps(results[job["name"]])[:150], flush=True)
        gc.collect()
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
