"""What a terminal shows below a run's lines: the step's numbers, where its time went, alarms.

Every line fits the terminal, however narrow: cells that do not fit side by side go below.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# Label -> the metric and its format.
_CELLS = {
    "loss": ("loss", "{:.4f}"),
    "kl": ("kl", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "proved": ("reward", "{:.1%}"),
    "length": ("completions/mean_length", "{:.1f}"),
    "longest": ("completions/max_length", "{:.0f}"),
    "cut": ("completions/clipped_ratio", "{:.0%}"),
    "gradient": ("grad_norm", "{:.3g}"),
    "rate": ("learning_rate", "{:.2e}"),
    "tokens": ("num_tokens", "{:,.0f}"),
}
_CELL_WIDTH = 20
_BAR_WIDTH = 24
_MAX_ALARMS = 3
_DAY_S = 86400.0


class LiveView:
    """A renderable of rich, whose parts follow the run.

    Attributes:
        progress: the bar.

    Args:
        title: of the bar.
        total: steps in all.
        console: that shows it.
    """

    def __init__(self, title: str, *, total: int, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            # Of so many seconds back: rich's 30 hold no two steps of a run whose steps are longer.
            speed_estimate_period=_DAY_S,
        )
        self.task = self.progress.add_task(title, total=total)
        self.row: Mapping[str, Any] = {}
        self.alarms: list[str] = []

    def at(self, step: int) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=step)

    def show(self, row: Mapping[str, Any], alarms: Sequence[str] = ()) -> None:
        """A step's metrics, and the lines of the alarms that it raised."""
        self.row = dict(row)
        self.alarms = [*self.alarms, *alarms][-_MAX_ALARMS:]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield self.progress.get_renderable()
        if self.row:
            yield from _cells(self.row, options.max_width)
            yield from _times(self.row, options.max_width)
        for alarm in self.alarms:
            yield _line(alarm, "yellow")


def _cells(row: Mapping[str, Any], width: int) -> Iterator[Text]:
    """Names and numbers, as many side by side as fit."""
    cells = [("stage", str(int(row["stage"]) + 1))] if "stage" in row else []
    for label, (name, form) in _CELLS.items():
        value = row.get(name)
        if value is not None:
            cells.append((label, form.format(value)))
    if row.get("skipped"):
        cells.append(("step", "skipped"))
    per_line = max(1, width // _CELL_WIDTH)
    for start in range(0, len(cells), per_line):
        line = _line()
        for label, shown in cells[start : start + per_line]:
            line.append(f"{label} ", "dim")
            line.append(shown.ljust(_CELL_WIDTH - len(label) - 1))
        line.rstrip()
        yield line


def _times(row: Mapping[str, Any], width: int) -> Iterator[Text]:
    """A bar for each stage of the step, longest first."""
    total = row.get("time/step") or 0.0
    stages = [
        (name.removeprefix("time/"), seconds)
        for name, seconds in row.items()
        # What has a second slash is no seconds: time/idle/rollout is a share.
        if name.startswith("time/") and name.count("/") == 1 and name != "time/step"
        if seconds is not None
    ]
    if not total:
        return
    for name, seconds in sorted(stages, key=lambda s: -s[1]):
        share = min(1.0, seconds / total)
        line = _line(f"{name:<12} {seconds:>8.2f} s {share:>4.0%} ")
        room = min(_BAR_WIDTH, max(0, width - len(line)))
        line.append("\u2588" * round(share * room), "cyan")
        yield line


def _line(text: str = "", style: str = "") -> Text:
    """One that is cut where the terminal ends, and never folded."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")
