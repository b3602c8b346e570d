"""The command line, `fdfast model|lean|kernels|train|rollout|show|demo`: each area adds its own."""

import argparse
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import fdfast
from fdfast.errors import InputError, MachineError
from fdfast.interrupts import sigterm_as_interrupt


class _Parser(argparse.ArgumentParser):
    """One line for a wrong word, with where to look."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0 done, 1 checks did not hold, 2 bad input or machine, 130
    Ctrl-C or SIGTERM, 141 when whoever reads the output has gone.

    FDFAST_TRACEBACK=1 shows where an error came from.
    """
    with sigterm_as_interrupt():
        if os.environ.get("FDFAST_TRACEBACK") == "1":
            return _run(argv)
        try:
            return _run(argv)
        except (InputError, MachineError) as error:
            print(f"fdfast: {error}", file=sys.stderr)
            return 2
        except OSError as error:  # full disk, no permission
            if isinstance(error, BrokenPipeError) and _reader_has_gone():
                return 141  # as if SIGPIPE had ended it: `fdfast ... | head` is no error
            name = error.filename
            place = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
            print(f"fdfast: {place}{error.strerror or error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("fdfast: interrupted", file=sys.stderr)
            return 130


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _arguments(_parser(), argv)
        return int(arguments.run(arguments))
    finally:
        sys.stdout.flush()  # here, so that a closed pipe is met where it is caught


def _arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As parse_args; key=value words may stand after an option too, where argparse knows none."""
    arguments, left = parser.parse_known_args(argv)
    words = getattr(arguments, "settings", None)
    if left and (words is None or any(w.startswith("-") or "=" not in w for w in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if words is not None:
        words.extend(left)
    return arguments


def _reader_has_gone() -> bool:
    """Whether stdout is the broken pipe, and not one to Lean, say; then it is closed for good."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file: a test's, a notebook's
        return False
    poll = select.poll()
    poll.register(output, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:  # what is left in the buffer would fail once more, loudly, when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _parser() -> argparse.ArgumentParser:
    from fdfast.kernels import commands as kernel_commands
    from fdfast.lean import commands as lean_commands
    from fdfast.rollout import commands as rollout_commands
    from fdfast.trainer import commands as trainer_commands

    parser = _Parser(prog="fdfast", description=fdfast.__doc__)
    parser.add_argument("--version", action="version", version=fdfast.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    model = commands.add_parser("model", help="models").add_subparsers(
        required=True, metavar="COMMAND", parser_class=_Parser
    )
    fetch = model.add_parser("fetch-demo", help="convert SmolLM2-135M-Instruct into the cache")
    fetch.set_defaults(run=_fetch_demo)

    lean_commands.register(commands)
    kernel_commands.register(commands)
    trainer_commands.register(commands)
    rollout_commands.register(commands)

    demo = commands.add_parser(
        "demo",
        help="Feedback Distillation on a real model, real Lean",
        description="Feedback Distillation on a real model with real Lean, in minutes on two "
        "cores: two short runs, their checks, and a page that shows them.",
    )
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    demo.add_argument("--resume", action="store_true", help="the demo in FOLDER that was stopped")
    demo.set_defaults(run=_demo)
    return parser


def _fetch_demo(arguments: argparse.Namespace) -> int:
    from fdfast.models import fetch_demo_model

    print(fetch_demo_model())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from fdfast.demo import demo

    return demo(arguments.output, resume=arguments.resume)


if __name__ == "__main__":
    sys.exit(main())
