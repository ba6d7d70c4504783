"""A page to talk to the model, in vLLM's own server: `--middleware mlra_vllm.chat.ChatPage`.

The page is of the server's origin, so nothing has to be open to other sites.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

PATH = "/chat"
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)


def _page() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The page and its headers: its script alone runs, and asks this server alone."""
    page = files("mlra_vllm").joinpath("chat.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src 'sha256-{digest}';"
        " style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    ]


class ChatPage:
    """ASGI middleware: GET /chat is the page, everything else the server's."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.page, self.headers = _page()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self.app(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD"):
            body = self.page if scope["method"] == "GET" else b""
            await _answer(send, 200, self.headers, body)
        else:
            await _answer(send, 405, [(b"allow", b"GET, HEAD")], b"")


class LocalChatPage(ChatPage):
    """The same, of a server for this machine, for requests over HTTP and websockets alike.

    Requests under another name are refused, as a site that names its own host and points it here
    (DNS rebinding) would send; so are those of other sites' pages, which need not read an answer to
    have the model compute one.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        said = None if scope["type"] == "lifespan" else _refusal(scope["headers"])
        if said is None:
            await super().__call__(scope, receive, send)
        elif scope["type"] == "websocket":
            # Before it is accepted: the client sees status 403.
            await send({"type": "websocket.close", "code": 1008, "reason": said})
        else:
            await _answer(send, 403, [(b"content-type", b"text/plain")], f"{said}\n".encode())


def _refusal(headers: list[tuple[bytes, bytes]]) -> str | None:
    """Why a local server does not answer a request with these headers, None if it does."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    if not all(LOOPBACK.fullmatch(host) for host in hosts):
        return "This server answers to localhost and 127.0.0.1 alone."
    own = hosts[0].lower() if hosts else "localhost"
    for name, value in headers:
        # A scheme, ://, then what a request to the same place has as its host.
        if name == b"origin" and value.decode("latin-1").lower().partition("://")[2] != own:
            return "This server answers no page of another site."
    return None


async def _answer(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
