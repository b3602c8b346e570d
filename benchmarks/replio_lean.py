"""Checks of real proofs: ours against a Lean process for each run.

The proofs are those of the theorem set, as a training step has them: eight attempts at each of a
few statements, no two texts the same.
"""

import functools
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fdfast.data import base_theorems_path
from fdfast.lean import Attempt, LeanPool, find_lean
from fdfast.lean.statement import complete_header, parse_statement
from tests.fake_repl import compiled

WORKERS = 2
ATTEMPTS = 8  # at each statement
LAUNCHER = Path(__file__).with_name("lean_launcher.cpp")


def attempts(num_statements: int, turn: int) -> list[Attempt]:
    """Right proofs, of other statements in each turn."""
    records = [json.loads(line) for line in base_theorems_path().read_text().splitlines()]
    step = len(records) // num_statements
    chosen = records[turn::step][:num_statements]
    return [
        Attempt(r["formal_statement"], f"{r['proof']} -- attempt {number}", r["header"])
        for number in range(ATTEMPTS)
        for r in chosen
    ]


@functools.cache
def _pool() -> LeanPool:
    """The pool that is kept from turn to turn, as a trainer keeps it from step to step."""
    return LeanPool(workers=WORKERS)


def ours(items: Sequence[Attempt]) -> int:
    """How many our checker finds proved."""
    return sum(verdict.proved for verdict in _pool().check_many(items))


def processes(items: Sequence[Attempt], check: Callable[[Attempt], bool]) -> int:
    """How many `check` finds proved, so many at a time as ours has workers."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(check, items))


def both_walls(item: Attempt) -> bool:
    """What our checker does, a process for each: compile the proof, then ask a fresh Lean that
    reads only the olean for axioms and type."""
    with tempfile.TemporaryDirectory() as folder:
        if not _compiles(Path(folder), item):
            return False
        name = parse_statement(item.formal_statement)[1]
        audit = f"prelude\nimport Attempt\n#print axioms {name}\n#check @{name}\n"
        (Path(folder) / "Audit.lean").write_text(audit)
        said = _lean(Path(folder), "Audit.lean").stdout
        return "does not depend on any axioms" in said


def messages_alone(item: Attempt) -> bool:
    """One process that compiles the proof; it is believed when it reports no error."""
    with tempfile.TemporaryDirectory() as folder:
        return _compiles(Path(folder), item)


def _compiles(folder: Path, item: Attempt) -> bool:
    header = complete_header(find_lean(), item.header)
    (folder / "Attempt.lean").write_text(f"{header}{item.formal_statement}\n{item.proof}\n")
    return _lean(folder, "-o", "Attempt.olean", "Attempt.lean").returncode == 0


def _lean(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(launcher()), "--json", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={"LEAN_PATH": find_lean().lean_path(folder)},
    )


def launcher() -> Path:
    """The launcher, linked with the Lean that `find_lean` finds."""
    folder = find_lean().origin.parent
    link = (f"-L{folder}", "-lleanshared", "-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{folder}")
    return compiled(LAUNCHER, *link)
