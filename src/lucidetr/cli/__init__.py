"""The command line: one file for each verb, imported only when its verb runs, so that --help answers at once."""

import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from io import TextIOWrapper

from lucidetr.errors import InputError, LostRank, did_you_mean

USAGE = """\
lucidetr: DETR from scratch that you can read, train on one machine, and look inside

  lucidetr demo                                  train on generated scenes, evaluate, draw (minutes)
  lucidetr train [RECIPE] --data DATA --out RUN  train a detector (--epochs, --steps or --minutes); without a recipe
                                                 the one that fits the data
  lucidetr eval RUN --data DATA --split val      COCO's twelve numbers, and AP by category
  lucidetr predict RUN PICTURE|FOLDER|VIDEO … --out DIR
                                                 draw what it finds, write it as JSON, a table or cut-out objects
  lucidetr inspect RUN                           look inside: one page of figures, with a warning where one is due
  lucidetr convert SOURCE OUT                    other projects' weights to ours, or ours to theirs
  lucidetr export RUN --format onnx              one file for ONNX Runtime, OpenVINO or torch, compared with the model
  lucidetr serve RUN                             a web service, and a page where one can watch the model think
  lucidetr doctor DATA                           everything that is wrong or odd in a data set; it only reads
  lucidetr data convert DATA DIR --to yolo       any data set as a new folder; also: split, sample (a sheet of pictures)
  lucidetr recipes                               the named models and their sizes; --ladder, --neighbours
  lucidetr study NAME --out DIR                  make a study's figures and table anew: start, ladder, …

DATA is a COCO, YOLO or Pascal VOC folder, or generated:digits.
`lucidetr VERB --help` lists every option; any setting of a recipe can be changed: --model.num-queries 50
"""

VERBS = {
    "demo": "lucidetr.cli.demo",
    "train": "lucidetr.cli.train",
    "eval": "lucidetr.cli.evaluate",
    "predict": "lucidetr.cli.predict",
    "inspect": "lucidetr.cli.inspect",
    "convert": "lucidetr.cli.convert",
    "export": "lucidetr.cli.export",
    "serve": "lucidetr.cli.serve",
    "doctor": "lucidetr.cli.doctor",
    "data": "lucidetr.cli.data",
    "recipes": "lucidetr.cli.recipes",
    "study": "lucidetr.cli.study",
}
TOGETHER = ("train", "eval")  # what several processes can do as one


def main() -> None:
    """Run the verb given on the command line; a user's mistake is one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a file's name may hold bytes that are no letters
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            start(sys.argv[1:])
        finally:
            print(end="", flush=True)  # at its own end Python could only complain of a closed pipe
    except InputError as error:
        print(f"lucidetr: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, LostRank) as error:  # training met numbers that are not finite, or waited in vain
        print(f"lucidetr: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except NotImplementedError as error:
        if not (operation := missing_on_mps(error)):
            raise
        fix = "set PYTORCH_ENABLE_MPS_FALLBACK=1 to compute it on the CPU, or choose --device cpu"
        print(f"lucidetr: --device mps: torch has no {operation} for Apple's GPUs; {fix}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read what we print has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        sys.exit(141)  # what a shell says of other programs then: 128 + SIGPIPE; 1 would mean faults found by doctor
    except OSError as error:  # the disk's mistake: full, read-only, a file where a folder should be
        print(f"lucidetr: {error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("lucidetr: stopped", file=sys.stderr)
        sys.exit(getattr(stop, "status", 130))


def start(arguments: list[str]) -> None:
    """Run the verb that the arguments begin with; without one, say which there are."""
    verb, *rest = arguments or ["help"]
    if verb in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif verb == "--version":
        from importlib.metadata import version

        print(version("lucidetr"))
    elif verb in VERBS:
        check_alone(verb)
        import_module(VERBS[verb]).run(rest)
    else:
        raise InputError(f"unknown verb {verb}: {did_you_mean(verb, VERBS)}")


def check_alone(verb: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a verb that torchrun has started several times, where the processes cannot share the work.

    >>> check_alone("eval", {"RANK": "0", "WORLD_SIZE": "2"})
    >>> check_alone("predict", {"RANK": "0", "WORLD_SIZE": "1"})
    """
    if verb not in TOGETHER and "RANK" in environment and int(environment.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"only train and eval run over several processes: start {verb} without torchrun")


def missing_on_mps(error: NotImplementedError) -> str:
    """Return the operation that torch says it has not for Apple's GPUs, nothing where it speaks of something else.

    >>> missing_on_mps(NotImplementedError("The operator 'aten::foo' is not currently implemented for the MPS device."))
    'aten::foo'
    """
    found = re.search(r"operator '([^']+)'.*\bMPS\b", str(error), re.DOTALL)
    return found[1] if found else ""
