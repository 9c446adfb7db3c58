"""Keep one process alive that computes: give it waiting jobs, a few at a time, and replace it when it dies."""

import asyncio
import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from starlette.exceptions import HTTPException

from lucidetr.deployment.service.messages import BUSY, Answer, Job, Sample, Settings
from lucidetr.deployment.service.metrics import Metrics

WORKER = "lucidetr.deployment.service.worker"
PATIENCE = 120.0  # seconds that the worker may take from one answer to the next before it counts as hung
LONGEST_PAUSE = 10.0  # seconds between two attempts to start a worker
MANY, WITHIN = 3, 60.0  # so many deaths of workers in so many seconds are no accidents
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
log = logging.getLogger("lucidetr.service")


def start(entry: str, settings: Settings) -> tuple[Any, Connection]:
    """Start a process that runs a function of the worker; return it and our end of the connection.

    All come from one small process that has imported torch and nothing more: importing takes seconds, a fork none.
    """
    context: Any = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload([WORKER])
    ours, theirs = context.Pipe()
    process = context.Process(target=enter, args=(entry, theirs, settings), daemon=True)
    with deaf():
        process.start()
    theirs.close()  # else its end would never be noticed
    return process, ours


@contextmanager
def deaf() -> Iterator[None]:
    """Let SIGTERM not reach a process started here: a service manager sends it to all, and it is meant for us."""
    if METHOD != "forkserver":
        yield
        return
    resource_tracker.ensure_running()  # before, for starting it lets SIGTERM through
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of this thread, and of what it starts
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def enter(entry: str, connection: Connection, settings: Settings) -> None:
    """Run a function of the worker, in whose process alone torch is imported."""
    from lucidetr.deployment.service import worker

    getattr(worker, entry)(connection, settings)


def busy(message: str) -> HTTPException:
    """Return the refusal of a request that may come again in a moment."""
    return HTTPException(503, f"{message}; try again in a moment", BUSY)


class Keeper:
    """Hold the jobs that wait and the process that does them; `about` says what the model is, once it is loaded."""

    def __init__(self, settings: Settings, metrics: Metrics, on_ready: Callable[[], None], on_end: Callable[[], None]):
        self.settings = settings
        self.metrics = metrics
        self.on_ready, self.on_end = on_ready, on_end
        self.waiting: deque[tuple[Job, asyncio.Future[Answer]]] = deque()
        self.underway: list[asyncio.Future[Answer]] = []
        self.arrived = asyncio.Event()
        self.about: dict[str, Any] | None = None
        self.samples: list[Sample] = []
        self.gathered = asyncio.Event()
        self.ready = False
        self.failure = ""
        self.deaths: deque[float] = deque(maxlen=MANY)  # when the last workers died, by the loop's clock
        self.process: Any = None
        metrics.waiting.set_function(lambda: len(self.waiting))

    def admit(self) -> None:
        """Refuse a request that could not even wait."""
        if not self.ready:
            raise busy("the model is being loaded")
        if len(self.waiting) >= self.settings.queue:
            self.metrics.refused.inc()
            raise busy(f"{len(self.waiting)} pictures wait already")

    async def ask(self, job: Job) -> Answer:
        """Return the answer to a job, after those that came before it; one given up while it waits frees its place."""
        self.admit()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.append((job, answer))
        self.arrived.set()
        try:
            return await answer
        except asyncio.CancelledError:
            self.waiting = deque(each for each in self.waiting if each[1] is not answer)
            raise

    @property
    def falls(self) -> bool:
        """Say whether one worker after the other dies."""
        now = asyncio.get_running_loop().time()
        return len(self.deaths) == MANY and now - self.deaths[0] < WITHIN

    async def run(self) -> None:
        """Start a worker, and another whenever it dies, until cancelled or until the first cannot load the model."""
        pause = 0.0
        try:
            while True:
                pause = await self.one_life(pause)
                self.deaths.append(asyncio.get_running_loop().time())
                if self.about is None:
                    self.failure = self.failure or "the process that loads the model has died; is there memory enough?"
                    return
                log.warning("the process that computes has ended; it is started again")
                self.metrics.restarts.inc()
                await asyncio.sleep(pause)
        finally:
            self.on_end()

    async def one_life(self, pause: float) -> float:
        """Start a worker and feed it until it dies; return how long to wait before the next."""
        longer = min(2 * pause + 0.5, LONGEST_PAUSE)
        try:
            connection = await asyncio.to_thread(self.begin)
        except (EOFError, OSError) as error:  # no memory for another process, or no process to fork it from
            log.warning("the process that computes cannot be started: %s", error)
            return longer
        died = asyncio.create_task(asyncio.to_thread(self.process.join))
        fed = asyncio.create_task(self.feed(connection))
        try:
            await asyncio.wait({died, fed}, return_when=asyncio.FIRST_COMPLETED)
            return 0.0 if self.ready and not self.falls else longer
        finally:
            fed.cancel()
            self.kill()  # a thread may be listening to it, and ends when it does
            with suppress(asyncio.CancelledError, EOFError, OSError):
                await fed
            await died
            connection.close()
            self.ready = False
            self.send_away()

    def begin(self) -> Connection:
        """Start a worker and return our end of the connection; blocks, so a thread does it."""
        self.process, connection = start("work", self.settings)
        return connection

    async def feed(self, connection: Connection) -> None:
        """Give a worker what waits, a few jobs at a time, until an error says that it has died or hangs."""
        loaded, said = await asyncio.to_thread(connection.recv)
        if not loaded:
            if self.about is None:
                self.failure = said
            else:
                log.warning("the model cannot be loaded again: %s", said)
            return
        if self.about is None:
            self.on_ready()
        self.about, self.ready = said, True
        while True:
            self.arrived.clear()
            while self.waiting:
                some = [self.waiting.popleft() for _ in range(min(self.settings.batch, len(self.waiting)))]
                self.underway = [answer for _, answer in some]
                self.metrics.batches.observe(len(some))
                async with asyncio.timeout(PATIENCE):
                    await asyncio.to_thread(connection.send, [job for job, _ in some])
                for _ in some:
                    async with asyncio.timeout(PATIENCE):
                        index, answer = await asyncio.to_thread(connection.recv)
                    if not self.underway[index].done():  # its client may have gone
                        self.underway[index].set_result(answer)
            await self.arrived.wait()

    def send_away(self) -> None:
        """Refuse all whose answer can no longer come."""
        for answer in [*self.underway, *(answer for _, answer in self.waiting)]:
            if not answer.done():
                answer.set_exception(busy("the process that computes has ended and is started again"))
        self.waiting.clear()

    async def gather(self) -> None:
        """Fetch sample pictures by a process of its own: a large data set takes long to open."""
        process, note = None, "no sample pictures: the process that reads them has died"
        try:
            with suppress(EOFError, OSError):  # said below
                process, connection = await asyncio.to_thread(start, "gather", self.settings)
                self.samples, note = await asyncio.to_thread(connection.recv)
        finally:
            if process:
                process.kill()
            self.gathered.set()
        if note:
            log.warning("%s", note)

    def kill(self) -> None:
        """End the worker, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
