"""Files that are either whole or not there: the user's cache, atomic writes, folders built once by
many processes, manifests by which damage is found."""

import contextlib
import hashlib
import json
import os
import re
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


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the temporary files and folders that a killed process left in `folder` (see
    `_beside`). Whoever calls it knows that no other process writes there: it holds the lock.

    Args:
        folder: where to look, not below it.
        names: of what was being written; others' are left alone.
    """
    for path in folder.glob(".*"):
        found = re.fullmatch(r"\.(.+)\.\d+\.[0-9a-f]{8}", path.name)
        if found is None or not names.fullmatch(found[1]):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Everything in it and below; a folder after what it names."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place) / name)
        sync(Path(place))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, and both the
    bytes and the name are on the disk; else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path` (an old one
    is removed last), and all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        old = None
        if path.exists():
            old = _beside(path)
            path.replace(old)
        temporary.replace(path)
        sync(path.parent)
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


MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """List every file in `folder` with its size and SHA-256 in `folder/manifest.json`, the last
    file of a folder that shall be known as whole."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"format": 1, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def damage(folder: Path, *, checksums: bool = True) -> str:
    """What is wrong with a folder that has a manifest, in a few words; "" where nothing is.

    Args:
        folder: that `write_manifest` went over.
        checksums: whether every byte is read; else sizes alone are compared.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({' '.join(str(error).split())[:100]})"
    for name, (size, sha256) in wanted.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if checksums and _sha256(path) != sha256:
                return f"{name} is not what was written: its SHA-256 differs"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
