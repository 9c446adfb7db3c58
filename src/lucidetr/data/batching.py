"""The order of samples and the batches of a run, both a function of seed and position alone.

Sample number p of a run is number p % n of epoch p // n. Nothing is remembered from step to step, so a run that
is taken up again in the middle sees the same samples, and so does any number of machines: a share (rank, ranks) names
who of how many asks.
"""

import functools
import gc
import itertools
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lucidetr.config import AugmentationConfig, ImageConfig
from lucidetr.data.batch_augmentation import BatchAugmentation
from lucidetr.data.dataset import Dataset
from lucidetr.data.preprocessing import Sample, make_batch, resize, resized_size
from lucidetr.data.transforms import Augmentation
from lucidetr.errors import InputError
from lucidetr.structures import Batch, Target

GRACE_SECONDS = 10
AHEAD = 2  # steps that each reading process makes before they are asked for
HANDLES = 5  # open files that a part travels in, one for each of a Batch's tensors
OTHER_HANDLES = 256  # of everything else that a process has open
WHOLE = (0, 1)  # the share of one that is alone
Change = Augmentation | BatchAugmentation | None


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the samples in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of every random draw about one sample in one epoch."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])


def step_samples(count: int, seed: int, step: int, batch: int) -> list[tuple[int, int]]:
    """Return (epoch, index) of the samples of one optimiser step.

    >>> both = step_samples(4, seed=0, step=0, batch=2) + step_samples(4, seed=0, step=1, batch=2)
    >>> sorted(index for epoch, index in both)
    [0, 1, 2, 3]
    """
    positions = range(step * batch, (step + 1) * batch)
    return [(p // count, int(epoch_order(count, seed, p // count)[p % count])) for p in positions]


def fixed_sample(dataset: Dataset, images: ImageConfig, index: int) -> Sample:
    """Return one image resized as the config says, its boxes with it, nothing at random."""
    target = dataset.annotations.target(index)
    height, width = dataset.annotations.sizes[index].tolist()
    new_height, new_width = resized_size(height, width, images)
    square = images.resize == "square"
    image = dataset.square(index, images.size) if square else resize(dataset.image(index), (new_height, new_width))
    stretch = torch.tensor([new_width / width, new_height / height]).repeat(2)
    resized = Target(boxes_xyxy=target.boxes_xyxy * stretch, labels=target.labels)
    image_id = int(dataset.annotations.image_ids[index])
    return Sample(image, resized, image_id, (height, width))


def build_augmentation(config: AugmentationConfig, images: ImageConfig) -> Augmentation | BatchAugmentation:
    """Return what changes the training images: whole batches where all are squares of one side, else one by one."""
    at_once = images.resize == "square" and not config.crop and not config.scales
    return (BatchAugmentation if at_once else Augmentation)(config, images)


@dataclass(frozen=True)
class CountFrom:
    """Count steps from `start` on, without end, and say what share of the run is done when each is made."""

    start: int = 0
    progress: Callable[[int], float] = lambda step: 0.0  # of a run whose length nobody knows

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for step in itertools.count(self.start):
            yield step, self.progress(step)


FROM_THE_START = CountFrom()


class Cut(NamedTuple):
    """Say how a batch is cut: images of all ranks together, images passed at once, and whose share (rank, of)."""

    batch: int
    micro_batch: int
    share: tuple[int, int] = WHOLE


class Steps(TorchDataset):
    """Make the batches of one optimiser step, by its number and progress: what a worker process is asked for."""

    def __init__(self, dataset: Dataset, images: ImageConfig, augmentation: Change, seed: int, cut: Cut):
        self.dataset, self.images, self.augmentation, self.seed = dataset, images, augmentation, seed
        self.batch, self.micro_batch, (self.rank, self.ranks) = cut
        self.passed_over: set[int] = set()

    def __getitem__(self, index: tuple[int, float]) -> list[Batch] | InputError:
        try:
            return self.parts(*index)
        except InputError as error:
            return error  # raised where it is received: a worker's traceback would bury the message

    def parts(self, step: int, progress: float) -> list[Batch]:
        """Return this share of the batch of one step in parts."""
        own = self.batch // self.ranks
        chosen = step_samples(len(self.dataset), self.seed, step, self.batch)[self.rank * own :][:own]
        starts = range(0, own, self.micro_batch)
        return [self.part(chosen[at : at + self.micro_batch], progress) for at in starts]

    def part(self, chosen: list[tuple[int, int]], progress: float) -> Batch:
        """Return the samples of those (epoch, index) as one batch, or of the next ones where some shall be skipped."""
        try:
            return self.made(chosen, progress)
        except InputError:
            if not self.dataset.skips:
                raise
        return self.made([(epoch, self.readable(index)) for epoch, index in chosen], progress, self.readable)

    def readable(self, index: int) -> int:
        """Return the first image from this one on that can be read; what is passed over is said once by each reader."""
        for after in range(len(self.dataset)):
            there = (index + after) % len(self.dataset)
            try:
                self.dataset.image(there)
                return there
            except InputError as error:
                if there not in self.passed_over:
                    print(f"warning: skipped in training: {error}", file=sys.stderr, flush=True)
                self.passed_over.add(there)
        raise InputError(f"{self.dataset.name}: none of {len(self.dataset)} images can be read")

    def made(self, chosen: list[tuple[int, int]], progress: float, usable: Callable[[int], int] = int) -> Batch:
        """Return the samples of those (epoch, index) as one batch; `usable` stands in for what mosaics ask for."""
        change, indices = self.augmentation, [index for _, index in chosen]
        if change is None or progress >= change.config.until:
            return make_batch([fixed_sample(self.dataset, self.images, index) for index in indices], self.images)
        seeds = [sample_seed(self.seed, *each) for each in chosen]
        if isinstance(change, BatchAugmentation):
            return change(self.dataset, indices, seeds, progress, usable)
        samples = [self.sample(change, index, seed) for index, seed in zip(indices, seeds, strict=True)]
        return make_batch(samples, self.images)

    def sample(self, change: Augmentation, index: int, seed: int) -> Sample:
        """Return one augmented sample."""
        image, annotations = self.dataset.image(index), self.dataset.annotations
        changed, target = change(image, annotations.target(index), seed)
        height, width = image.shape[-2:]
        return Sample(changed, target, int(annotations.image_ids[index]), (height, width))


def training_steps(
    dataset: Dataset,
    images: ImageConfig,
    augmentation: Change,
    *,
    seed: int,
    batch: int,
    micro_batch: int,
    workers: int = 0,
    numbers: CountFrom = FROM_THE_START,
    share: tuple[int, int] = WHOLE,
) -> Generator[list[Batch], None, None]:
    """Yield the batches of each optimiser step that `numbers` counts, each step as parts of `micro_batch`.

    `batch` counts the images of all ranks and must divide by their number; what is yielded is the share's own. The
    counting is done in this process, up to two steps for each worker ahead of the step that is taken. A picture that
    cannot be read and a worker that died are InputErrors, raised where the next step's batches are asked for.
    """
    steps = Steps(dataset, images, augmentation, seed, Cut(batch, micro_batch, share))
    if workers:
        allow_open_files(workers, parts=-(-batch // share[1] // micro_batch))
    own = torch.Generator()  # the loader draws a number when it starts; not from the model's random state
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        generator=own,
        worker_init_fn=start_reading,
        # a GPU that this process computes on then fetches a batch by itself
        pin_memory=torch.cuda.is_initialized(),
    )
    others = multiprocessing.active_children()
    batches = iter(loader)
    readers = [process for process in multiprocessing.active_children() if process not in others]
    with deaths_wait() if readers else nullcontext():
        try:
            while True:
                parts = receive(batches, readers)
                if isinstance(parts, InputError):
                    raise parts
                yield parts
        finally:
            del batches  # ends the reading processes now, not when someone lets go of this generator


def allow_open_files(workers: int, parts: int) -> None:
    """Have the system allow as many open files as the tensors of all steps under way may need.

    Where its hard limit is too low this is an InputError: torch would wait for ever, or fail far from the cause.
    """
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":  # not on macOS and Windows
        return
    import resource

    # each reading process holds two for each tensor, this process one, of the steps ahead and of the one under way
    needed = max(workers, 2) * (AHEAD + 1) * parts * HANDLES + OTHER_HANDLES
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (allowed, most) and needed > most:
        raise InputError(
            f"--workers {workers} with a batch in {parts} parts can need {needed:,} open files, and the system allows "
            f"{most:,}: choose fewer --workers or a larger --micro-batch, or raise the limit (ulimit -n)"
        )
    if allowed != resource.RLIM_INFINITY and needed > allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


def receive(batches: Iterator[list[Batch] | InputError], readers: list[BaseProcess]) -> list[Batch] | InputError:
    """Return what comes next, or the error that it is not coming: one of the reading processes has died."""
    try:
        return find_death(readers) or next(batches)
    except RuntimeError:  # torch has waited in vain for one
        if death := find_death(readers):
            return death  # returned, so that nothing holds on to torch's error, and by it to the other processes
        raise


def find_death(readers: list[BaseProcess]) -> InputError | None:
    """Return what happened to the first reading process that is no more, None where all live."""
    status = next((process.exitcode for process in readers if process.exitcode is not None), None)
    if status is None:
        return None
    how = f"was killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"ended with {status}"
    return InputError(
        f"one of the {len(readers)} worker processes that read pictures {how}, most likely for lack of memory: "
        "choose fewer --workers, or give the machine or container more memory, shared memory included"
    )


@contextmanager
def deaths_wait() -> Iterator[None]:
    """Keep torch from raising an error wherever the process happens to be when a worker dies.

    That could be in the midst of an optimiser step. `receive` asks whether all live, between two steps.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield  # there torch does not do so
        return
    heeded = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, heeded)


def start_reading(worker: int) -> None:
    """Leave Ctrl-C to the process that trains, outlive SIGTERM until it has saved, and keep sharing its memory.

    Both signals reach a whole group of processes; a reading process that died at once would take the save with it.
    Python's search for cycles writes to every object that it looks at, and what is written to is no longer shared: it
    leaves out what was there before the fork.
    """
    gc.freeze()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(give_up)  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))  # the alarm ends the process


def give_up(error: Exception, batch: object) -> None:
    """End a reading process that cannot hand over a batch, for lack of shared memory most likely.

    Python would print a traceback and drop the batch, and training wait for it for ever. That a reader died is noticed.
    """
    print(f"lucidetr: a batch cannot be handed over ({error})", file=sys.stderr, flush=True)
    os._exit(1)


def evaluation_groups(dataset: Dataset, images: ImageConfig, batch: int) -> list[list[int]]:
    """Return the indices of all images in order, cut into batches.

    Only images of one size share a batch: none is padded, so no prediction depends on its neighbours (group norm
    measures padding too), and evaluation sees what prediction will see.
    """
    groups: list[list[int]] = []
    before = None
    for index, (height, width) in enumerate(dataset.annotations.sizes.tolist()):
        size = resized_size(height, width, images)
        if size == before and len(groups[-1]) < batch:
            groups[-1].append(index)
        else:
            groups.append([index])
        before = size
    return groups


def evaluation_batches(
    dataset: Dataset, images: ImageConfig, batch: int, share: tuple[int, int] = WHOLE
) -> Iterator[Batch]:
    """Yield the images, resized and nothing else, each once and in order, as `evaluation_groups` cuts them.

    Whole batches are dealt to the ranks in turn, so that every image is computed beside the same ones, and thus to
    the same last digit, whatever their number.
    """
    rank, ranks = share
    for group in evaluation_groups(dataset, images, batch)[rank::ranks]:
        yield make_batch([fixed_sample(dataset, images, index) for index in group], images)
