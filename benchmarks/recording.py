"""What it costs a run of lucid-xs to write down weights, gradients and matching (training/statistics.py).

A step with a look and one without any recording are taken in turn; noting the matching, which every step does, is too
cheap to show in a difference of steps and is timed by itself. Seconds are the processor's, of one thread, so that
other jobs beside it do not count.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import cycle, islice

import torch

from benchmarks.measure import RESULTS, alternate, provenance
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.data.batching import build_augmentation, training_steps
from lucidetr.recipes import recipe
from lucidetr.training.engine import FAST
from lucidetr.training.loop import Run
from lucidetr.training.progress import ProgressLine
from lucidetr.training.statistics import Recorder

MINUTES = 10  # of the run whose share is printed
DATA = "generated:digits?train=160&val=4"
ALWAYS = 10**6  # more looks than there are steps


def main(runs: int = 10) -> None:
    """Measure, print the share of a run, and append one line to results.jsonl."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(recipe("lucid-xs"), data=DATA, out=folder, minutes=MINUTES, device="cpu", precision="fp32")
        run = Run(config, ProgressLine(), FAST)
        with run.held, closing(run.log):
            seconds, size = measure(run, runs)
    step, noting = (statistics.median(seconds[name]) for name in ("step", "noting"))
    pairs = zip(seconds["step with a look"], seconds["step"], strict=True)
    look = statistics.median(with_look - without for with_look, without in pairs)
    looks = config.statistics + 1
    share = look * looks / (60 * MINUTES) + noting / step
    print(
        f"recording: {share:.2%} of a run of {MINUTES} minutes: {looks} looks of {1000 * look:.0f} ms and "
        f"{size / 1000:.0f} kB, and {1000 * noting:.2f} ms of every step of {1000 * step:.0f} ms"
    )
    settings = {"recipe": config.recipe, "batch": config.batch, "minutes": MINUTES, "looks": looks, "precision": "fp32"}
    line = provenance("recording", ("lucidetr", "torch")) | {"threads": torch.get_num_threads(), "settings": settings}
    line |= {"seconds": seconds, "look": look, "noting": noting, "line_bytes": size, "share": share}
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def measure(run: Run, runs: int) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of each step of a run with and without a look, those of noting, and the bytes of a look."""
    config, model = run.config, run.config.model
    augmentation = build_augmentation(config.augmentation, config.images)
    steps = training_steps(
        run.train_set, config.images, augmentation, seed=0, batch=config.batch, micro_batch=config.micro_batch
    )
    batches = list(islice(steps, len(run.train_set) // config.batch))
    steps.close()
    looking = Recorder(run.folder, model, looks=ALWAYS)
    looking.path.unlink(missing_ok=True)
    recorders = {"step": Recorder(run.folder, model, looks=0), "step with a look": looking}

    seconds: dict[str, list[float]] = {name: [] for name in recorders}

    def contender(name: str) -> Callable[[], None]:
        recorder, parts = recorders[name], cycle(batches)

        def work() -> None:
            run.recorder, looking.taken = recorder, -1  # always one behind what is due
            step, started = next(parts), time.process_time()
            run.step(step)
            recorder.write(1, 0.0)
            seconds[name].append(time.process_time() - started)

        return work

    alternate({name: contender(name) for name in recorders}, runs)
    size = looking.path.stat().st_size // (runs + 1)
    seconds = {name: values[1:] for name, values in seconds.items()}  # without the first, which warms up
    seconds["noting"] = time_noting(run, batches, runs)
    return seconds, size


def time_noting(run: Run, batches: list, runs: int) -> list[float]:
    """Return the seconds that it takes to note the matching of a step, each image seen before."""
    recorder, (part,) = Recorder(run.folder, run.config.model, looks=1), batches[0]
    with torch.no_grad():
        predictions = run.model(part.images, part.padding)
        norm = normalisers(part.counts.tolist(), run.config.model.num_queries, run.config.loss)
        losses = set_loss(predictions, part, norm, run.config.loss)
    seconds = []
    for _ in range(runs + 1):
        started = time.process_time()
        recorder.see_matching([part], [losses])
        seconds.append(time.process_time() - started)
    return seconds[1:]


if __name__ == "__main__":
    main()
