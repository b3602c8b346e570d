"""Files that are either whole or not there: the user's cache, atomic writes, folders built once by
many processes."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock  # comes with torch


def cache_dir() -> Path:
    """The user's cache: $FDFAST_CACHE, else $XDG_CACHE_HOME/fdfast, else ~/.cache/fdfast. Not
    created here."""
    if own := os.environ.get("FDFAST_CACHE"):
        return Path(own).absolute()  # Lean runs in folders of its own
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fdfast"


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody else uses (tempfile's files would be closed to
    others).
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and takes the place of `path`,
    else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path` (an old one
    is removed last)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        old = None
        if path.exists():
            old = _beside(path)
            path.replace(old)
        temporary.replace(path)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder `path`, built by `build(temporary_folder)` if it is not there; safe between
    processes.

    Whoever comes second waits for the first and finds the finished folder; a build that dies leaves
    nothing behind.
    """
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        if not path.is_dir():
            with atomic_dir(path) as temporary:
                build(temporary)
    return path
