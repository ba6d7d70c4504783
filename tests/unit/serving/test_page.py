"""The middleware of the chat page: what it answers, and whom it refuses."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re

import pytest

from mlra_vllm.chat import ChatPage, LocalChatPage


def answer(page, path, host=None, method="GET"):
    """Status, headers and body that a page's middleware sends."""
    sent = []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b"server"})

    headers = [] if host is None else [(b"host", host.encode())]
    scope = {"type": "http", "path": path, "method": method, "headers": headers}
    asyncio.run(page(app)(scope, None, send))
    start, body = sent
    return start["status"], dict(start["headers"]), body["body"]


def test_the_pages_script_is_the_one_that_may_run():
    status, headers, body = answer(ChatPage, "/chat")
    script = re.search(rb"<script>(.*?)</script>", body, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = headers[b"content-security-policy"].decode()
    assert status == 200 and f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    # Nothing of other hosts, no text taken for markup.
    assert not re.search(rb"https?://|innerHTML|document\.write", body)
    assert answer(ChatPage, "/chat", method="HEAD")[2] == b""
    assert answer(ChatPage, "/chat", method="POST")[0] == 405
    assert answer(ChatPage, "/v1/models")[0] == 299


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 299),
        ("127.0.0.1:8000", 299),
        ("127.0.1.1:8000", 299),
        ("[::1]:8000", 299),
        ("elsewhere.example", 403),
        ("localhost.elsewhere.example", 403),
        ("127.0.0.1.elsewhere.example:8000", 403),
        ("10.0.0.1", 403),
    ],
)
def test_a_local_server_answers_to_local_names_alone(host, status):
    assert answer(LocalChatPage, "/v1/models", host)[0] == status
    assert answer(ChatPage, "/v1/models", host)[0] == 299


@pytest.mark.parametrize(
    ("host", "origin", "fine"),
    [
        ("localhost:8000", None, True),
        ("localhost:8000", "http://localhost:8000", True),
        ("[::1]:8000", "https://[::1]:8000", True),
        ("127.0.0.1:8000", "http://elsewhere.example", False),
        ("127.0.0.1:8000", "http://127.0.0.1:8000.elsewhere.example", False),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", False),
        ("127.0.0.1:8000", "null", False),
        ("elsewhere.example:8000", "http://elsewhere.example:8000", False),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_local_server_answers_no_page_of_another_site(kind, host, origin, fine):
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append(scope)

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode()), (b"content-type", b"text/plain")]
    headers += [(b"origin", origin.encode())] if origin else []
    scope = {"type": kind, "path": "/v1/completions", "method": "POST", "headers": headers}
    asyncio.run(LocalChatPage(app)(scope, None, send))
    assert bool(reached) == fine
    if not fine:
        expected = {"http": ("http.response.start", 403), "websocket": ("websocket.close", None)}
        assert (sent[0]["type"], sent[0].get("status")) == expected[kind]


def test_a_local_server_starts_and_ends():
    reached = []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    asyncio.run(LocalChatPage(app)({"type": "lifespan"}, None, None))
    assert reached == ["lifespan"]
