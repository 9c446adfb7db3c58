"""Many processes that train as one: each takes its share of every batch, all take the same step (Li et al. 2020).

torchrun starts the processes, torch's DistributedDataParallel sums their gradients. Here stands what the two do not
know: what must be counted over all ranks, what they must agree on, and who is missing when one does not answer.
"""

import atexit
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lucidetr.errors import InputError, LostRank
from lucidetr.structures import Detections
from lucidetr.training.precision import choose_device

PATIENCE = 3.0  # seconds to wait for a sign of the others before saying who is missing
POLL = 0.05  # seconds between two looks for ranks that have yet to come


@dataclass(frozen=True)
class Ranks:
    """Know this process's place among those that train together; alone, nothing is exchanged.

    `local` counts within the machine. What is exchanged here are numbers about a step, on the host.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Say whether this is the rank that writes, saves and speaks."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Return (rank, size): whose share of a batch or of a split is wanted."""
        return self.rank, self.size

    def gather(self, numbers: list[int]) -> list[int]:
        """Return all ranks' numbers, rank by rank; each gives equally many."""
        if self.size == 1:
            return numbers
        mine = torch.tensor(numbers)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return torch.cat(everyone).tolist()

    def total(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum over all ranks of each of some tensors."""
        if self.size == 1:
            return dict(terms)
        flat = torch.cat([term.detach().to("cpu", torch.float64).flatten() for term in terms.values()])
        dist.all_reduce(flat)
        sums = flat.split([term.numel() for term in terms.values()])
        return {name: part.view(term.shape) for (name, term), part in zip(terms.items(), sums, strict=True)}

    def agree(self, seconds: float = 0.0, signal: int | None = None) -> tuple[float, int | None]:
        """Return the seconds of rank 0's clock, and a signal that came to any rank, when all have come here."""
        if self.size == 1:
            return seconds, signal
        said = torch.tensor([seconds if self.first else 0.0, float(signal or 0)], dtype=torch.float64)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        seconds, number = said.tolist()
        return seconds, int(number) or None

    def wait_for_all(self) -> None:
        """Return when all ranks have come here."""
        self.agree()

    def interleave(self, mine: list[list[Detections]]) -> list[list[Detections]]:
        """Return on rank 0 everyone's batches of detections, dealt back in turn; nothing on the others.

        Batch i of a split was that of rank i mod size.
        """
        if self.size == 1:
            return mine
        arrays = [[(d.boxes_xyxy.numpy(), d.scores.numpy(), d.labels.numpy()) for d in batch] for batch in mine]
        categories = next((d.categories for batch in mine for d in batch), None)
        everyone: list = [None] * self.size
        dist.gather_object((arrays, categories), everyone if self.first else None)
        if not self.first:
            return []
        known: Any = next((names for _, names in everyone if names is not None), None)  # None: no image at all
        turns = zip_longest(*[batches for batches, _ in everyone])
        return [
            [Detections(*map(torch.from_numpy, found), categories=known) for found in batch]
            for turn in turns
            for batch in turn
            if batch is not None
        ]

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Let rank 0 go through before the others, so that what it downloads lies there for them."""
        if not self.first:
            self.wait_for_all()
        yield
        if self.first:
            self.wait_for_all()

    def seed_step(self, seed: int, step: int) -> None:
        """Give dropout other draws than rank 0's, whose own stream goes on; the same whenever the step is repeated."""
        if self.rank:
            torch.manual_seed(int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1)[0]))


ALONE = Ranks()


def launched(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return this process's place as torchrun tells it, alone where nobody does.

    >>> launched({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    Ranks(rank=5, size=8, local=1)
    >>> launched({})
    Ranks(rank=0, size=1, local=0)
    """
    if not {"RANK", "WORLD_SIZE"} <= set(environment):
        return ALONE
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return Ranks(rank, size, int(environment.get("LOCAL_RANK", rank))) if size > 1 else ALONE


@contextmanager
def joined(minutes: float, engine: str = "fast") -> Iterator[Ranks]:
    """Connect with the other ranks that torchrun started, and wait for each of them up to so many minutes.

    When some fall silent, `LostRank` names them; those of this machine are killed when this process ends. The
    reference engine in several ranks is an InputError.
    """
    ranks = launched()
    if ranks.size == 1:
        yield ranks
        return
    if engine == "reference":
        raise InputError(f"--engine reference computes in one process, not in {ranks.size}: start it without torchrun")
    patience = timedelta(minutes=minutes)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = None
    try:
        found, rank, size = next(dist.rendezvous("env://", timeout=patience))
        store = _of_their_own(found, ranks, minutes)
        store.set(f"process/{ranks.rank}", f"{_launcher()} {os.getpid()}")
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        yield ranks
    except RuntimeError as error:
        if isinstance(error, LostRank) or not _between_ranks(error):
            raise
        reason = str(error).splitlines()[0]
        silent = _silent(store, ranks)
        # first this process must have said why it ends, for torchrun ends all as soon as it misses one
        atexit.register(_kill, _beside(store, silent))
        raise LostRank(
            f"rank {ranks.rank} of {ranks.size} waited for the others in vain: {_name(silent)} "
            f"(--timeout-minutes {minutes:g}; {reason}). Look for that rank's own message above or in its log"
        ) from error
    dist.destroy_process_group()


def _of_their_own(store: dist.Store, ranks: Ranks, minutes: float) -> dist.Store:
    """Return the part of a store that these very processes share, and no earlier ones.

    torchrun keeps one store over restarts. What the processes before have left there, such as their addresses, would
    mislead. So each rank asks under a name that nobody had before, and rank 0 answers where they meet.
    """
    name = uuid4().hex
    if not ranks.first:
        store.set(f"asks/{ranks.rank}", name)
        meeting = store.get(f"answers/{name}").decode()
        store.set(f"{meeting}/{ranks.rank}", "here")
        return dist.PrefixStore(meeting, store)
    missing, ends = list(range(1, ranks.size)), time.monotonic() + 60 * minutes
    while missing:
        if time.monotonic() > ends:
            raise LostRank(f"{_name(missing)} of {ranks.size} after {minutes:g} minutes: see its own machine's log")
        for rank in missing:
            if store.check([f"asks/{rank}"]):  # perhaps still the question of an earlier one
                store.set(f"answers/{store.get(f'asks/{rank}').decode()}", name)
        time.sleep(POLL)
        missing = [rank for rank in missing if not store.check([f"{name}/{rank}"])]
    return dist.PrefixStore(name, store)


def _between_ranks(error: RuntimeError) -> bool:
    """Say whether an error is about the connection, not about this rank's own work."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "tcpstore"))


def _silent(store: dist.Store | None, ranks: Ranks) -> list[int]:
    """Return the ranks that do not say within a few seconds that they, too, wait in vain."""
    try:
        if store is None:
            return []
        store.set(f"waits/{ranks.rank}", "in vain")
        time.sleep(PATIENCE)
        return [rank for rank in range(ranks.size) if not store.check([f"waits/{rank}"])]
    except RuntimeError:  # the store has gone with the rank or machine that held it
        return []


def _launcher() -> str:
    """Return a name of the process that started this one, the same for all that it started."""
    return f"{socket.gethostname()} {os.getppid()}"


def _beside(store: dist.Store | None, silent: list[int]) -> list[int]:
    """Return the processes of those silent ranks that the same torchrun started as this one."""
    try:
        known = [store.get(f"process/{rank}") for rank in silent if store and store.check([f"process/{rank}"])]
    except RuntimeError:  # the store has gone
        return []
    places = [text.decode().rpartition(" ") for text in known]
    return [int(process) for launcher, _, process in places if launcher == _launcher()]


def _kill(processes: list[int]) -> None:
    """Kill processes that hang: a frozen one does not heed torchrun's SIGTERM, and would be waited for."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _name(silent: list[int]) -> str:
    """Return who is missing, as a clause."""
    if not silent:
        return "no rank can be asked"
    return f"no sign of rank {', '.join(map(str, silent))}"


def place(name: str, ranks: Ranks) -> torch.device:
    """Return the device of that name for this rank: the GPU of its local number; what cannot be is an InputError.

    A GPU that is named by its number becomes the process's present one.
    """
    if ranks.size > 1 and torch.cuda.is_available() and name in ("auto", "cuda"):
        if ranks.local >= torch.cuda.device_count():
            raise InputError(
                f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, none for its process "
                f"{ranks.local + 1}; start as many processes as there are GPUs (torchrun --nproc-per-node gpu)"
            )
        torch.cuda.set_device(ranks.local)  # first, so that no rank touches another's
        name = f"cuda:{ranks.local}"
    device = choose_device(name)
    if ranks.size > 1 and (device.type == "mps" or (device.type == "cuda" and device.index != ranks.local)):
        fix = "cuda" if device.type == "cuda" else "cpu"
        raise InputError(f"--device {name} cannot be shared by {ranks.size} ranks: choose --device {fix}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # recordings and pinned memory are of the process's present one
    return device


def check_share(batch: int, ranks: Ranks) -> int:
    """Return how many images of a global batch are each rank's; one that does not divide is an InputError.

    >>> check_share(16, Ranks(0, 4))
    4
    """
    if batch % ranks.size:
        below = batch // ranks.size * ranks.size
        choice = f"{below} or {below + ranks.size}" if below else f"{ranks.size}"
        raise InputError(
            f"--batch {batch} cannot be shared evenly by {ranks.size} ranks: choose {choice} "
            "(it counts the images of all ranks, and no more than there are)"
        )
    return batch // ranks.size


def check_same_step(steps: list[int], folder: Path) -> None:
    """Refuse to go on from other steps on other ranks: not all of them see one folder as it is.

    >>> check_same_step([4, 4], Path("run"))
    """
    if len(set(steps)) > 1:
        each = ", ".join(f"rank {rank} after step {step}" for rank, step in enumerate(steps))
        raise InputError(
            f"{folder}: the ranks would not go on from one step ({each}): --out must be one folder that all machines "
            "see; where it is, wait until each shows the same files in its checkpoints"
        )


def cut(batch: int, micro_batch: int, ranks: Ranks) -> str:
    """Return how a global batch is cut, in words.

    >>> cut(16, 2, ALONE), cut(16, 2, Ranks(0, 4))
    ('batch 16 as 8 × 2', 'batch 16 as 4 ranks × 2 × 2')
    """
    share = check_share(batch, ranks)
    micro = min(micro_batch, share)
    several = f"{ranks.size} ranks × " if ranks.size > 1 else ""
    return f"batch {batch} as {several}{-(-share // micro)} × {micro}"


def share_batch_norm(model: nn.Module, device: torch.device, ranks: Ranks) -> list[str]:
    """Let the model's batch norms measure over all ranks where torch has a way; return what to know of it."""
    if ranks.size == 1 or not any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        return []
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, below the model itself
        return ["batch norm measures over all ranks (SyncBatchNorm)"]
    return [
        f"warning: batch norm measures the images of each rank by themselves, for SyncBatchNorm needs CUDA: "
        f"{ranks.size} ranks do not learn quite as one does; --model.backbone.norm group does"
    ]


@torch.no_grad()
def average_batch_norm(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the mean of their batch norms' running statistics, where each has measured its own."""
    if ranks.size == 1:
        return
    measuring = [part for part in model.modules() if type(part) is nn.BatchNorm2d and part.training]
    running = [each for part in measuring for each in (part.running_mean, part.running_var) if each is not None]
    if not running:
        return
    flat = torch.cat([each.flatten() for each in running])
    dist.all_reduce(flat)
    for each, mean in zip(running, (flat / ranks.size).split([each.numel() for each in running]), strict=True):
        each.copy_(mean)


def parallel(model: nn.Module, ranks: Ranks) -> Any:
    """Return what is called as the model is, and lets backward leave the mean of all ranks' gradients in it.

    The model itself stays as it is: it, not what is returned, is saved, averaged and evaluated. All ranks start from
    rank 0's weights. Every parameter that learns must take part in the loss, as it does under every config.
    """
    if ranks.size == 1:
        return model
    wrapped = DistributedDataParallel(model)
    wrapped.broadcast_buffers = False  # they are constants, or statistics that `average_batch_norm` sees to
    return wrapped


def exchange(forward: nn.Module, last: bool) -> AbstractContextManager:
    """Return what to open around a part's forward and backward: gradients travel once a step, with the last part."""
    alone = last or not isinstance(forward, DistributedDataParallel)
    return nullcontext() if alone else forward.no_sync()
