"""`mlra serve` on a run's checkpoint: exported once, served to this machine, ended with all that it
began; and its page in a browser."""

from __future__ import annotations

import http.client
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.launch.ports import reserve_port
from support import ENV, ROOT
from support.browser import Browser
from support.random_checkpoint import RandomFolder
from support.vllm_cases import CASES, FEATURES
from support.vllm_environment import ENV_VLLM, PYTHON

START_S = 420
VLLM_FLAGS = ["--enforce-eager", "--kv-cache-memory-bytes", str(24 << 20), "--max-num-seqs", "4"]


class Served:
    """A running `mlra serve`."""

    def __init__(self, folder) -> None:
        self._kept = reserve_port()
        self.port = self._kept.getsockname()[1]
        self.run, self.log = folder / "run", folder / "serve.log"
        write_megatron(RandomFolder(CASES[FEATURES]), self.run, progress=False)
        command = [sys.executable, str(ROOT / "tools" / "serve.py"), str(self.run)]
        command += ["--port", str(self.port), "--tokenizer", "byte", "--dtype", "float32"]
        command += ["--python", str(PYTHON), "--", *VLLM_FLAGS]
        env = ENV | ENV_VLLM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stream)
        self.said = self._read_until("Ctrl-C ends it")

    def _read_until(self, line: str) -> list[str]:
        text, end = "", time.monotonic() + START_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while line not in text.split("\n"):
                assert time.monotonic() < end, text
                if selector.select(1):
                    some = os.read(self.process.stdout.fileno(), 1 << 16).decode()
                    assert some, (text, self.log.read_text())
                    text += some
        return text.split("\n")

    def get(self, method: str, path: str, body=None, **headers):
        """Answer and body of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer, answer.read().decode()

    def complete(self, prompt: str, new: int) -> str:
        """Greedy continuation."""
        body = {"model": "run", "prompt": prompt, "max_tokens": new, "temperature": 0}
        answer, text = self.get("POST", "/v1/completions", body)
        assert answer.status == 200, text
        return json.loads(text)["choices"][0]["text"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The server; a test that ends it comes last."""
    server = Served(tmp_path_factory.mktemp("serve"))
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)


def test_it_says_what_it_did_and_what_to_type_next(served):
    said = "\n".join(served.said)
    assert f"exported {served.run} to {served.run}/exported/" in said
    assert f"run is served at http://127.0.0.1:{served.port}/v1" in said
    (line,) = [line for line in served.said if line.startswith("curl ")]
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["choices"][0]["text"], done


def test_other_sites_scripts_get_nothing(served):
    answer, _ = served.get("GET", "/v1/models", Origin="http://elsewhere.example")
    assert answer.getheader("access-control-allow-origin") is None
    answer, text = served.get("GET", "/v1/models", Host="elsewhere.example")
    assert answer.status == 403 and "localhost" in text
    answer, _ = served.get("POST", "/chat", {})
    assert answer.status == 405


def test_the_page_continues_text_of_a_base_model(served, tmp_path):
    prompt, new = "def main(", 40
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{served.port}/chat")
        browser.until("document.querySelector('#mode').value === 'text'")
        assert browser.evaluate("document.querySelector('#model').textContent") == "run"
        assert browser.evaluate("document.querySelector('#mode').options[0].disabled")
        browser.ask(prompt, temperature=0, tokens=new)
        browser.until("/pieces in/.test(document.querySelector('#status').textContent)")
        shown = browser.evaluate("document.querySelector('.turn.text').textContent")
        browser.screenshot(tmp_path / "text.png")
        # The page asks whether there is a template for messages.
        assert [line for line in browser.said if "status of 400" not in line] == []
    assert shown == prompt + served.complete(prompt, new)
    assert (tmp_path / "text.png").stat().st_size > 5000


def test_an_answer_can_be_stopped_and_errors_are_shown(served, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://localhost:{served.port}/chat")
        browser.until("document.querySelector('#mode').value === 'text'")
        browser.click_once_there("document.querySelector('.turn .new')", "send")
        browser.ask("a", temperature=0, tokens=200)
        browser.until("document.querySelector('#status').textContent === 'stopped'")
        browser.ask("b", tokens=100000)
        browser.until("document.querySelector('#status').className === 'bad'")
        assert "100000" in browser.evaluate("document.querySelector('#status').textContent")


def test_a_second_server_exports_nothing_and_needs_a_port_of_its_own(served):
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), str(served.run)]
    done = subprocess.run(
        [*command, "--port", str(served.port)], env=ENV, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: port {served.port} of 127.0.0.1 is taken; use another --port\n"


def test_what_vllm_refuses_is_one_line_and_the_export_is_used_again(served):
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), str(served.run), "--port"]
    command += [str(served.port + 1), "--python", str(PYTHON)]
    command += ["--", "--block-size", "8"]
    done = subprocess.run(command, env=ENV | ENV_VLLM, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "exported before; remove it to export again" in done.stdout
    loading, line = done.stderr.splitlines()
    assert loading.startswith("loading PyTorch: ")
    assert "block size is 8; use a multiple of 16" in line
    os.remove(line.rsplit(" ", 1)[1])


def test_a_signal_ends_it_and_its_children(served):
    children = psutil.Process(served.process.pid).children(recursive=True)
    assert len(children) >= 2  # the server and its engine
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(children, 10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
