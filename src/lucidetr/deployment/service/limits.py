"""What a request may ask of the service: how large a body, how long, how much memory all together, which fields."""

import asyncio
import ipaddress
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lucidetr.deployment.service.keeper import busy
from lucidetr.deployment.service.metrics import Metrics
from lucidetr.errors import did_you_mean

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
BODY_SECONDS = 10.0  # for a whole body
LINGER_SECONDS = 1.0  # for a client that is still sending to notice that it has been refused
LINGER_BYTES = 64 * 1024  # of what it still sends, thrown away
FORM = "a program sends one file field: curl -F image=@photo.jpg"


class Uploads:
    """Read bodies: each up to a size and within a time, all of them together within a budget of memory."""

    def __init__(self, most: int, together: int, seconds: float = BODY_SECONDS):
        self.most, self.together, self.seconds = most, together, seconds
        self.held = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the whole body; its bytes count until the context ends. Too large 413, too slow 408, no room 503."""
        most = f"{self.most / 1e6:g} MB, the most that this service takes (the body has more than {self.most:,} bytes)"
        too_large = HTTPException(413, f"the picture is larger than {most}; send a smaller one")
        if int(request.headers.get("content-length", 0)) > self.most:  # a number: the parser has seen to that
            raise too_large
        body, size = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(self.seconds):
                    async for part in request.stream():
                        if size + len(part) > self.most:
                            raise too_large
                        if self.held + len(part) > self.together:
                            raise busy("too many large pictures are being sent at once")
                        self.held += len(part)
                        size += len(part)
                        body += part
            except TimeoutError:
                raise HTTPException(408, f"the body was not complete after {self.seconds:g} seconds") from None
            body = bytes(body)  # under the same name: else it would be held twice
            yield body
        finally:
            self.held -= size


def picture_of(body: bytes, content_type: str) -> bytes:
    r"""Return the picture in a body: all of it, or the one file of a form.

    >>> head = b'Content-Disposition: form-data; name="image"; filename="a.png"'
    >>> picture_of(b"--x\r\n" + head + b"\r\n\r\npixels\r\n--x--\r\n", "multipart/form-data; boundary=x")
    b'pixels'
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        body = file_in_form(body, content_type)
    elif kind not in ("", "application/octet-stream") and not kind.startswith("image/"):
        raise HTTPException(415, f"{kind} is no picture: choose a JPEG, PNG or another image/*; {FORM}")
    if not body:
        raise HTTPException(400, f"the picture is empty: choose another; {FORM}")
    return body


def file_in_form(body: bytes, content_type: str) -> bytes:
    """Return the only part of a form, the file field `image` (RFC 7578), without copying it to disk or decoding it."""
    found = re.search(r'boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', content_type, re.IGNORECASE)
    if not found:
        raise HTTPException(400, f"the form names no boundary; {FORM}")
    line = b"--" + (found[1] or found[2]).encode("latin-1")
    head_ends = body.find(b"\r\n\r\n", 0, 8192)
    ends = body.find(b"\r\n" + line, head_ends + 2)
    if not body.startswith(line + b"\r\n") or head_ends < 0 or ends < 0:
        raise HTTPException(400, f"the form is damaged or cut off; {FORM}")
    head = body[:head_ends].decode("utf-8", "replace")
    if not re.search(r'^content-disposition:\s*form-data\s*;(?:.*;)?\s*name="?image"?\s*(?:;|\r?$)', head, re.I | re.M):
        raise HTTPException(400, f"the form's first field is not called image; {FORM}")
    if body[ends + 2 + len(line) :][:2] != b"--":
        raise HTTPException(400, f"the form has more than one field; {FORM}")
    return body[head_ends + 4 : ends]


def numbers(request: Request, allowed: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return a query's numbers; an unknown name or a value outside its range is refused."""
    for name in request.query_params:
        if name not in allowed:
            raise HTTPException(400, f"unknown parameter {name!r}: {did_you_mean(name, allowed)}")
    values = {}
    for name, text in request.query_params.items():
        low, high = allowed[name]
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise HTTPException(400, f"{name} = {text[:40]!r}: give a number from {low:g} to {high:g}")
        values[name] = value
    return values


def names_this_machine(host: str) -> bool:
    """Return whether a Host header is localhost or an IP address: no name that a stranger could have led here.

    >>> [names_this_machine(host) for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "evil.example:8000")]
    [True, True, True, False]
    """
    name = re.sub(r":[0-9]*$", "", host)
    try:
        return name.lower() == "localhost" or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


class Guard:
    """Wrap the service: safe headers on every answer, every answer counted, no client that sends on after its answer.

    Where the answer is ready before the body is, the connection ends with it, a moment later. A `local` service, which
    only its own machine reaches, refuses other names: a page could give its own name our address (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str], local: bool):
        self.app, self.metrics, self.routes, self.local = app, metrics, routes, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = dict(scope["headers"])
        unread = bool(headers.keys() & {b"content-length", b"transfer-encoding"})

        async def listen() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                closing = [(b"connection", b"close")] if unread else []
                await send({**message, "headers": [*message.get("headers", []), *RAW_HEADERS, *closing]})
                self.metrics.count(self.route(scope), message["status"], time.monotonic() - started)
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await linger()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await send(message)

        async def linger() -> None:
            until, thrown = asyncio.get_running_loop().time() + LINGER_SECONDS, 0
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    while unread and thrown < LINGER_BYTES:
                        thrown += len((await listen()).get("body", b""))
                    if unread:
                        await asyncio.sleep(LINGER_SECONDS)

        app, host = self.app, headers.get(b"host", b"localhost").decode("latin-1")  # HTTP/1.0 may name none
        if self.local and not names_this_machine(host):
            sentence = f"this service is local and not called {host[:60]}; ask for localhost or 127.0.0.1"
            app = JSONResponse({"error": sentence}, 421)
        await app(scope, listen, answer)

    def route(self, scope: Scope) -> str:
        """Return the route of a request, one name for all that is not there: clients must not make new counters."""
        path = scope["path"]
        if path.startswith("/samples/"):
            return "/samples/{number}"
        return path if path in self.routes else "other"
