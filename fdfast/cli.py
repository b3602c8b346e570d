"""The command line: `fdfast model|lean|train|demo`. Each area adds its own commands."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fdfast.errors import InputError, MachineError


class _Parser(argparse.ArgumentParser):
    """One line for a wrong word, with where to look."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0 done, 1 checks did not hold, 2 bad input or machine, 130
    Ctrl-C.

    FDFAST_TRACEBACK=1 shows where an error came from.
    """
    arguments = _parser().parse_args(argv)
    if os.environ.get("FDFAST_TRACEBACK") == "1":
        return int(arguments.run(arguments))
    try:
        return int(arguments.run(arguments))
    except (InputError, MachineError) as error:
        print(f"fdfast: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # full disk, no permission: its own words name the file
        print(f"fdfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fdfast: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from fdfast.lean import commands as lean_commands

    parser = _Parser(prog="fdfast", description=__import__("fdfast").__doc__)
    parser.add_argument("--version", action="version", version=__import__("fdfast").__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    model = commands.add_parser("model", help="models").add_subparsers(
        required=True, metavar="COMMAND", parser_class=_Parser
    )
    fetch = model.add_parser("fetch-demo", help="convert SmolLM2-135M-Instruct into the cache")
    fetch.set_defaults(run=_fetch_demo)

    lean_commands.register(commands)

    train = commands.add_parser("train", help="train a model by Feedback Distillation")
    train.add_argument("settings", nargs="*", metavar="key=value", help="over the file's settings")
    train.add_argument("--config", type=Path, metavar="FILE", help="YAML, `key: value` lines")
    train.add_argument("--preset", help="begin with these settings: fd_paper")
    train.add_argument("--resume", action="store_true", help="from output_dir's newest checkpoint")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="Feedback Distillation on a real model, real Lean")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    demo.add_argument("--resume", action="store_true", help="the demo in FOLDER that was stopped")
    demo.set_defaults(run=_demo)
    return parser


def _fetch_demo(arguments: argparse.Namespace) -> int:
    from fdfast.models import fetch_demo_model

    print(fetch_demo_model())
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from fdfast.trainer import load_config, train

    train(
        load_config(arguments.config, arguments.settings, preset=arguments.preset),
        resume=arguments.resume,
    )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from fdfast.demo import demo

    return demo(arguments.output, resume=arguments.resume)


if __name__ == "__main__":
    sys.exit(main())
