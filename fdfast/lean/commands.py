"""`fdfast lean check` and `fdfast lean doctor`."""

import argparse
import functools
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fdfast.data.jsonl import read_theorems
from fdfast.errors import InputError
from fdfast.files import cache_dir
from fdfast.lean.leanfile import Piece, read_pieces
from fdfast.lean.pool import Attempt, LeanPool
from fdfast.lean.screen import refuse_context
from fdfast.lean.statement import parse_statement
from fdfast.lean.toolchain import find_lean
from fdfast.lean.verdict import Verdict

_CHECK = """Check every theorem of each FILE and print one line for each: `name: verdict`.

A .lean file: each `theorem` (or `lemma`) that begins its line gets its own verdict; one inside
another command, as after `open A in` or in `mutual`, is rejected. Its context is what stands above
it in the file, without the theorems that were not proved: a later proof cannot rest on them.
Definitions are taken as they are.

A .jsonl, .json or .parquet file: each record's statement, header and proof, in the fields of
miniF2F (formal_statement, header, proof) or of another published set: ProofNet, PutnamBench,
Lean-Workbook, LeanDojo-Benchmark.

Lean is that of the lake project $FDFAST_LEAN_PROJECT (its REPL, $FDFAST_LEAN_REPL, where it has
one), else the embedded one; `fdfast lean doctor` tells which.

Exit status 0 when all are proved, 1 otherwise, 2 when a file cannot be read or Lean cannot be
run."""

_RECORDS = (".jsonl", ".json", ".parquet")


def register(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add `lean check` and `lean doctor`; each sets `run`, which returns the exit status."""
    lean = subparsers.add_parser("lean", help="check proofs with Lean 4")
    commands = lean.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="a verdict for every theorem of .lean files and theorem sets",
        description=_CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")
    check.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="per theorem (30)"
    )
    check.add_argument(
        "--workers", type=int, default=2, metavar="N", help="Lean processes at once (2)"
    )
    check.add_argument(
        "--level",
        type=int,
        default=1,
        choices=(1, 2),
        help="1: type and axioms are audited (default); 2: the kernel replays the compiled proof",
    )
    check.add_argument("--json", action="store_true", help="one JSON object a line, with messages")
    check.set_defaults(run=_check)
    doctor = commands.add_parser("doctor", help="which Lean was found, and what is missing")
    doctor.set_defaults(run=_doctor)


def _until_nobody_reads(
    command: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """Let a command end quietly, as one that SIGPIPE ends, when `| head` has read enough."""

    @functools.wraps(command)
    def run(arguments: argparse.Namespace) -> int:
        try:
            status = command(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            # What stdout still holds goes nowhere, lest the interpreter's own flush complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        return status

    return run


@_until_nobody_reads
def _check(arguments: argparse.Namespace) -> int:
    """Print a verdict for each theorem of each file."""
    if not arguments.timeout > 0:
        raise InputError(f"--timeout must be more than 0 seconds; got {arguments.timeout:g}")
    all_proved = True
    with LeanPool(
        workers=arguments.workers, timeout_s=arguments.timeout, level=arguments.level
    ) as pool:
        for path in arguments.files:
            if path.suffix in _RECORDS:
                verdicts = _check_records(path, pool)
            elif path.suffix == ".lean":
                verdicts = _check_lean(path, pool)
            else:
                raise InputError(f"{path}: a file to check ends in .lean, {', '.join(_RECORDS)}")
            for name, verdict in verdicts:
                all_proved = all_proved and verdict.proved
                if arguments.json:
                    record = {"file": str(path), "name": name, **asdict(verdict)}
                    print(json.dumps(record, ensure_ascii=False), flush=True)
                else:
                    print(f"{name}: {verdict}", flush=True)
    return 0 if all_proved else 1


def _check_records(path: Path, pool: LeanPool) -> Iterator[tuple[str, Verdict]]:
    """The verdicts in the order of the file, each printed as soon as those before it are there."""
    theorems = read_theorems(path)
    items = [
        Attempt(theorem.formal_statement, theorem.proof, theorem.header) for theorem in theorems
    ]
    waiting: dict[int, Verdict] = {}
    following = 0
    for number, verdict in pool.as_completed(items):
        waiting[number] = verdict
        while following in waiting:
            yield theorems[following].name, waiting.pop(following)
            following += 1


def _check_lean(path: Path, pool: LeanPool) -> Iterator[tuple[str, Verdict]]:
    """One after another: whether a theorem is proved decides what stands above the next."""
    context = ""
    for piece in read_pieces(path):
        if piece.name:
            verdict = _verdict(pool, piece, context)
            yield piece.name, verdict
            if not verdict.proved:
                continue
        context += piece.text


def _verdict(pool: LeanPool, piece: Piece, context: str) -> Verdict:
    if not piece.statement:
        return Verdict(
            "rejected",
            reason="the theorem has no `:=` or does not begin its line;"
            " write its proof as a term after one",
        )
    try:
        parse_statement(piece.statement)
    except InputError as error:  # such as a name in guillemets
        return Verdict("rejected", reason=str(error))
    if reason := refuse_context(context):
        return Verdict("rejected", reason=reason)
    return pool.check(piece.statement, piece.proof, context)


@_until_nobody_reads
def _doctor(_: argparse.Namespace) -> int:
    """Show the Lean in use and let it check one proof.

    What is missing becomes a MachineError, which says what mends it.
    """
    libc = " ".join(platform.libc_ver()).strip() or "unknown C library"
    temporary = tempfile.gettempdir()
    print(f"machine      {platform.system()} {platform.machine()}, {libc}")
    print(f"free         {shutil.disk_usage(temporary).free >> 20} MiB in {temporary}")
    print(f"cache        {cache_dir()}")
    lean = find_lean()
    print(f"lean         {lean.version} ({lean.kind}), {lean.origin}")
    print(f"chosen       {lean.reason}")
    folders = ", ".join(str(folder) for folder in lean.library_dirs)
    print(f"libraries    {folders or lean.lean_path() or 'its own'}")
    print(f"axioms       {', '.join(sorted(lean.allowed_axioms)) or 'none'} allowed")
    replay = lean.leanchecker or "the embedded kernel's own replay"
    print(f"level 2      {f'none: {lean.no_replay}' if lean.no_replay else replay}")
    with LeanPool(workers=1, toolchain=lean) as pool:
        verdict = pool.check("theorem doctor (a : Prop) (h : a) : a :=", "h")
    print(f"a proof      {verdict}")
    return 0 if verdict.proved else 1
