"""Curves over the steps of a run, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fdfast.errors import MachineError

INK, PAPER = "#1b4965", "#ffffff"
COLOURS = ("#1b4965", "#c1666b", "#5b8e7d", "#d4a017")


class Curve(NamedTuple):
    """A metric over the steps, by its key in the metrics, and beside it that of the evaluations."""

    label: str
    key: str
    eval_label: str = ""
    eval_key: str = ""


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    ylabel: str
    curves: Sequence[Curve]
    log: bool = False


def plot_run(rows: Sequence[dict[str, Any]], panels: Sequence[Panel], path: Path) -> Path:
    """Draw the panels side by side: training steps as lines, evaluations as open circles.

    Args:
        rows: of metrics.jsonl; steps and evaluations mixed.
        panels: what to draw.
        path: the PNG.

    Raises:
        MachineError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MachineError(
            f"plots need matplotlib ({error}); run: pip install 'fdfast[demo]'"
        ) from error
    mpl.use("Agg")  # no screen wanted
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for curve, colour in zip(panel.curves, COLOURS, strict=False):
            _draw(axis, rows, curve, colour)
        axis.set_title(panel.title, color=INK, fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylabel(panel.ylabel)
        if panel.log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, facecolor=PAPER)
    plt.close(figure)
    return path


def _draw(axis: Any, rows: Sequence[dict[str, Any]], curve: Curve, colour: str) -> None:
    points = [(r["step"], r[curve.key]) for r in rows if curve.key in r]
    if points:
        axis.plot(*zip(*points, strict=True), marker=".", color=colour, label=curve.label)
    held_out = [(r["step"], r[curve.eval_key]) for r in rows if curve.eval_key in r]
    if held_out:
        style = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
        axis.plot(*zip(*held_out, strict=True), color=colour, label=curve.eval_label, **style)
