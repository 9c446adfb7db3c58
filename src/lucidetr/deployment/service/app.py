"""The service itself: its routes, and how it starts and stops."""

import asyncio
import ipaddress
import logging
import multiprocessing
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from lucidetr.deployment.page.routes import page_routes
from lucidetr.deployment.service.connections import Connection
from lucidetr.deployment.service.keeper import Keeper, busy
from lucidetr.deployment.service.limits import Guard, Uploads, numbers, picture_of
from lucidetr.deployment.service.messages import BUSY, Answer, Job, Sample, Settings
from lucidetr.deployment.service.metrics import Metrics
from lucidetr.deployment.service.openapi import docs, openapi
from lucidetr.errors import InputError

SHOWN = 6  # sample pictures
GATHER_SECONDS = 10.0  # that a request waits for the samples
SHARE = (0.0, 1.0)
log = logging.getLogger("lucidetr.service")


class Service:
    """Answer requests by way of the keeper."""

    def __init__(self, settings: Settings, keeper: Keeper, metrics: Metrics):
        self.settings, self.keeper, self.metrics = settings, keeper, metrics
        # as much as may wait and be worked on, were every picture as large as allowed
        self.uploads = Uploads(settings.max_bytes, settings.max_bytes * (settings.queue + settings.batch))
        self.usual_places: Answer | None = None
        self.once = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Return all routes, those of the page included."""
        return [
            Route("/predict", self.predict, methods=["POST"]),
            Route("/look", self.look, methods=["POST"]),
            Route("/look/point", self.point, methods=["POST"]),
            Route("/usual", self.usual),
            Route("/model", self.model),
            Route("/samples", self.samples),
            Route("/samples/{number}", self.sample),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", lambda _: Response(self.metrics.text(), media_type="text/plain; version=0.0.4")),
            Route("/openapi.json", lambda _: JSONResponse(openapi())),
            Route("/docs", lambda _: HTMLResponse(docs())),
            *page_routes(),
        ]

    async def predict(self, request: Request) -> Response:
        """Find what is in a picture."""
        values = {"threshold": self.settings.threshold} | numbers(request, {"threshold": SHARE, "drawn": SHARE})
        return await self.seen(request, "predict", values)

    async def look(self, request: Request) -> Response:
        """Show how it was found."""
        numbers(request, {})
        return await self.seen(request, "look", {})

    async def point(self, request: Request) -> Response:
        """Show what the encoder relates a point to."""
        values = numbers(request, {"x": SHARE, "y": SHARE})
        if len(values) < 2:
            raise HTTPException(
                400, "which point? Give x and y, as shares of the picture's width and height: ?x=0.4&y=0.6"
            )
        return await self.seen(request, "point", values)

    async def seen(self, request: Request, task: str, values: dict[str, float]) -> Response:
        """Read the picture of a request, if it may wait at all, and return what the model says of it."""
        self.keeper.admit()  # before its body is read
        async with self.uploads.body(request) as body:
            picture = picture_of(body, request.headers.get("content-type", ""))
            return respond(await self.ask(request, Job(task, (picture,), values)))

    async def ask(self, request: Request, job: Job) -> Answer:
        """Return the answer to a job of a request whose body is read; given up when its client leaves."""
        asked = asyncio.create_task(self.keeper.ask(job))
        left = asyncio.ensure_future(request.receive())  # behind a body comes nothing but the end of the connection
        try:
            await asyncio.wait({asked, left}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise ClientDisconnect
            return asked.result()
        finally:
            asked.cancel()
            left.cancel()

    async def usual(self, _: Request) -> Response:
        """Show where each query usually looks; computed once."""
        if not await self.gathered():
            raise HTTPException(404, "there are no sample pictures to see where queries look; name data by --data")
        async with self.once:  # those that come meanwhile wait for it
            if self.usual_places is None:
                pictures = tuple(sample.body for sample in await self.gathered())
                answer = await self.keeper.ask(Job("usual", pictures))
                if answer.status != 200:
                    return respond(answer)
                self.usual_places = answer
        return respond(self.usual_places)

    async def model(self, _: Request) -> Response:
        """Say what the model is."""
        if self.keeper.about is None:
            raise busy("the model is being loaded")
        return JSONResponse(self.keeper.about)

    async def samples(self, _: Request) -> Response:
        """List some sample pictures."""
        shown = (await self.gathered())[:SHOWN]
        return JSONResponse([{"name": each.name, "url": f"/samples/{i}"} for i, each in enumerate(shown)])

    async def sample(self, request: Request) -> Response:
        """Hand out a sample picture."""
        number = request.path_params["number"]  # as text: it may have more digits than int takes
        shown = {str(i): each for i, each in enumerate((await self.gathered())[:SHOWN])}
        if number not in shown:
            raise HTTPException(404, f"there is no sample picture {number[:20]}; /samples lists them")
        return Response(shown[number].body, media_type=shown[number].media_type)

    async def gathered(self) -> list[Sample]:
        """Return the sample pictures, waiting a while for those that gather them."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_SECONDS):
                await self.keeper.gathered.wait()
        return self.keeper.samples

    async def health(self, _: Request) -> Response:
        """Say whether the service is up; one whose worker dies again and again should be started anew."""
        if self.keeper.falls:
            raise HTTPException(503, "the process that computes dies again and again; the log says when")
        return JSONResponse({"status": "up"})

    async def ready(self, _: Request) -> Response:
        """Say whether pictures can be looked at."""
        if not self.keeper.ready:
            raise busy("the model is being loaded")
        return JSONResponse({"status": "ready"})


def respond(answer: Answer) -> Response:
    """Return a worker's answer as a response."""
    return Response(answer.body, answer.status, media_type=answer.media_type)


async def refuse(request: Request, error: Exception) -> Response:
    """Return any refusal as JSON, in a plain sentence."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:100]
    said = {
        404: f"there is nothing at {path}; /docs lists what there is",
        405: f"{path} does not take {request.method[:20]}; /docs lists what there is",
    }
    from_starlette = error.detail in ("Not Found", "Method Not Allowed")
    sentence = said[error.status_code] if from_starlette else error.detail
    return JSONResponse({"error": sentence}, error.status_code, headers=error.headers)


async def unexpected(_: Request, error: Exception) -> Response:
    """Return what a client hears of a fault of ours; the log has the rest."""
    return JSONResponse({"error": "this went wrong here, not on your side; the log says what"}, 503, headers=BUSY)


async def gone(_: Request, error: Exception) -> Response:
    """Return what nobody hears: the client has left."""
    return Response(status_code=499)


def build_app(settings: Settings, keeper: Keeper, metrics: Metrics, local: bool) -> Guard:
    """Return the service as an ASGI application, which keeps the worker alive as long as it runs."""

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(keeper.run()), asyncio.create_task(keeper.gather())]
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    routes = Service(settings, keeper, metrics).routes()
    handlers = {HTTPException: refuse, ClientDisconnect: gone, Exception: unexpected}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=life)
    app.router.redirect_slashes = False  # an address comes from the client's own Host header
    return Guard(app, metrics, frozenset(route.path for route in routes), local)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; one that cannot be had is an InputError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another") from None


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was admitted; a model that cannot be loaded is an InputError."""
    listener = listen(host, port)
    where, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(where.partition("%")[0]).is_loopback
    if not local:
        print(f"warning: whoever reaches {where} can use this service; it asks for no password", file=sys.stderr)
    address = f"http://[{where}]:{port}" if ":" in where else f"http://{where}:{port}"
    metrics = Metrics()

    def ready() -> None:
        print(f"{address}  (Ctrl-C stops)", flush=True)

    def end() -> None:
        server.should_exit = True

    keeper = Keeper(settings, metrics, ready, end)
    config = uvicorn.Config(
        build_app(settings, keeper, metrics, local),
        http=cast("type[Connection]", partial(Connection, keeper)),  # called as the class is
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",  # not one line for every client that speaks no HTTP
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=60,
    )
    server = uvicorn.Server(config)
    for each in (signal.SIGINT, signal.SIGTERM):  # raised again by uvicorn after it has finished
        signal.signal(each, lambda *_: sys.exit(0))
    try:
        server.run(sockets=[listener])
    finally:
        for process in multiprocessing.active_children():  # even one that was just being started
            process.kill()
    if keeper.failure:
        raise InputError(keeper.failure)
