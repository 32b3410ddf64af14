"""Who may use the page, and how much at once."""

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADMIN = ""
"""In place of a labeler's name: who may see agreement, and everybody's progress."""
MAX_BODY = 2**20
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """Without a token, the page is for whoever sits at this machine; with one, for those who have a link."""

    token: str | None
    secret: str
    """Signs the cookies where there is no token."""

    @property
    def cookie_key(self) -> str:
        """Another token makes all cookies of the old one worthless."""
        return hashlib.sha256(f"cookies {self.token or self.secret}".encode()).hexdigest()

    def key(self, name: str) -> str:
        """What a login link holds: it cannot be guessed without the token, nor used for another name."""
        assert self.token is not None
        return hmac.new(self.token.encode(), f"login {name}".encode(), hashlib.sha256).hexdigest()[:40]

    def is_key(self, name: str, key: str) -> bool:
        """Whether a login link is right."""
        return self.token is not None and hmac.compare_digest(self.key(name).encode(), key.encode())

    def link(self, name: str) -> str:
        """Path of the login link of a labeler, or of ADMIN."""
        return f"/login/{name}/{self.key(name)}" if name else f"/admin/{self.key(ADMIN)}"


class Allowance:
    """So many requests at once, and so many a second after that, for each client."""

    def __init__(self, burst: int, per_second: float, clock: Callable[[], float] = time.monotonic):
        self.burst, self.per_second, self.clock = burst, per_second, clock
        self._clients: dict[str, tuple[float, float]] = {}

    def take(self, client: str) -> bool:
        """Whether a client may make one more request now."""
        now = self.clock()
        left, then = self._clients.get(client, (float(self.burst), now))
        left = min(self.burst, left + (now - then) * self.per_second)
        self._clients[client] = (max(left - 1, 0.0) if left >= 1 else left, now)
        if len(self._clients) > 10_000:  # those who have been away have their whole allowance again
            full = self.burst / self.per_second
            self._clients = {name: entry for name, entry in self._clients.items() if now - entry[1] < full}
        return left >= 1


class Guard:
    """Around the whole page: a limit on requests and their size, and headers that forbid foreign scripts and frames."""

    def __init__(self, app: ASGIApp, allowance: Allowance):
        self.app, self.allowance = app, allowance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        client = scope["client"][0] if scope.get("client") else ""
        if not self.allowance.take(client):
            response = JSONResponse({"problem": "too many requests; wait a second"}, 429, {"Retry-After": "1"})
            await response(scope, receive, send_with_headers)
            return
        body = await _whole_body(receive) if scope["method"] == "POST" else b""
        if body is None:
            response = JSONResponse({"problem": f"that is more than {MAX_BODY:,} bytes"}, 413)
            await response(scope, receive, send_with_headers)
            return
        await self.app(scope, _replay(body) if scope["method"] == "POST" else receive, send_with_headers)


async def _whole_body(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return body


def _replay(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
