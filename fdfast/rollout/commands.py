"""`fdfast show`."""

import argparse
import fnmatch
import io
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfast.errors import InputError, MachineError
from fdfast.files import atomic_file

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fdfast.rollout.records import Record
    from fdfast.rollout.show import ShowOptions

_SHOW = """Print the trajectories of FILE: problem, verdict and Lean's messages, the statement, each
turn of the model with its tool calls and their outputs, and the feedback.

Where the file has the teacher's log-probabilities, each token's background says what the teacher,
who has read the feedback, makes of it: green is likelier than the student finds it, red less
likely. Without colours (a pipe, NO_COLOR) the tokens that moved most are marked.

FILE is .jsonl or .parquet, or a folder: of `fdfast rollout` (its trajectories.jsonl is shown) or of
a training run (attempts.jsonl)."""

_BLANKS = re.compile(" +\n")
_IN_FOLDER = ("trajectories.jsonl", "attempts.jsonl")

_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fdfast show</title>
<meta name="viewport" content="width=device-width">
<style>
{stylesheet}
body {{ color: {foreground}; background-color: {background}; margin: 1.5rem; }}
pre {{ font: 14px/1.45 ui-monospace, Menlo, "DejaVu Sans Mono", Consolas, monospace; }}
</style></head>
<body><pre><code>{code}</code></pre></body></html>
"""


def register(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add `show`; it sets `run`, which returns the exit status."""
    show = subparsers.add_parser(
        "show",
        help="trajectories of a file, readable",
        description=_SHOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("--index", type=int, metavar="N", help="record N of the file, from 0")
    show.add_argument("--problem", metavar="NAME", help="of this problem; a pattern, easy_* say")
    show.add_argument("--step", type=int, metavar="N", help="of this step of the run")
    show.add_argument("--limit", type=int, metavar="K", help="K at most (10; with --list all)")
    show.add_argument("--list", action="store_true", help="a table, a line for each")
    show.add_argument("--full", action="store_true", help="cut nothing, and show the prompt")
    show.add_argument(
        "--color",
        action=argparse.BooleanOptionalAction,
        help="whatever the output is (colours on a terminal, unless NO_COLOR is set)",
    )
    show.add_argument("--width", type=int, metavar="W", help="columns (the terminal's)")
    show.add_argument(
        "--scale",
        type=float,
        default=2.0,
        metavar="X",
        help="log-ratio of the strongest colour, nats (2)",
    )
    show.add_argument("--html", type=Path, metavar="OUT", help="write a page that needs no network")
    show.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> int:
    _refuse(arguments)
    try:
        from rich.console import Console
    except ImportError as error:
        raise MachineError(
            f"fdfast show needs rich ({error}); run: pip install 'fdfast[train]'"
        ) from error
    from fdfast.rollout.show import ShowOptions
    from fdfast.rollout.show_ratios import LIGHT, terminal_palette

    notes: list[str] = []
    if arguments.html is not None:
        console = Console(
            record=True,
            file=io.StringIO(),
            width=arguments.width or 110,
            force_terminal=True,
            color_system="truecolor",
            highlight=False,
        )
        options = ShowOptions(LIGHT, arguments.scale, arguments.full)
        count = _print(console, arguments, options, notes)
        _write_page(arguments.html, console)
        print(f"{arguments.html}: {count} of {arguments.file}")
    else:
        colours = _colours(arguments.color)
        palette = terminal_palette() if colours else None
        options = ShowOptions(palette, arguments.scale, arguments.full)
        _print(_console(colours, arguments.width), arguments, options, notes)
    for note in notes:
        print(f"fdfast: {note}", file=sys.stderr)
    return 0


def _refuse(arguments: argparse.Namespace) -> None:
    """Settings that make no sense, before anything is read."""
    for name, least in (("index", 0), ("limit", 1), ("width", 40)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}; got {value}")
    if not (arguments.scale > 0 and math.isfinite(arguments.scale)):
        raise InputError(f"--scale must be more than 0 nats; got {arguments.scale:g}")
    if arguments.html is not None and arguments.html.is_dir():
        raise InputError(f"--html {arguments.html}: is a folder; name a file")
    if arguments.index is not None and (arguments.problem or arguments.step is not None):
        raise InputError("--index names one record; drop it, or --problem and --step")


def _colours(asked: bool | None) -> bool:
    if asked is not None:
        return asked
    no_color = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not no_color


def _console(colours: bool, width: int | None) -> "Console":
    """A console that writes no escape code unless colours are wanted: not for bold either."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 sees \u22a2
        sys.stdout.reconfigure(errors="backslashreplace")
    if not colours:
        return Console(width=width, color_system=None, force_terminal=False, highlight=False)
    system: Any = "auto" if sys.stdout.isatty() else "truecolor"
    return Console(width=width, color_system=system, force_terminal=True, highlight=False)


def _put(console: "Console", part: "RenderableType") -> None:
    """Print a part without the blanks with which rich fills lines."""
    if console.record:
        console.print(part)
        return
    with console.capture() as captured:
        console.print(part)
    # By print, since rich ends the process where the pipe is closed.
    print(_BLANKS.sub("\n", captured.get()), end="")


def _print(
    console: "Console",
    arguments: argparse.Namespace,
    options: "ShowOptions",
    notes: list[str],
) -> int:
    """Print what is asked for as it is read; how many records that were."""
    from rich.text import Text

    from fdfast.rollout.show import record_row, record_table, record_view

    table = record_table()
    limit = arguments.limit or (None if arguments.list else 10)
    count = more = 0
    for index, record in _chosen(arguments, notes):
        if limit is not None and count >= limit:
            more += 1
            continue
        count += 1
        if arguments.list:
            table.add_row(*record_row(record, index))
            continue
        for part in record_view(record, index, options):
            _put(console, part)
    if arguments.list:
        _put(console, table)
    if more:
        line = f"... {more} more; --limit {count + more} shows all, --list a table of them"
        _put(console, Text(line))
    return count


def _chosen(arguments: argparse.Namespace, notes: list[str]) -> Iterator[tuple[int, "Record"]]:
    """The records that are asked for, with their places.

    Raises:
        InputError: there is none; it says what there is.
    """
    from fdfast.rollout.records import read_records

    path = _file(arguments.file)
    total, found = 0, False
    names: dict[str, None] = {}
    steps: set[int] = set()
    for index, record in enumerate(read_records(path, notes)):
        total += 1
        names[record.problem] = None
        steps |= set() if record.step is None else {record.step}
        if arguments.index not in (None, index):
            continue
        if arguments.problem and not _fits(record.problem, arguments.problem):
            continue
        if arguments.step not in (None, record.step):
            continue
        found = True
        yield index, record
        if arguments.index is not None:
            return
    if found:
        return
    if not total:
        raise InputError(f"{path}: holds no trajectory{f' ({notes[0]})' if notes else ''}")
    raise InputError(f"{path}: {_what_there_is(arguments, total, list(names), steps)}")


def _fits(name: str, pattern: str) -> bool:
    """A name may hold brackets, which a pattern takes otherwise."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _file(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_dir():
        return path
    for name in _IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path}: is a folder without {' and '.join(_IN_FOLDER)}; name a file")


def _what_there_is(
    arguments: argparse.Namespace, total: int, names: list[str], steps: set[int]
) -> str:
    if arguments.index is not None:
        return f"--index must be from 0 to {total - 1}; got {arguments.index}"
    asked = []
    if arguments.problem:
        asked.append(f"of problem {arguments.problem!r}")
    if arguments.step is not None:
        asked.append(f"of step {arguments.step}")
    some = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    those = f"steps {min(steps)} to {max(steps)}" if steps else "no steps"
    return f"no trajectory {' and '.join(asked)}; it has problems {some}, and {those}"


def _write_page(path: Path, console: "Console") -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(console.export_html(code_format=_HTML), encoding="utf-8")
