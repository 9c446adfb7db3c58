"""AP against training time from random weights, on the same files and cores: our recipes and transformers' detectors.

    python -m benchmarks.time_to_ap --data generated:digits --minutes 10 --contenders lucid-xs,transformers-rtdetrv2
    python -m benchmarks.time_to_ap --draw docs/time_to_ap.svg --clock processor --device "cpu, bf16"

All contenders get the same batches in the same order, are evaluated on the same split at the same shares of the
budget, and only the time of training counts. A peer computes in the fastest of four ways and learns at the best of
several rates and batches, found by shorter trials. What a file of results holds already is not run again.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.ap_curves import average, draw, table
from benchmarks.measure import hardware, provenance
from benchmarks.peers import MUON, PEERS, PUBLISHED, QUERIES, Course, Way, measure_ways, train_peer
from lucidetr.config import OptimiserConfig, TrainConfig
from lucidetr.data.dataset import Dataset, open_dataset
from lucidetr.deployment.detector import load
from lucidetr.errors import InputError, did_you_mean
from lucidetr.evaluation.coco import evaluate
from lucidetr.evaluation.detect import detect
from lucidetr.recipes import RECIPES, recipe
from lucidetr.studies.experiment import fingerprint
from lucidetr.training.loop import train
from lucidetr.training.precision import choose_device, choose_precision
from lucidetr.training.run_log import processor, read_metrics

LIBRARIES = ("lucidetr", "torch", "torchvision", "transformers")
CONTENDERS = ("lucid-xs", "detr-xs", *PUBLISHED)
MINUTES, SEED = 10.0, "0"
# settings that a line holds only where they are not the usual
SAID_OF_FEW = ("device", "turns", "queries", "workers", "bad_boxes")
PEER_OPTIMISER = OptimiserConfig(schedule="cosine", warmup=0.03, clip=0.1, ema=0.03)  # clip and decay as published


@dataclass(frozen=True)
class Options:
    """Train each contender for the same time and write down how its AP rises; or draw what was written down."""

    data: str = "generated:digits"
    """A folder with COCO json files, or generated:digits."""
    side: int = 128
    """All images are squares of this side; a multiple of 32."""
    minutes: float = 0.0
    """Of training, for each contender and seed. 0: ten; to draw, runs of any length."""
    contenders: str = ""
    """Recipes and peers; transformers-rtdetrv2+muon: a peer whose matrices step by Muon. Empty: lucid-xs, detr-xs and
    the peers as they are published; to draw, all that there are."""
    seeds: str = ""
    """Empty: 0; to draw, all that there are."""
    trial_minutes: float = 2.0
    """Length of the trials that choose a peer's rate and batch."""
    rates: str = "1e-4,3e-4,1e-3"
    """Learning rates that a peer tries; a single one is taken as it is."""
    batches: str = "8,16"
    """Batches that a peer tries: the rates with the first, then the best rate with the others."""
    precision: Literal["fastest", "fp32", "bf16"] = "fastest"
    """How peers compute. fastest: measured for each of them and each batch, with and without channels_last."""
    augmentation: str = "lucid-xs"
    """All contenders get the augmentation and the pixel normalisation of this recipe."""
    turns: bool = False
    """Mirror pictures both ways and turn them by quarters, too: for pictures without an up and a left."""
    queries: int = 0
    """Of every contender, more than a picture has objects. 0: 30 of a peer, and a recipe's own."""
    evaluations: int = 10
    threads: int = 1
    clock: Literal["wall", "processor"] = "wall"
    """What minutes count; processor: one thread's own time, which other jobs cannot take away."""
    device: str = "cpu"
    """To draw: "cpu, bf16" for processors that multiply bf16, a GPU's name as torch says it."""
    workers: int = 0
    """Processes that read and augment pictures for each contender."""
    split: str = ""
    """Evaluate what stands at the end on this split too: test, for data that have one."""
    bad_boxes: Literal["refuse", "drop"] = "refuse"
    out: str = "benchmarks/time_to_ap.jsonl"
    draw: str = ""
    """Run nothing: draw the runs in --out of this data, side, threads, clock and device, and print them as a table; of
    them those alone that --contenders, --seeds, --minutes and --split name."""

    @property
    def asked(self) -> dict[str, Any]:
        """Return what lines say of the settings that are seldom changed: nothing where they are not."""
        said = {"turns": self.turns, "queries": self.queries, "workers": self.workers}
        said["bad_boxes"] = self.bad_boxes if self.bad_boxes != "refuse" else ""
        return {key: value for key, value in said.items() if value}

    @property
    def place(self) -> dict[str, str]:
        """Return what lines say of the device: nothing of a CPU that computes in float32."""
        if self.draw:
            return {"device": self.device} if self.device != "cpu" else {}
        device = choose_device(self.device)
        if device.type != "cpu":
            return {"device": hardware(device)["device"]}
        return {"device": "cpu, bf16"} if choose_precision("auto", device) == "bf16" else {}

    def named(self, settings: dict[str, Any]) -> bool:
        """Say whether a run has one of the contenders, seeds, minutes and splits that are named, or none is."""
        lists = {"contender": self.contenders, "seed": self.seeds, "split": self.split}
        if any(words and str(settings.get(key)) not in words.split(",") for key, words in lists.items()):
            return False
        return self.minutes in (0.0, settings["minutes"])


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, or draw."""
    options = tyro.cli(Options, args=arguments or [], prog="python -m benchmarks.time_to_ap")
    journal = Journal(Path(options.out))
    if options.draw:
        same = {"data": options.data, "side": options.side, "threads": options.threads}
        same |= {"clock": options.clock, "role": "run"} | options.asked | options.place
        curves = average([line for line in journal.lines_with(same) if options.named(line["settings"])])
        if not curves:
            raise InputError(
                f"{options.out}: no run with {same} that --contenders, --seeds, --minutes and --split name, too; "
                "--clock, --threads and --device choose others"
            )
        draw(curves, Path(options.draw))
        print(table(curves))
        return
    names = options.contenders.split(",") if options.contenders else CONTENDERS
    for name in names:
        if name not in (*PEERS, *RECIPES):
            raise InputError(f"unknown contender {name}: {did_you_mean(name, (*PEERS, *RECIPES))}")
    if options.side % 32:
        raise InputError(f"--side {options.side}: choose a multiple of 32, the coarsest stride of the peers")
    torch.set_num_threads(options.threads)
    bench = Bench(options, journal)
    for name in names:
        bench.run(name)


class Journal:
    """Hold the lines of a results file, and add to them."""

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def lines_with(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the lines whose settings are these, whatever else they say; what is said of few must be equal, too."""
        alike = [line for line in self.lines if all(line["settings"].get(k) == settings.get(k) for k in SAID_OF_FEW)]
        return [line for line in alike if settings.items() <= line["settings"].items()]

    def made_here(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return those of them that a machine like this one wrote."""
        return [line for line in self.lines_with(settings) if line["machine"] == processor()]

    def add(self, settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Append one line with the settings, the machine and the code, and return it."""
        line = provenance("time_to_ap", LIBRARIES) | {"settings": settings, **result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        if line.get("points"):
            print(f"  AP {line['AP']:.3f} after {line['points'][-1][0]:.0f} s of training", flush=True)
        return line


class Bench:
    """Run contenders, each training only once."""

    def __init__(self, options: Options, journal: Journal):
        self.options, self.journal = options, journal
        self.seeds = [int(seed) for seed in (options.seeds or SEED).split(",")]
        self.rates = [float(lr) for lr in options.rates.split(",")]
        self.batches = [int(batch) for batch in options.batches.split(",")]

    def run(self, name: str) -> None:
        """Train one contender with every seed."""
        lr, batch = self.choose(name) if name in PEERS else (recipe(name).optimiser.lr, recipe(name).batch)
        for seed in self.seeds:
            self.train(name, "run", lr, batch, seed)

    def choose(self, name: str) -> tuple[float, int]:
        """Return the rate and the batch that a peer's trials like best."""
        first, *others = self.batches
        ways = [(lr, first) for lr in self.rates]
        if len(ways) > 1:
            ways = [max(ways, key=lambda way: self.trial(name, *way))]
        ways += [(ways[0][0], batch) for batch in others]
        return max(ways, key=lambda way: self.trial(name, *way)) if len(ways) > 1 else ways[0]

    def trial(self, name: str, lr: float, batch: int) -> list[float]:
        """Return AP and AP50 at the end of a trial, nothing where it ended in numbers that are not finite."""
        points = self.train(name, "trial", lr, batch, self.seeds[0])["points"]
        return list(points[-1][1:]) if points else []

    def train(self, name: str, role: Literal["trial", "run"], lr: float, batch: int, seed: int) -> dict[str, Any]:
        """Return the line of a training, from the journal or new."""
        options = self.options
        config = self.config(name, seed, batch, lr)
        if role == "trial":
            config = replace(config, minutes=options.trial_minutes, evaluations=1)
        settings = self.settings(name, batch) | {
            "role": role,
            "minutes": config.minutes,
            "evaluations": config.evaluations,
            "seed": seed,
            "lr": lr,
            "augmentation": options.augmentation,
            "split": options.split if role == "run" else "",
        }
        way = self.way(name, batch, config) if name in PEERS else None
        settings |= asdict(way) if way else {"config": fingerprint(config)}
        if known := self.journal.made_here(settings):
            print(f"known: {name}: {role}, {config.minutes:g} min, rate {lr:g}, batch {batch}, seed {seed}", flush=True)
            return known[-1]
        print(f"{name}: {role}, {config.minutes:g} min, rate {lr:g}, batch {batch}, seed {seed}", flush=True)
        other = open_dataset(options.data, options.split, options.bad_boxes) if settings["split"] else None
        if way is None:
            return self.journal.add(settings, train_recipe(config, other).as_line())
        try:
            line = train_peer(name, config, way, other).as_line()
        except FloatingPointError as error:
            if role == "run":
                raise
            line = {"points": [], "failed": str(error)}
        return self.journal.add(settings, line)

    def settings(self, name: str, batch: int) -> dict[str, Any]:
        """Return what every line says about a contender."""
        options = self.options
        same = {"data": options.data, "side": options.side, "threads": options.threads, "clock": options.clock}
        return same | {"contender": name, "batch": batch} | options.asked | options.place

    def config(self, name: str, seed: int, batch: int, lr: float) -> TrainConfig:
        """Return a recipe's config, or for a peer one with its batch and optimiser, on the images that all share."""
        options, shared = self.options, recipe(self.options.augmentation)
        matrices = "muon" if name.endswith(MUON) else "adamw"
        optimiser = replace(PEER_OPTIMISER, lr=lr, backbone_lr=lr, matrices=matrices)
        peer = replace(shared, recipe=name, optimiser=optimiser)
        base = replace(peer, batch=batch, micro_batch=batch) if name in PEERS else recipe(name)
        queries = options.queries or (QUERIES if name in PEERS else base.model.num_queries)
        flips = {"flip": 0.5, "flip_vertical": 0.5, "turn": 0.5} if options.turns else {}
        return replace(
            base,
            model=replace(base.model, num_queries=queries),
            data=options.data,
            bad_boxes=options.bad_boxes,
            images=replace(shared.images, resize="square", size=options.side),
            augmentation=replace(shared.augmentation, scales=(), crop=0.0, **flips),
            minutes=options.minutes or MINUTES,
            evaluations=options.evaluations,
            seed=seed,
            device=options.device,
            workers=options.workers,
            clock=options.clock,
            preflight="off",
            statistics=0,
        )

    def way(self, name: str, batch: int, config: TrainConfig) -> Way:
        """Return the fastest way of a peer at this batch, measured once."""
        if self.options.precision != "fastest":
            return Way(self.options.precision, channels_last=True)
        settings = self.settings(name, batch) | {"role": "speed"}
        known = self.journal.made_here(settings)
        if not known:
            ways = [asdict(way) | {"images_per_second": speed} for way, speed in measure_ways(name, config).items()]
            known = [self.journal.add(settings, {"ways": ways})]
            for each in ways:
                print("  " + ", ".join(f"{key} {value}" for key, value in each.items()), flush=True)
        best = max(known[-1]["ways"], key=lambda each: each["images_per_second"])
        return Way(best["precision"], best["channels_last"])


def train_recipe(config: TrainConfig, other: Dataset | None) -> Course:
    """Train one of our recipes by the loop that users have; evaluate its last model on `other` too."""
    with tempfile.TemporaryDirectory() as folder:
        lines = read_metrics(train(replace(config, out=folder)))
        detector = load(Path(folder) / "last.safetensors", config.device, config.precision)
    looks = [line for line in lines if "val/AP" in line]
    numbers = None
    if other:
        images, categories = detector.card.images, detector.card.categories
        found = detect(detector.model, other, images, categories, batch=config.batch, precision=detector.autocast)
        numbers = evaluate(other.annotations, found).numbers
    return Course(
        points=[(line["seconds"], line["val/AP"], line["val/AP50"]) for line in looks],
        images_per_second=looks[-1]["step"] * config.batch / looks[-1]["seconds"],
        parameters=sum(p.numel() for p in detector.model.parameters()),
        other_split=numbers,
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"time_to_ap: {error}")
