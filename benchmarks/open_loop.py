"""A client of a process of its own that asks at a given rate, whether or not it has been answered."""

import asyncio
import json
import random
import sys
import time
from pathlib import Path

Line = tuple[float, float, int]  # due at, seconds until the whole answer, status; 0: no answer

PATIENCE = 30.0  # seconds


async def ask(host: str, port: int, request: bytes) -> int:
    """Return the status of one request over a connection of its own, once its answer is complete; 0: none came."""
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.partition(b":")[2]))
                return int(head.split(b" ", 2)[1])
            finally:
                writer.close()
    except (OSError, asyncio.IncompleteReadError):
        return 0


def request_of(picture: bytes) -> bytes:
    """Return a whole request for the objects in a picture."""
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    return f"{head}Content-Length: {len(picture)}\r\n\r\n".encode() + picture


async def at_rates(host: str, port: int, request: bytes, phases: list[tuple[float, float]]) -> list[Line]:
    """Ask at random moments, (so many a second, so many seconds); time counts from when a request was due."""
    chance, begun = random.Random(0), time.monotonic()  # noqa: S311

    async def one(due: float) -> Line:
        status = await ask(host, port, request)
        return due, time.monotonic() - begun - due, status

    tasks, until = [], 0.0
    for rate, seconds in phases:
        due, until = until + chance.expovariate(rate), until + seconds
        while due < until:
            await asyncio.sleep(max(due - (time.monotonic() - begun), 0.0))
            tasks.append(asyncio.create_task(one(due)))
            due += chance.expovariate(rate)
    return await asyncio.gather(*tasks)


async def as_fast_as_answered(host: str, port: int, request: bytes, clients: int, seconds: float) -> list[Line]:
    """Let some clients ask again as soon as they are answered."""
    begun = time.monotonic()

    async def client() -> list[Line]:
        lines = []
        while (due := time.monotonic() - begun) < seconds:
            status = await ask(host, port, request)
            lines.append((due, time.monotonic() - begun - due, status))
        return lines

    return [line for lines in await asyncio.gather(*(client() for _ in range(clients))) for line in lines]


if __name__ == "__main__":
    host, port, picture, way, *phases = sys.argv[1:]
    request = request_of(Path(picture).read_bytes())
    numbers = [(float(number), float(seconds)) for number, seconds in (phase.split("x") for phase in phases)]
    if way == "rates":
        lines = asyncio.run(at_rates(host, int(port), request, numbers))
    else:
        lines = asyncio.run(as_fast_as_answered(host, int(port), request, int(numbers[0][0]), numbers[0][1]))
    print(json.dumps(lines))
