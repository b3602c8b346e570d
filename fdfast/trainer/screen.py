"""What a run shows: its lines, and on a terminal a live view below them."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from fdfast.trainer.live_view import LiveView


class Screen:
    """Lines on standard output; a live view too where that is a terminal; nothing when quiet.

    Args:
        title: of the view's bar.
        total: steps in all.
        quiet: show nothing.
        console: another than standard output.
    """

    def __init__(
        self, title: str, *, total: int, quiet: bool, console: Console | None = None
    ) -> None:
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.view = LiveView(title, total=total, console=self.console)
        self.live: Live | None = None
        if self.console.is_terminal and not quiet:
            self.live = Live(
                self.view, console=self.console, transient=True, vertical_overflow="ellipsis"
            )

    def __enter__(self) -> "Screen":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line above the view."""
        self.console.print(text, markup=False)

    def at(self, step: int) -> None:
        """Move the bar to `step`."""
        self.view.at(step)

    def show(self, row: Mapping[str, Any], alarms: Sequence[str] = ()) -> None:
        """A step's metrics in the view, and the lines of its alarms.

        Args:
            row: of metrics.jsonl.
            alarms: one line each.
        """
        self.view.show(row, alarms)
