"""What each rank does in the tests of several processes, and how the processes are started."""

import contextlib
import io
import multiprocessing
import os
import re
import signal
import socket
import time
from dataclasses import replace

import torch
from torch import nn

from lucidetr.cli import evaluate
from lucidetr.config import TrainConfig
from lucidetr.data.batching import fixed_sample
from lucidetr.data.dataset import open_dataset
from lucidetr.data.preprocessing import make_batch
from lucidetr.errors import InputError, LostRank
from lucidetr.evaluation.detect import detect
from lucidetr.models.detr import DETR
from lucidetr.structures import Target
from lucidetr.training import loop
from lucidetr.training.distributed import ALONE, average_batch_norm, joined
from lucidetr.training.engine import FAST
from lucidetr.training.interrupt import Stopped
from lucidetr.training.progress import ProgressLine

# objects of the four images of each step: the first two are those of rank 0
OBJECTS = ((0, 0, 3, 1), (2, 1, 0, 0), (0, 0, 0, 0), (0, 3, 1, 0), (1, 0, 2, 3))


def together(size: int, folder, work, *arguments, seconds: float = 100) -> list:
    """Start processes that know of each other as torchrun's do, and return what `work` returned in each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lucidetr.training.loop"])  # torch is imported once, not once for each rank
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        context.Process(target=_as_rank, args=(rank, size, port, folder, work, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    ends = time.monotonic() + seconds
    for process in processes:
        process.join(max(ends - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size, f"exit codes {codes} (None: still running after {seconds} s)"
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _as_rank(rank, size, port, folder, work, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(work(*arguments), folder / f"{rank}.pt")


class Spy:
    """Take the place of a run's recorder and keep every step's gradients, as they are before the clip."""

    def __init__(self):
        self.gradients = []

    def see_gradients(self, model):
        kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(kept)

    def nothing(self, *arguments):
        pass

    begin = see_predictions = see_matching = see_update = write = nothing


def five_steps(config: TrainConfig, micro_batch: int, ranks=ALONE) -> dict:
    """Take five steps over four images each and return every step's gradients and the weights at the end."""
    run = loop.Run(config, ProgressLine(quiet=True), FAST, ranks)
    run.recorder = spy = Spy()
    own = 4 // ranks.size
    losses = []
    with run.held:
        for step, objects in enumerate(OBJECTS):
            samples = []
            for place in range(ranks.rank * own, (ranks.rank + 1) * own):
                sample = fixed_sample(run.train_set, config.images, 4 * step + place)
                few = Target(sample.target.boxes_xyxy[: objects[place]], sample.target.labels[: objects[place]])
                samples.append(replace(sample, target=few))
            parts = [make_batch(samples[at : at + micro_batch], config.images) for at in range(0, own, micro_batch)]
            losses.append(ranks.total({"loss": run.step(parts)["loss"]})["loss"])
            run.clock.step += 1
    return {"gradients": spy.gradients, "weights": run.model.state_dict(), "losses": torch.stack(losses)}


def resume_elsewhere(config: TrainConfig, folders: tuple[str, ...]) -> str:
    """Resume as one of several ranks, each in a folder of its own, and return why that is refused."""
    with joined(config.timeout_minutes) as ranks:
        try:
            loop.Run(replace(config, out=folders[ranks.rank]), ProgressLine(quiet=True), FAST, ranks)
        except InputError as error:
            return str(error)
    return "it goes on"


def many_things(folder, configs: dict[str, TrainConfig], source: str) -> dict:
    """Do as one of several ranks all that needs no run of its own."""
    made: dict = {}
    some = next(iter(configs.values()))
    with joined(some.timeout_minutes) as ranks:
        for name, config in configs.items():
            for micro_batch in (2, 1):
                out = replace(config, out=str(folder / f"{name}-{micro_batch}"))
                made[name, micro_batch] = five_steps(out, micro_batch, ranks)
        for batch in (2, 1):
            made["found", batch] = found(some, source, batch, share=ranks.share, gather=ranks.interleave)
        made["gathered"] = ranks.gather([ranks.rank, 7])
        made["agreed"] = ranks.agree(5.0 - ranks.rank, signal.SIGTERM if ranks.rank else None)
        norm = nn.BatchNorm2d(2)
        norm(torch.full((2, 2, 1, 1), float(ranks.rank)))
        average_batch_norm(norm, ranks)
        made["running_mean"] = norm.running_mean
        try:
            loop.Run(replace(some, out=str(folder / "odd"), batch=3), ProgressLine(quiet=True), FAST, ranks)
        except InputError as error:
            made["refused"] = str(error)
        ranks.seed_step(0, 3)
        made["draw"] = torch.rand(3)
        torch.manual_seed(5)
        ranks.seed_step(0, 3)
        made["same draw"] = torch.rand(3)
    return made


def found(config: TrainConfig, source: str, batch: int, **how) -> list:
    """Return boxes, scores and labels that an untrained model finds in the validation split."""
    dataset = open_dataset(source, "val")
    torch.manual_seed(0)
    model = DETR(config.model)
    detections = detect(model, dataset, config.images, dataset.annotations.categories, batch=batch, **how)
    return [(d.boxes_xyxy, d.scores, d.labels) for d in detections]


def train_noting(config: TrainConfig, stop_in_step: int = 0, signalled: int = 0) -> dict:
    """Train, noting the images of every step; the rank `signalled` gets SIGTERM in that step."""
    step, every, seen = loop.Run.step, loop.LOG_EVERY, []

    def noted(self, parts):
        seen.append([i for part in parts for i in part.image_ids])
        if self.clock.step + 1 == stop_in_step and self.ranks.rank == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, parts)

    loop.Run.step, loop.LOG_EVERY = noted, 1
    try:
        loop.train(config)
        ended = "done"
    except Stopped as stopped:
        ended = f"stopped with {stopped.status}"
    finally:
        loop.Run.step, loop.LOG_EVERY = step, every
    return {"seen": seen, "ended": ended}


def evaluated(*arguments: object) -> str:
    """Evaluate from the command line and return what is printed but for the progress."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        evaluate.run([str(each) for each in arguments])
    return re.sub(r"^ *\d+%  .*\n", "", said.getvalue(), flags=re.MULTILINE)


def lose_a_picture(config: TrainConfig, loser: int) -> str:
    """Train; of the ranks one cannot read its pictures after two steps. Return what this one says of it."""
    steps_of = loop.training_steps

    def losing(*arguments, share, **how):
        for number, parts in enumerate(steps_of(*arguments, share=share, **how)):
            if number == 2 and share[0] == loser:
                raise InputError("a.png: no such image file")
            yield parts

    loop.training_steps = losing
    try:
        loop.train(config)
    except InputError as error:
        return str(error)
    finally:
        loop.training_steps = steps_of
    return "nothing"


def fall_silent(minutes: float) -> str:
    """Wait, as rank 0, for a rank that has fallen asleep, and return what is said of it."""
    try:
        with joined(minutes) as ranks:
            if ranks.rank:
                time.sleep(12)
            else:
                ranks.gather([1])
    except LostRank as lost:
        return str(lost)
    return "nothing"
