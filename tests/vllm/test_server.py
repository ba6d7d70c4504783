"""vLLM's HTTP server on an exported model: what clients send, good and bad, and that it lives."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_mlra.launch.ports import reserve_port
from support.browser import Browser
from support.vllm_cases import FEATURES, LENGTHS, NEW, prompts
from support.vllm_environment import ENV_VLLM, PYTHON

START_S = 420
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Server:
    """A running server and a client of it."""

    def __init__(self, process: subprocess.Popen, port: int, model: str) -> None:
        self.process, self.port, self.model = process, port, model

    def connect(self, timeout: float = 180) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON answer of a request; a str is sent as it is."""
        connection = self.connect()
        text = body if isinstance(body, str) else json.dumps({"model": self.model} | body)
        connection.request("POST", path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def complete(self, prompt: list[int], new: int = NEW) -> list[int]:
        """Greedy continuation in tokens."""
        status, answer = self.post("/v1/completions", greedy(prompt, new))
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]


def greedy(prompt: Any, new: int = NEW) -> dict[str, Any]:
    """The body of a completion."""
    return {
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """vLLM's server with the plugin, compiled by Dynamo, ended as its operator would end it."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TEMPLATE)
    kept = reserve_port()
    port = kept.getsockname()[1]
    model = str(models / FEATURES)
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", str(24 << 20), "--max-num-seqs", "8"]
    command += ["--chat-template", str(folder / "template.jinja"), "--disable-uvicorn-access-log"]
    command += ["--middleware", "mlra_vllm.chat.ChatPage"]
    env = {k: v for k, v in ENV_VLLM.items() if k != "TORCHDYNAMO_DISABLE"}
    # Dynamo traces the model as in service, and torch runs it: no compiler is waited for.
    env |= {"VLLM_CPU_CI_ENV": "1"}
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    running = Server(process, port, model)
    try:
        _wait(running, folder / "log")
        yield running
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
    finally:
        process.terminate()
        process.wait(60)
        kept.close()


def _wait(server: Server, log) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.process.poll() is None, log.read_text()[-3000:]
        try:
            connection = server.connect(5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server after {START_S} s: {log.read_text()[-3000:]}")


def test_completions_are_those_of_transformers(server, reference):
    for prompt, run in zip(prompts(*LENGTHS), reference[FEATURES]["prompts"], strict=True):
        assert server.complete(prompt) == run["tokens"]


def test_twelve_at_once_get_what_each_gets_alone(server, reference):
    jobs = list(zip(prompts(*LENGTHS), reference[FEATURES]["prompts"], strict=True)) * 3
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(server.complete, [prompt for prompt, _ in jobs[:12]]))
    assert found == [run["tokens"] for _, run in jobs[:12]]


def test_chat(server):
    body = {"messages": [{"role": "user", "content": "def main():"}], "max_tokens": 8}
    status, answer = server.post("/v1/chat/completions", body | {"temperature": 0})
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len("def main():")
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_the_page_of_a_model_with_a_template_chats(server, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.port}/chat")
        browser.until("document.querySelector('#tokens').max === '256'")
        browser.until("document.querySelector('#send').textContent === 'Send'")
        assert browser.evaluate("document.querySelector('#mode').value") == "chat"
        browser.evaluate("document.querySelector('#temperature').value = 0, 0")
        browser.evaluate("document.querySelector('#tokens').value = 8, 0")
        for turn in (1, 2):
            browser.ask(f"def main{turn}():")
            browser.until(f"document.querySelectorAll('.turn.assistant').length === {turn}")
            browser.until("/pieces in/.test(document.querySelector('#status').textContent)")
        turns = browser.evaluate("[...document.querySelectorAll('.turn')].map(t => t.textContent)")
        browser.screenshot(tmp_path / "chat.png")
    assert turns[0::2] == ["def main1():", "def main2():"]
    roles = ("user", "assistant", "user")
    said = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    body = {"messages": said, "max_tokens": 8, "temperature": 0}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["content"] == turns[3]


def test_a_cleared_page_forgets_the_answer_that_was_coming(server, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.port}/chat")
        browser.until("document.querySelector('#tokens').max === '256'")
        browser.until("document.querySelector('#send').textContent === 'Send'")
        browser.click_once_there("document.querySelectorAll('.turn')[1]", "clear")
        browser.ask("a", temperature=0, tokens=200)
        browser.until("!document.querySelectorAll('.turn').length")
        browser.until("document.querySelector('#send').textContent === 'Send'")
        assert browser.evaluate("document.querySelector('#status').textContent") == ""
        browser.ask("b", tokens=8)
        browser.until("/pieces in/.test(document.querySelector('#status').textContent)")
        turns = browser.evaluate("[...document.querySelectorAll('.turn')].map(t => t.textContent)")
    body = {"messages": [{"role": "user", "content": "b"}], "max_tokens": 8, "temperature": 0}
    answer = server.post("/v1/chat/completions", body)[1]
    assert turns == ["b", answer["choices"][0]["message"]["content"]]


def stream(server, body) -> http.client.HTTPResponse:
    """The open answer of a streaming completion."""
    connection = server.connect()
    text = json.dumps({"model": server.model, "stream": True} | body)
    connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
    return connection.getresponse()


def test_streaming_gives_the_same_tokens(server, reference):
    prompt, run = prompts(*LENGTHS)[2], reference[FEATURES]["prompts"][2]
    lines = stream(server, greedy(prompt)).read().decode().split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]" and len(events) > 2
    parts = [json.loads(event)["choices"][0]["token_ids"] or [] for event in events[:-1]]
    assert [token for part in parts for token in part] == run["tokens"]


def test_a_client_that_leaves_frees_its_place(server, reference):
    for prompt in prompts(5, 6, 7, 8, 9, 10, 11, 12, seed=5):
        answer = stream(server, greedy(prompt, 240))
        answer.readline()
        answer.close()
    assert server.complete(prompts(*LENGTHS)[1]) == reference[FEATURES]["prompts"][1]["tokens"]
    end = time.monotonic() + 60
    while running(server):
        assert time.monotonic() < end, "requests of clients that left still run"
        time.sleep(0.2)


def running(server) -> float:
    """Requests that the engine holds."""
    connection = server.connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return sum(float(line.split()[-1]) for line in lines)


def test_bad_requests_are_answered_and_the_server_lives(server, reference):
    status, answer = server.post("/v1/completions", greedy([1] * 300))
    assert status == 400 and "256" in json.dumps(answer)
    assert server.post("/v1/completions", "{garbage")[0] in (400, 422)
    assert server.post("/v1/completions", greedy([100000]))[0] == 400
    assert server.post("/v1/completions", {"prompt": "x", "temperature": -3})[0] == 400
    assert server.complete(prompts(*LENGTHS)[1]) == reference[FEATURES]["prompts"][1]["tokens"]
