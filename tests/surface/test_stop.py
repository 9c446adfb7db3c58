"""Ctrl-C in the verbs that train on their own account: what they say of going on is true."""

import signal
from dataclasses import replace

import pytest

from lucidetr.cli import demo
from lucidetr.recipes import DETR_XS, LADDER
from lucidetr.studies import ladder
from lucidetr.training import loop
from lucidetr.training.run_log import read_metrics
from run_tools import TINY, tiny
from surface_tools import lucidetr


@pytest.fixture
def interrupted(monkeypatch):
    """Let a signal come in the first step of the first run, and in no other."""
    step, steps = loop.Run.step, []

    def signalled(self, parts):
        steps.append(1)
        if len(steps) == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", signalled)


def test_a_study_that_was_stopped_goes_on_with_the_same_command(tmp_path, monkeypatch, interrupted):
    name = LADDER[0].name
    monkeypatch.setattr(ladder, "contenders", lambda: iter([("rung", name, replace(tiny(""), steps=0))]))
    monkeypatch.setattr(ladder, "climb", lambda: iter([(LADDER[0], DETR_XS)]))
    command = ["study", "ladder", "--out", tmp_path, "--steps", 2, "--seeds", 1, "--threads", 1, "--data", TINY]
    said = lucidetr(*command, status=130)
    assert "the same command goes on with the runs that are not done" in said
    assert not (tmp_path / "ladder.jsonl").exists()
    assert f"rung {name}, seed 0: AP" in lucidetr(*command)


def test_a_demo_that_was_stopped_goes_on_by_resume(tmp_path, monkeypatch, interrupted):
    monkeypatch.setattr(demo, "write_report", lambda material, file: (file, ()))  # long, and shows nothing here
    command = ["demo", "--out", tmp_path / "demo", "--minutes", 0.08, "--data", TINY]
    assert "stopped and saved after step 1; --resume goes on from there" in lucidetr(*command, status=130)
    assert "resumed after step 1" in lucidetr(*command, "--resume")
    steps = [line["step"] for line in read_metrics(tmp_path / "demo") if "loss" in line]
    assert steps[0] == 1
    assert len(steps) > 1
