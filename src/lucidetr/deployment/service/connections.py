"""Connections that do not wait for ever: what uvicorn leaves to its user.

uvicorn limits the size of a request's head and how long a connection may idle after an answer, but not how long the
head of a request may take, nor how long an answer may lie unread.
"""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lucidetr.deployment.service.limits import HEADERS

HEAD_SECONDS = 5.0  # for the head of a request, from the connection or the last answer on
MOST = 800  # connections at once
READ = 32 * 1024  # bytes taken from a connection at once: so much more than allowed can be read


class Connection(H11Protocol):
    """Speak HTTP/1.1 with one client, who has a few seconds to say what it wants and to take what it gets."""

    deadline: asyncio.TimerHandle | None = None
    left = 0  # bytes of an answer that the client had not taken at the last look

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
            body = json.dumps({"error": "this is not HTTP/1.1 that can be read"}).encode()
            headers = [*HEADERS.items(), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            head = "".join(f"{name}: {value}\r\n" for name, value in [*headers, ("Connection", "close")])
            self.transport.write(f"HTTP/1.1 400 Bad Request\r\n{head}\r\n".encode() + body)
        if self.cycle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
