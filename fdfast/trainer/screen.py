"""What a run shows: its lines, and on a terminal a progress bar below them."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Screen:
    """Lines on standard output; a bar too where that is a terminal; nothing at all when quiet.

    Args:
        title: of the bar.
        total: steps in all.
        quiet: show nothing.
    """

    def __init__(self, title: str, *, total: int, quiet: bool) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=total)

    def __enter__(self) -> "Screen":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, markup=False)

    def at(self, step: int) -> None:
        """Move the bar to `step`."""
        self.progress.update(self.task, completed=step)
