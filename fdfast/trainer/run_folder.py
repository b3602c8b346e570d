"""A run's folder: one process at a time, what a killed one left, the checkpoint to go on from."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout  # comes with torch

from fdfast.errors import InputError
from fdfast.feedback.ledger import FeedbackCounters
from fdfast.files import atomic_file, damage, remove_leftovers
from fdfast.trainer.checkpoint import checkpoints
from fdfast.trainer.metrics import read_jsonl

# What is written here under a temporary name first.
_WRITTEN = re.compile(
    r"(checkpoint|reference|bad-step)-\d+|model|adapter|(metrics|attempts)\.jsonl|(run|feedback_spent)\.json"
)
_SPENT = "feedback_spent.json"


@dataclass(frozen=True)
class Found:
    """Where a run begins.

    Attributes:
        checkpoint: the newest that is whole; None to begin at step 0.
        damaged: newer ones, with what is wrong with each.
    """

    checkpoint: Path | None
    damaged: tuple[tuple[Path, str], ...] = ()

    def lines(self) -> list[str]:
        """What to say of the damaged ones."""
        if self.checkpoint is None:
            return []
        return [
            f"{path.name} is damaged ({why}) and stays beside as {_aside(path).name}; "
            f"going on from {self.checkpoint.name}"
            for path, why in self.damaged
        ]


def find_start(folder: Path, *, resume: bool) -> Found:
    """Where to begin; nothing is written yet.

    Raises:
        InputError: the folder can't be written, holds a run, has nothing to resume, or none of its
            checkpoints is whole.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"output_dir {folder}: {there} is no folder that can be written to")
    rows, saved = read_jsonl(folder / "metrics.jsonl"), checkpoints(folder)
    if resume and not saved and not rows:
        raise InputError(f"{folder}: --resume found no run there; drop it to begin one")
    if not resume and (saved or any(row["step"] > 0 for row in rows)):
        raise InputError(
            f"{folder}: holds a run already; go on with it (--resume), or name another output_dir"
        )
    if not resume or not saved:
        return Found(None)
    damaged: list[tuple[Path, str]] = []
    for path in reversed(saved):
        if not (why := damage(path)):
            return Found(path, tuple(damaged))
        damaged.append((path, why))
    said = "; ".join(f"{path.name}: {why}" for path, why in damaged)
    raise InputError(
        f"{folder}: none of its checkpoints is whole ({said}); put one back from a copy, or begin "
        "anew in another output_dir"
    )


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Be the only run that writes to `folder`, which is made. The lock is the system's and goes
    with its process, however that ends.

    Raises:
        InputError: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{folder}: another run is writing there; wait for it or end it, or name another "
            "output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_folder(folder: Path, found: Found) -> None:
    """Put aside what is damaged, clear what a killed process had half written; of a run that ended
    before its first checkpoint the lines are kept beside. Wants `run_lock`.
    """
    remove_leftovers(folder, _WRITTEN)
    for path, _ in found.damaged:
        path.rename(_aside(path))
    for name in ("metrics", "attempts"):
        if found.checkpoint is None and (folder / f"{name}.jsonl").exists():
            (folder / f"{name}.jsonl").replace(folder / f"{name}.old.jsonl")


def _aside(path: Path) -> Path:
    """A free name that is no checkpoint's."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in range(10**6))
    return next(name for name in names if not name.exists())


def write_spent(folder: Path, counters: FeedbackCounters) -> None:
    """Keep what feedback has cost. It is beside the checkpoints because steps after the last one
    were paid for, though they will be done again."""
    with atomic_file(folder / _SPENT) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(counters)), encoding="utf-8")


def take_up_spent(folder: Path, counters: FeedbackCounters, saved: FeedbackCounters) -> None:
    """Let a provider's counters go on from where the run was: a resumed run has no new budget.

    Args:
        folder: of the run.
        counters: of the provider; set here.
        saved: of the checkpoint.

    Raises:
        InputError: the file of what was spent is damaged.
    """
    path = folder / _SPENT
    later = dataclasses.asdict(saved)
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            later = {name: max(value, type(value)(found[name])) for name, value in later.items()}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{path}: can't be read ({' '.join(str(error).split())[:100]}); remove it to count "
                "what was spent from the checkpoint alone"
            ) from error
    for name, value in later.items():
        setattr(counters, name, value)
