"""A chat page in vLLM's own server: `--middleware mlra_vllm.chat.ChatPage`.

The page has the server's origin, so that the server need not allow requests from other sites.
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
    """The page and its headers: only its own script runs, and contacts only this server."""
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
    """ASGI middleware that answers GET /chat with the page, and passes on all other requests."""

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
    """The same for a server that serves only this machine, for HTTP and websockets.

    Requests with another host name are refused: a site whose name resolves to this machine (DNS
    rebinding) would send them. Requests from other sites' pages are refused too: such a page could
    not read an answer, but could make the model compute.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        said = None if scope["type"] == "lifespan" else _refusal(scope["headers"])
        if said is None:
            await super().__call__(scope, receive, send)
        elif scope["type"] == "websocket":
            # Closed before it is accepted, the client sees status 403.
            await send({"type": "websocket.close", "code": 1008, "reason": said})
        else:
            await _answer(send, 403, [(b"content-type", b"text/plain")], f"{said}\n".encode())


def _refusal(headers: list[tuple[bytes, bytes]]) -> str | None:
    """Why a local server refuses a request with these headers, or None."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    if not all(LOOPBACK.fullmatch(host) for host in hosts):
        return "This server answers to localhost and 127.0.0.1 alone."
    own = hosts[0].lower() if hosts else "localhost"
    for name, value in headers:
        # An origin is a scheme, ://, and the host of requests from the same origin.
        if name == b"origin" and value.decode("latin-1").lower().partition("://")[2] != own:
            return "This server answers no page of another site."
    return None


async def _answer(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
