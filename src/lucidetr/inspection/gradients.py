"""Gradients through the depth of the model and the course of the run: where they vanish, explode or are nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure as Chart

from lucidetr.config import ModelConfig
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import Figure, Section, chart
from lucidetr.inspection.parts import PartCourse, course_of_parts, explained, lasting
from lucidetr.inspection.weights import NO_STATISTICS, draw_looks

TOO_SMALL, TOO_LARGE = 1e-4, 1e4  # of the median of all parts


@dataclass(frozen=True)
class Fault:
    """Hold what is wrong with the gradient of a part."""

    part: str
    kind: Literal["dead", "vanishing", "exploding"]
    looks: int  # at how many of all looks
    of: int
    ratio: float  # deviation over the median of all parts, at the last look where it is wrong


def find_faults(course: PartCourse) -> list[Fault]:
    """Return the parts whose gradient is exactly zero, or far smaller or larger than the median of all parts.

    It counts where it lasts: at the last look, or at half of them. What is zero at the first look only stands before
    a layer that starts at zero.
    """
    moving = np.where(course.gradient_std > 0, course.gradient_std, np.nan)
    median = np.array([np.nanmedian(row) if np.isfinite(row).any() else np.nan for row in moving])
    faults = []
    for part, deviation, zero in zip(course.parts, course.gradient_std.T, course.gradient_zero.T, strict=True):
        ratio = deviation / median
        kinds: tuple[tuple[Literal["dead", "vanishing", "exploding"], Any], ...] = (
            ("dead", zero == 1),
            ("vanishing", (zero == 0) & (ratio < TOO_SMALL)),
            ("exploding", ratio > TOO_LARGE),
        )
        for kind, wrong in kinds:
            if lasting(wrong):
                last = int(np.flatnonzero(wrong)[-1])
                share = 0.0 if kind == "dead" else float(ratio[last])
                faults.append(Fault(part, kind, int(wrong.sum()), len(wrong), share))
    return faults


def fault_sentences(faults: Sequence[Fault], config: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return warnings, and remarks on what looks wrong and is not."""
    warnings, remarks = [], []
    for fault in faults:
        where = f"{fault.part}: at {fault.looks} of {fault.of} looks"
        what = {
            "dead": f"{where} the gradient is exactly zero; nothing of the loss arrives here.",
            "vanishing": f"{where} the gradient vanishes: {fault.ratio:.1g} of the median of all parts.",
            "exploding": f"{where} the gradient explodes: {fault.ratio:.1g} times the median of all parts.",
        }[fault.kind]
        reason = explained(fault.part, config)
        if reason and fault.kind != "exploding":
            remarks.append(f"{what[:-1]}. No fault: {reason}.")
        else:
            warnings.append(what)
    return tuple(warnings), tuple(remarks)


def draw_gradients(made: Chart, course: PartCourse) -> None:
    """Draw log₁₀ of the gradients' deviation, a row for each part in order of depth, a column for each look."""
    values = logarithm(course.gradient_std)
    there = np.flatnonzero(np.isfinite(values).any(0))
    axes = made.subplots()
    draw_looks(made, axes, course.steps, [course.parts[i] for i in there], values[:, there].T, "log₁₀ of the deviation")


def draw_depth(made: Chart, course: PartCourse) -> None:
    """Draw the gradients' deviation along the depth of the model at the first look, in the middle and at the last."""
    axes = made.subplots()
    places = np.arange(len(course.parts))
    for look, colour in zip(course.moments(), ("tab:gray", "tab:orange", "tab:blue"), strict=False):
        deviation = course.gradient_std[look]
        shown = np.where(deviation > 0, deviation, np.nan)
        axes.plot(places, shown, color=colour, marker="o", markersize=3, label=f"step {course.steps[look]}")
    if np.nanmax(course.gradient_std, initial=0) > 0:
        axes.set_yscale("log")
    axes.set_xticks(places, course.parts, rotation=90, fontsize=7)
    axes.set(xlim=(-0.5, len(places) - 0.5), ylabel="standard deviation")
    axes.legend()


def logarithm(values: Float[np.ndarray, "look part"]) -> Float[np.ndarray, "look part"]:
    """Return log₁₀, nan where there is nothing to take it of."""
    return np.log10(np.where(values > 0, values, np.nan))


def section(material: Material) -> Section:
    """Return the section on gradients."""
    if not material.statistics:
        return Section("Gradients", NO_STATISTICS)
    course = course_of_parts(material.statistics)
    warnings, remarks = fault_sentences(find_faults(course), material.config.model)
    tall = 0.8 + 0.15 * len(course.parts)
    figures = (
        Figure(
            "gradients-depth",
            "Standard deviation of the gradients along the depth of the model",
            chart(10, 4.8, lambda made: draw_depth(made, course)),
            "A line without cliffs: parts differ by factors of ten, not of ten thousand, and the three lines have one "
            "shape. A gap is a gradient of exactly zero.",
            warnings,
        ),
        Figure(
            "gradients-looks",
            "The same at every look",
            chart(9, tall, lambda made: draw_gradients(made, course)),
            "Rows of even colour that darken slowly as the loss falls; a hole is exactly zero, as in the first "
            "column before layers that start at zero.",
        ),
    )
    says = " ".join(
        (
            "Gradients of the loss before the clip, of matrices and kernels only, from the pixels to the answer.",
            *remarks,
        )
    )
    return Section("Gradients", says, figures)
