"""Feedback that was paid for once: a SQLite file that processes and threads share."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock  # comes with torch

from fdfast.errors import MachineError

_WAIT_S = 60.0


def content_key(request: dict[str, Any]) -> str:
    """The key of what was asked: SHA-256 of its JSON."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class FeedbackCache:
    """Texts by key, on disk.

    Every call opens the file anew: a connection that outlives its thread or a fork is a trap, and
    opening costs a tenth of a millisecond where the network costs seconds.

    Args:
        path: the file; made with its folder if it is not there.

    Raises:
        MachineError: the file can't be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes that turn WAL on at once: SQLite says `locked` to one without waiting.
            with FileLock(path.with_name(f".{path.name}.lock")), self._open() as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS feedback (key TEXT PRIMARY KEY, text TEXT NOT NULL)"
                    " WITHOUT ROWID"
                )
        except OSError as error:
            raise self._unusable(error) from error

    def get(self, key: str) -> str | None:
        """The text under that key, or None."""
        with self._open() as connection:
            row = connection.execute("SELECT text FROM feedback WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, text: str) -> None:
        """Keep a text; of two for one key the first stays."""
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO feedback VALUES (?, ?)", (key, text))

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT_S)) as connection:
                connection.execute("PRAGMA synchronous = NORMAL")  # WAL's: a crash tears nothing
                with connection:
                    yield connection
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> MachineError:
        return MachineError(
            f"feedback cache {self.path}: can't be used ({error}); remove the file, or set "
            "FDFAST_CACHE to a folder on a local disk with space"
        )
