"""What `mlra serve` does without vLLM: refusals, processes and their ends."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.command_line.commands import COMMANDS
from megatron_mlra.launch.ports import reserve_port
from megatron_mlra.serving import cli
from megatron_mlra.serving.cli import main
from megatron_mlra.serving.server import last_error, running, wait_until_healthy
from support.random_checkpoint import RandomFolder, grouped, latent
from support.runs import wait_for_end

SERVED = latent(4, 4, kv_lora_rank=256, qk_rope_head_dim=32)
"""A model of sizes that vLLM's plugin takes."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported folder."""
    folder = tmp_path_factory.mktemp("models") / "my"
    write_huggingface(RandomFolder(SERVED), folder, tokenizer="byte", progress=False)
    return folder


@pytest.fixture
def port():
    """A port that nobody listens at."""
    with reserve_port() as kept:
        yield kept.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is not a folder; give a run, a checkpoint or an exported folder"),
        (["{my}", "--port", "70000"], "--port 70000 is no port; use 1 to 65535"),
        (["{my}", "--port", "0"], "--port 0 is no port; use 1 to 65535"),
        (["{my}", "--host", "192.0.2.1"], "(Cannot assign requested address); use another --host"),
        (["{my}", "--host", "nowhere.invalid"], "port 8000 of nowhere.invalid cannot be used"),
        (["{my}", "--host", "ä" * 64], "is no host's name; use another"),
        (["{my}", "--", "--port=9000"], "--port behind --: use --port in front of --"),
        (["{my}", "--", "--served_model_name", "a"], "behind --: use --name in front of --"),
        (["{my}", "--", "--ssl-keyf", "a"], "--ssl-keyf behind --: mlra serve speaks HTTP"),
        (["{my}", "--chat-template", "{my}/none"], "{my}/none: No such file or directory"),
        (["{my}", "--python", "{my}"], "--python {my} is no Python with vLLM and this project's"),
        (["{my}", "--python", sys.executable], "make one: python3 -m venv .venv-vllm &&"),
    ],
)
def test_refusals(words, said, exported, port, capsys):
    words = [word.format(my=exported) for word in words]
    if "--port" not in words and "--host" not in words:
        words += ["--port", str(port)]
    assert main(words) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("error: ") and out.err.count("\n") == 1
    assert said.format(my=exported) in out.err


def test_a_flag_of_vllm_is_told_its_place(exported, capsys):
    with pytest.raises(SystemExit):
        main([str(exported), "--max-num-seqs", "4"])
    said = "error: unknown flag --max-num-seqs; flags of the program that is started go behind --\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["host", "name", "dtype", "kv-cache-dtype", "export-to", "python"])
def test_a_variable_that_is_not_set_is_no_value(name, exported, capsys):
    """`--host ""` listened to the whole network, `--export-to ""` took the working directory."""
    assert COMMANDS["serve"].run([str(exported), f"--{name}", ""]) == 2
    assert f"error: --{name} is given an empty name" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path):
    """A checkpoint that was not exported."""
    write_megatron(RandomFolder(SERVED), tmp_path / "run", progress=False)
    return tmp_path / "run"


def served(source, *words):
    """The folder that vLLM would open."""
    args = cli.parser().parse_args([str(source), *words])
    return cli.exported(args, source, cli.opened(args, source))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"kv_lora_rank": 128}, "takes latents of 64, 128, 256, 512 numbers, not 32"),
        ({"qk_rope_head_dim": 16}, "takes RoPE keys of 32, 64 numbers, not 16"),
    ],
)
def test_a_model_that_the_plugin_does_not_take_is_refused_first(
    sizes, said, tmp_path, port, capsys
):
    """Before vLLM is looked for, which somebody would install, and before anything is exported."""
    run, hf = tmp_path / "run", tmp_path / "hf"
    small = RandomFolder(replace(SERVED, **sizes))
    write_megatron(small, run, progress=False)
    write_huggingface(small, hf, progress=False)
    for source in (run, hf):
        assert main([str(source), "--port", str(port), "--python", "nowhere"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: vLLM does not serve {source}: the plugin {said}; use mlra ")
        assert "--kv-lora-rank" in err and err.count("\n") == 1
    assert not (run / "exported").exists()


def test_a_chat_template_is_read_once(run, port, monkeypatch, capsys):
    """It may be a pipe, which neither the export nor vLLM could read again."""
    seen = []

    @contextlib.contextmanager
    def started(command, log):
        file = command[command.index("--chat-template") + 1]
        seen.append(Path(file).read_text())
        log.write("ValueError: decrease --gpu-memory-utilization\n")
        log.flush()
        yield None

    def ends(*_):
        raise RuntimeError("vLLM ended")

    monkeypatch.setattr(cli, "find_python", lambda *_: "python")
    monkeypatch.setattr(cli, "running", started)
    monkeypatch.setattr(cli, "wait_until_healthy", ends)
    read, write = os.pipe()
    os.write(write, b"{{ messages }}")
    os.close(write)
    words = [str(run), "--port", str(port), "--tokenizer", "byte"]
    code = main([*words, "--chat-template", f"/dev/fd/{read}"])
    os.close(read)
    err = capsys.readouterr().err
    assert code == 1 and "error: vLLM ended: ValueError: decrease --gpu-memory-utiliz" in err, err
    assert "(flags that mlra serve has not go behind --); its log is " in err
    template = (run / "exported" / "release" / "chat_template.jinja").read_text()
    assert [template, *seen] == ["{{ messages }}"] * 2


def test_a_chat_template_needs_a_tokenizer(exported, tmp_path, port, monkeypatch, capsys):
    copy, template = tmp_path / "copy", tmp_path / "template.jinja"
    shutil.copytree(exported, copy, ignore=shutil.ignore_patterns("tokenizer.json"))
    template.write_text("{{ messages }}")
    monkeypatch.setattr(cli, "find_python", lambda *_: "python")
    words = [str(copy), "--no-verify", "--port", str(port), "--chat-template", str(template)]
    assert main(words) == 2
    assert "--chat-template needs a tokenizer, and" in capsys.readouterr().err
    template.write_text("{{ messages")
    assert main(words) == 2
    assert "line 1: unexpected end of template" in capsys.readouterr().err


def test_guesses_need_a_layer_that_vllm_gets(run, exported, tmp_path):
    ahead = tmp_path / "ahead"
    write_megatron(RandomFolder(replace(SERVED, mtp_num_layers=1)), ahead, progress=False)
    folder = served(ahead, "--speculate", "--tokenizer", "byte")
    assert served(folder, "--speculate") == folder
    args = cli.parser().parse_args([str(ahead), "--speculate"])
    args.vllm = []
    command = cli._command(args, "python", folder, "my", True)
    drafter = json.loads(command[command.index("--speculative-config") + 1])
    assert drafter == {"method": "eagle", "model": str(folder), "num_speculative_tokens": 1}
    write_megatron(RandomFolder(grouped(2, mtp_num_layers=1)), tmp_path / "llama", progress=False)
    for source in (run, exported, tmp_path / "llama"):
        with pytest.raises(ValueError, match="--speculate needs a layer of multi-token prediction"):
            served(source, "--speculate")


def test_gpus_that_cannot_share_the_heads_are_refused_before_the_export(run, exported):
    heads = latent(4, 4).num_attention_heads
    for source in (run, exported):
        with pytest.raises(ValueError) as refused:
            served(source, "--tp", str(heads + 1))
        said = f"--tensor-parallel-size {heads + 1} cannot share the {heads} heads of {source}; use"
        assert str(refused.value).startswith(said)
        assert str(refused.value).endswith(f", {heads}")
    assert not (run / "exported").exists()


def spoil(folder):
    """Flip a bit of a folder's weights."""
    (weights,) = folder.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)


def test_an_export_is_served_again_if_it_is_whole_and_no_flag_is_ignored(run, exported, capsys):
    target = served(run, "--tokenizer", "byte")
    assert target == run / "exported" / "release"
    assert served(run) == served(run, "--vocab-size", "257") == target
    assert "exported before; remove it to export again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--tokenizer byte: .* was exported before; remove"):
        served(run, "--tokenizer", "byte")
    with pytest.raises(ValueError, match=r"--vocab-size 200: .* was exported before, with 257"):
        served(run, "--vocab-size", "200")
    other = RandomFolder(SERVED)
    other.tensor = lambda name: RandomFolder.tensor(other, name) * 2
    moved = run.parent / "moved"
    write_megatron(other, moved, progress=False)
    shutil.copytree(target, moved / "exported" / "release")
    with pytest.raises(ValueError, match="was made from a checkpoint of other numbers"):
        served(moved)
    assert served(moved, "--no-verify") == moved / "exported" / "release"
    spoil(target)
    with pytest.raises(ValueError, match="safetensors does not match its checksum"):
        served(run)
    assert served(run, "--no-verify") == target
    shutil.rmtree(target)
    write_huggingface(
        RandomFolder(replace(SERVED, num_latent_heads=2, num_branches=2)),
        target,
        tokenizer="byte",
        progress=False,
    )
    with pytest.raises(ValueError, match=r"is no export of .*: it holds another model"):
        served(run)


def test_the_same_command_again_serves_the_same_export(run, tmp_path, monkeypatch, capsys):
    words = ["--export-to", str(tmp_path / "named")]
    assert served(run, *words) == served(run, *words) == tmp_path / "named"
    assert "named, exported before; remove it to export again" in capsys.readouterr().out
    monkeypatch.chdir(run / "release")
    assert served(Path(".")).absolute() == run / "release" / "exported" / "release"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_is_there_and_no_export_is_named_with_its_flag(make, run, tmp_path):
    make(tmp_path / "there")
    said = rf"^--export-to {tmp_path}/there: .* is no export; move it, or name another$"
    with pytest.raises(ValueError, match=said):
        served(run, "--export-to", str(tmp_path / "there"))


@pytest.mark.parametrize("link", ["exported", "exported/release"])
def test_a_link_that_came_with_a_run_is_not_served_or_written_through(link, run, exported):
    elsewhere = run.parent / "elsewhere"
    shutil.copytree(exported, elsewhere)
    before = sorted(elsewhere.iterdir())
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"is a link out of its folder.*--export-to"):
        served(run)
    assert sorted(elsewhere.iterdir()) == before


def test_a_damaged_exported_folder_is_not_served(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    assert served(copy) == copy
    spoil(copy)
    with pytest.raises(ValueError, match="does not match its checksum"):
        served(copy)
    assert served(copy, "--no-verify") == copy


def test_a_port_that_is_taken(exported, port, capsys):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        assert main([str(exported), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is taken; use another --port" in capsys.readouterr().err


def test_the_end_of_the_server_is_that_of_its_children(tmp_path):
    script = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    with (tmp_path / "log").open("w") as log, running([sys.executable, "-c", script], log) as own:
        end = time.monotonic() + 30
        while not (children := psutil.Process(own.pid).children(recursive=True)):
            assert time.monotonic() < end
            time.sleep(0.02)
    assert own.returncode is not None
    _, alive = psutil.wait_procs(children, 5)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


SERVES = """
import sys
from megatron_mlra.serving.server import running

with running(["sleep", "600"], sys.stderr) as server:
    print(server.pid, flush=True)
    server.wait()
"""


def test_a_server_whose_starter_is_killed_is_told_to_end():
    starter = subprocess.Popen([sys.executable, "-c", SERVES], stdout=subprocess.PIPE, text=True)
    with starter.stdout:
        server = starter.stdout.readline().strip()
    starter.kill()
    starter.wait()
    wait_for_end([server], 20)


def test_waiting_for_a_server(tmp_path, port):
    (tmp_path / "health").write_text("")
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    command += ["--directory", str(tmp_path)]
    with (tmp_path / "log").open("w") as log, running(command, log) as own:
        wait_until_healthy(own, "127.0.0.1", port, 60)
        with pytest.raises(RuntimeError, match="did not answer within"):
            wait_until_healthy(own, "127.0.0.1", port + 1 if port < 65535 else 1, 0.5)
        # Another process answers at the port.
        with running(["sleep", "60"], log) as late, pytest.raises(RuntimeError, match="not answer"):
            wait_until_healthy(late, "127.0.0.1", port, 3)
    own = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="exit code 3"):
        wait_until_healthy(own, "127.0.0.1", port, 60)


def test_what_a_log_says_of_an_error(tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO fine\n")
    assert last_error(log) is None
    log.write_text(
        "(EngineCore) ValueError: page size is 3\n  File x\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_error(log) == "ValueError: page size is 3"
    log.write_text(
        "pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        "  Value error, 3 does not fit; use 2 [type=value_error, input_value=x]\n"
        "    For further information visit a page\n"
    )
    assert last_error(log) == "3 does not fit; use 2"
    log.write_text(
        "usage: api_server.py [-h] [--headless]\n"
        "api_server.py: error: unrecognized arguments: --no-such\n"
    )
    assert last_error(log) == "unrecognized arguments: --no-such"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("LocalHost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_a_server_for_this_machine_has_the_page_that_guards_it(host, local, exported, capsys):
    args = cli.parser().parse_args([str(exported), "--host", host])
    args.vllm = []
    command = cli._command(args, "python", exported, "my", True)
    page = f"mlra_vllm.chat.{'Local' * local}ChatPage"
    assert command[command.index("--middleware") + 1] == page
    cli._say(args, host, "my", False, True)
    assert ("whoever reaches this address" in capsys.readouterr().out) != local


def test_the_example_can_be_pasted_whatever_the_models_name(exported, capsys):
    args = cli.parser().parse_args([str(exported)])
    cli._say(args, "127.0.0.1", "it's", False, True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("curl ")]
    assert json.loads(shlex.split(line)[-1])["model"] == "it's"
