"""Connections that do not wait for ever, and refuse cheaply: what uvicorn leaves to its user.

uvicorn limits the size of a request's head and how long a connection may idle after an answer, but not how long the
head of a request may take, nor how long an answer may lie unread. And what it costs to parse a request that is then
refused is taken from the process that computes, where cores are few.
"""

import asyncio
import json
import re

import h11
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from lucidetr.deployment.service.keeper import Keeper
from lucidetr.deployment.service.limits import HEADERS, LINGER_BYTES, LINGER_SECONDS

HEAD_SECONDS = 5.0  # for the head of a request, from the connection or the last answer on
MOST = 800  # connections at once
READ = 32 * 1024  # bytes taken from a connection at once: so much more than allowed can be read
WAITS = re.compile(rb"POST (/predict|/look|/look/point)[ ?]")  # how a request begins that waits for the model


class Connection(H11Protocol):
    """Speak HTTP/1.1 with one client, who has a few seconds to say what it wants and to take what it gets."""

    deadline: asyncio.TimerHandle | None = None
    left = 0  # bytes of an answer that the client had not taken at the last look
    thrown: int | None = None  # bytes that came of a refused request

    def __init__(self, keeper: Keeper, **given):
        super().__init__(**given)
        self.keeper = keeper

    def connection_made(self, transport) -> None:
        """Begin, unless there are too many."""
        super().connection_made(transport)
        transport.max_size = READ
        self.watch()
        if len(self.connections) > MOST:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        if self.deadline:
            self.deadline.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on, unless this begins a request that may not even wait: it is refused by its first line."""
        between = self.conn.their_state is self.conn.our_state is h11.IDLE and not self.conn.trailing_data[0]
        if self.thrown is None and between and (found := WAITS.match(data)):
            self.admit(found[1].decode())
        if self.thrown is None:
            super().data_received(data)
            return
        self.thrown += len(data)
        if self.thrown >= LINGER_BYTES:
            self.transport.pause_reading()

    def admit(self, route: str) -> None:
        """Refuse a request where too many wait; its client has a moment to notice before the connection ends."""
        try:
            self.keeper.admit()
        except HTTPException as refusal:
            self.keeper.metrics.count(route, refusal.status_code, 0.0)
            self.say("503 Service Unavailable", refusal.detail, dict(refusal.headers or {}))
            self.thrown = 0
            if self.deadline:
                self.deadline.cancel()
            self.deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def say(self, status: str, error: str, more: dict[str, str]) -> None:
        """Write an answer that ends the connection."""
        body = json.dumps({"error": error}).encode()
        own = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in (HEADERS | more | own).items())
        self.transport.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.watch()
        super().on_response_complete()

    def watch(self) -> None:
        """Look again in a few seconds."""
        if self.deadline:
            self.deadline.cancel()
        self.left = self.transport.get_write_buffer_size()
        self.deadline = self.loop.call_later(HEAD_SECONDS, self.look)

    def look(self) -> None:
        """End the connection where no request is worked on, or no byte of an answer was taken since the last look."""
        left = self.transport.get_write_buffer_size()
        works = self.cycle is not None and not self.cycle.response_complete
        if left != self.left if left else works:
            self.watch()
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in JSON as all errors; where an answer is under way already, just end."""
        if self.conn.our_state is h11.IDLE or (self.cycle and not self.cycle.response_started):
            self.say("400 Bad Request", "this is not HTTP/1.1 that can be read", {})
        if self.cycle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
