"""Command line of `mlra serve`: a run, checkpoint or exported folder behind vLLM's HTTP server."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mlra.checkpoint.files.tracker import a_checkpoint
from megatron_mlra.command_line.early import a_file, a_folder, byte_or_there, no_check, reads
from megatron_mlra.command_line.numbers import real, whole
from megatron_mlra.command_line.parser import (
    OneLineParser,
    add_no_verify,
    check_writable,
    fail,
    flag,
)
from megatron_mlra.command_line.signals import Interrupted, interruptible
from megatron_mlra.serving.environment import find_python
from megatron_mlra.serving.passed_on import check_passed_on, is_local
from megatron_mlra.serving.server import check_port, last_error, running, wait_until_healthy

if TYPE_CHECKING:
    from megatron_mlra.checkpoint.folder import CheckpointFolder

SOURCE = "a run, a checkpoint or an exported folder"
ROOT = Path(__file__).parents[2]
"""The checkout, if this package is installed from one."""


def parser() -> OneLineParser:
    """The flags."""
    p = OneLineParser(
        prog="mlra serve",
        passes_on=True,
        description="Serve a model over HTTP by vLLM: OpenAI's interface at /v1, a page to talk to"
        " the model at /chat. A run or checkpoint is exported first, once.",
        epilog="Everything behind -- goes to vLLM: mlra serve runs/my --port 8001 --"
        " --max-num-seqs 64",
    )
    source = p.add_argument(
        "source", help="exported folder, --save folder of a run, or its iter_* folder"
    )
    reads(source, partial(a_checkpoint, what=SOURCE))
    host = p.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; default: 127.0.0.1, for this machine alone",
    )
    p.add_argument("--port", type=int, default=8000, help="port to listen at; default: 8000")
    name = p.add_argument(
        "--name", help="the model's name in requests; default: that of the source's folder"
    )
    p.add_argument(
        "--tensor-parallel-size", "--tp", type=whole(1), default=1, help="GPUs that share the model"
    )
    p.add_argument("--max-model-len", type=whole(1), help="longest sequence; default: the model's")
    cache = p.add_argument(
        "--kv-cache-dtype",
        help="of the KV cache: fp8 takes some 0.6 of a latent cache; default: the weights'",
    )
    dtype = p.add_argument(
        "--dtype", help="of weights and activations, as vLLM names them; default: as exported"
    )
    p.add_argument(
        "--speculate", action="store_true",
        help="guess a token per step by the model's layer of multi-token prediction",
    )  # fmt: skip
    export = p.add_argument(
        "--export-to", metavar="FOLDER", help="where to export; default: SOURCE/exported/STEP"
    )
    tokenizer = p.add_argument(
        "--tokenizer", help="tokenizer to export with: byte, or a folder; default: the source's"
    )
    reads(tokenizer, byte_or_there)
    template = p.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template of chats that the model was trained with",
    )
    reads(template, a_file)
    p.add_argument(
        "--vocab-size", type=whole(1), help="true vocabulary, if a Megatron folder does not say it"
    )
    python = p.add_argument(
        "--python", help="Python of the environment with vLLM; default: $MLRA_VLLM or .venv-vllm"
    )
    p.add_argument(
        "--start-timeout",
        type=real(above=0),
        default=1800,
        help="seconds to wait for vLLM; default: 1800",
    )
    add_no_verify(p)
    for action in (host, name, cache, dtype, export, python):
        reads(action, no_check)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit code (2: refused; 1: vLLM failed; 128 + the number of
    a signal)."""
    words = list(sys.argv[1:] if argv is None else argv)
    own = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:own])
    args.vllm = words[own + 1 :]
    try:
        with interruptible():
            return _serve(args)
    except Interrupted as error:
        print("stopped", file=sys.stderr)
        return 128 + error.number
    except (ValueError, OSError, ImportError) as error:
        return fail(str(error), 2)


def _serve(args: argparse.Namespace) -> int:
    source = Path(args.source)
    a_folder(source, "source", SOURCE)
    check_passed_on(args.vllm)
    template = None
    if args.chat_template is not None:
        from megatron_mlra.checkpoint.huggingface.chat_template import read_template

        template = read_template(args.chat_template)
    check_port(args.host, args.port)
    checkpoint = opened(args, source)
    python = find_python(args.python, [Path.cwd(), ROOT])
    name = args.name or re.sub(r"[^\w.+-]", "_", source.resolve().name).lstrip("-") or "model"
    with tempfile.TemporaryDirectory(prefix="mlra-serve-") as folder:
        if template is not None:
            # The export and vLLM read it again, and the file may be a pipe of this process.
            args.chat_template = f"{folder}/chat_template.jinja"
            Path(args.chat_template).write_text(template, encoding="utf-8")
        model = exported(args, source, checkpoint)
        tokenizer = (model / "tokenizer.json").is_file()
        chat = tokenizer and _has_chat(args, model)
        if not tokenizer and args.chat_template is not None:
            raise ValueError(
                f"--chat-template needs a tokenizer, and {model} has no tokenizer.json; leave it"
                " out, or export with --tokenizer"
            )
        if not tokenizer:
            print(f"{model} has no tokenizer.json: prompts are lists of token ids", flush=True)
        log = Path(folder) / "vllm.log"
        print(f"starting vLLM (minutes the first time); its log: {log}", flush=True)
        with (
            log.open("w") as stream,
            running(_command(args, python, model, name, tokenizer), stream) as process,
        ):
            host = "127.0.0.1" if args.host == "0.0.0.0" else args.host
            host = "::1" if host == "::" else host
            try:
                wait_until_healthy(process, host, args.port, args.start_timeout)
                _say(args, host, name, chat, tokenizer)
                code = process.wait()
                problem = f"vLLM ended with exit code {code}"
            except RuntimeError as error:
                problem = str(error)
        said = last_error(log)
        kept = _keep(log)
    place = " (flags that mlra serve has not go behind --)" if said and "--" in said else ""
    return fail(f"{problem}{f': {said}' if said else ''}{place}; its log is {kept}", 1)


def _keep(log: Path) -> Path:
    """Copy the log to a file that is not deleted; returns the file."""
    with tempfile.NamedTemporaryFile(
        "wb", prefix="mlra-serve-", suffix=".log", delete=False
    ) as kept:
        kept.write(log.read_bytes())
    return Path(kept.name)


def opened(args: argparse.Namespace, source: Path) -> CheckpointFolder:
    """The source, if vLLM serves models like its own. Its weights are not read.

    Raises:
        ValueError: the source is damaged, vLLM's plugin does not take its sizes, or a flag would
            have no effect.
    """
    from megatron_mlra.checkpoint.formats import open_checkpoint
    from megatron_mlra.checkpoint.huggingface.card import unserved

    checkpoint = open_checkpoint(source, args.vocab_size, verify=args.verify)
    if checkpoint.kind == "huggingface":
        for name in ("tokenizer", "export_to", "vocab_size"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{source} is exported already: {flag(name)} is for runs and checkpoints;"
                    " leave it out"
                )
    _check_flags(args, checkpoint)
    model = checkpoint.description
    if model.attention == "mlra" and (reason := unserved(model)):
        raise ValueError(
            f"vLLM does not serve {source}: {reason}; use mlra generate, or train a model of other"
            " sizes (--kv-lora-rank: all latents together; --qk-rope-head-dim: the RoPE key)"
        )
    return checkpoint


def exported(args: argparse.Namespace, source: Path, checkpoint: CheckpointFolder) -> Path:
    """The folder that vLLM opens: the source itself, or its export, which is written if missing.

    Args:
        checkpoint: the source, opened.

    Raises:
        ValueError: the source is damaged, a link leads out of it, the export belongs to another
            model, or a flag would have no effect.
    """
    from megatron_mlra.checkpoint.huggingface.folder import write_huggingface

    if checkpoint.kind == "huggingface":
        _check_whole(checkpoint)
        return source
    step = checkpoint.folder.absolute().name
    target = _own_export(source, step) if args.export_to is None else Path(args.export_to)
    if target.exists():
        _check_export(args, target, checkpoint)
        print(f"serving {target}, exported before; remove it to export again", flush=True)
        return target
    if args.export_to is None:
        try:
            check_writable(target, str(target))
        except ValueError as error:
            raise ValueError(f"{error} (--export-to FOLDER)") from None
    problem = write_huggingface(
        checkpoint,
        target,
        tokenizer=args.tokenizer,
        chat_template=args.chat_template,
        progress=sys.stderr.isatty(),
    )
    print(f"exported {source} to {target}" + (f"; {problem}" if problem else ""), flush=True)
    return target


def _own_export(source: Path, step: str) -> Path:
    """The folder of a source's export, inside the source.

    Raises:
        ValueError: a link in the source leads elsewhere.
    """
    from megatron_mlra.checkpoint.files.inside import inside

    try:
        return inside(source, f"exported/{step}")
    except ValueError as error:
        raise ValueError(f"{error}, or name the export's folder by --export-to") from None


def _check_export(args: argparse.Namespace, target: Path, checkpoint: CheckpointFolder) -> None:
    """Check that an existing folder is the complete export of a checkpoint.

    Raises:
        ValueError: the folder is damaged or another model's, or a flag would have no effect.
    """
    from megatron_mlra.checkpoint.files import manifest
    from megatron_mlra.checkpoint.formats import open_checkpoint
    from megatron_mlra.description.tensors import expected_tensors

    again = f"remove {target} to export again, or leave it out"
    if args.tokenizer is not None:
        raise ValueError(f"--tokenizer {args.tokenizer}: {target} was exported before; {again}")
    if not (target / "config.json").is_file():
        where = "" if args.export_to is None else f"--export-to {args.export_to}: "
        raise ValueError(f"{where}{target} is there, and is no export; move it, or name another")
    there = open_checkpoint(target, verify=args.verify)
    size = there.description.vocab_size
    if args.vocab_size not in (None, size):
        raise ValueError(
            f"--vocab-size {args.vocab_size}: {target} was exported before, with {size}; {again}"
        )
    ours, theirs = checkpoint.description, there.description
    if ours.attention == "gqa":
        ours = ours.decoder()  # as Llama's exports are
    same = expected_tensors(theirs) == expected_tensors(ours)
    if there.kind != "huggingface" or not same:
        raise ValueError(
            f"{target} is no export of {checkpoint.path}: it holds another model; remove it to"
            " export again, or give it as the source"
        )
    own = manifest.identity(checkpoint.folder)
    if args.verify and None not in (own, known := manifest.made_from(target)) and own != known:
        raise ValueError(
            f"{target} is no export of {checkpoint.path}: it was made from a checkpoint of other"
            f" numbers; remove {target} to export again, or serve it with --no-verify"
        )
    _check_whole(there)


def _check_flags(args: argparse.Namespace, folder: CheckpointFolder) -> None:
    """Refuse --speculate where the model, as vLLM gets it, has no layer that guesses, and a number
    of GPUs that cannot share its heads: vLLM would refuse it behind the export and its start."""
    model, tp = folder.description, args.tensor_parallel_size
    if (heads := model.num_attention_heads) % tp:
        fit = ", ".join(str(n) for n in range(1, min(heads, 128) + 1) if heads % n == 0)
        raise ValueError(
            f"--tensor-parallel-size {tp} cannot share the {heads} heads of {folder.path}; use one"
            f" of {fit}"
        )
    if args.speculate and not (model.mtp_num_layers and model.attention == "mlra"):
        raise ValueError(
            f"--speculate needs a layer of multi-token prediction, and {folder.path} has none"
            f" that vLLM gets ({model.variant}); leave it out"
        )


def _check_whole(folder: CheckpointFolder) -> None:
    """Read an exported folder completely and compare its checksums, which vLLM does not."""
    folder.tokenizer_files()
    folder.check_finite()


def _has_chat(args: argparse.Namespace, model: Path) -> bool:
    from megatron_mlra.checkpoint.huggingface.tokenizer import has_chat_template

    return args.chat_template is not None or has_chat_template(model)


def _command(
    args: argparse.Namespace, python: str, model: Path, name: str, tokenizer: bool
) -> list[str]:
    """The command of vLLM's server. It refuses requests from other sites' scripts, and at a local
    host also requests with another host name."""
    page = "LocalChatPage" if is_local(args.host) else "ChatPage"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.resolve())]
    command += ["--served-model-name", name, "--host", args.host, "--port", str(args.port)]
    command += ["--allowed-origins", "[]", "--middleware", f"mlra_vllm.chat.{page}"]
    command += ["--tensor-parallel-size", str(args.tensor_parallel_size)]
    for option in ("max_model_len", "kv_cache_dtype", "dtype"):
        if (value := getattr(args, option)) is not None:
            command += [flag(option), str(value)]
    if args.chat_template is not None:
        command += ["--chat-template", str(Path(args.chat_template).resolve())]
    if args.speculate:
        drafter = {"method": "eagle", "model": str(model.resolve()), "num_speculative_tokens": 1}
        command += ["--speculative-config", json.dumps(drafter)]
    if not tokenizer:
        command.append("--skip-tokenizer-init")
    return [*command, *args.vllm]


def _say(args: argparse.Namespace, host: str, name: str, chat: bool, tokenizer: bool) -> None:
    """Print the address and an example request."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
    body = {"model": name, "max_tokens": 50}
    if chat:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    elif tokenizer:
        body["prompt"] = "Once upon a time"
    else:
        body |= {"prompt": [1, 2, 3], "return_token_ids": True}  # the answer has no text
    path = "chat/completions" if chat else "completions"
    lines = [f"{name} is served at {url}/v1"]
    if tokenizer:
        lines.append(f"a page to talk to it: {url}/chat")
    said = shlex.quote(json.dumps(body))  # a name may hold a quote
    lines.append(f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {said}")
    if not is_local(args.host):
        lines.append("whoever reaches this address may use it; -- --api-key KEY asks for a key")
    print("\n".join((*lines, "Ctrl-C ends it")), flush=True)
