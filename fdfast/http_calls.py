"""What all that talks to servers over HTTP shares: the loop, keys, addresses, back-off, errors.

A key is read from the environment when it is used, and is part of no error and no log.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from fdfast.errors import InputError, MachineError

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

# What a later try may mend: overload, a restart, a proxy's error. 529 is "overloaded" at some.
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0


def import_httpx2(user: str) -> Any:
    """The module httpx2.

    Args:
        user: who needs it, for the error.

    Raises:
        MachineError: it is not installed.
    """
    try:
        import httpx2
    except ImportError as error:
        raise MachineError(
            f"{user} needs httpx2 ({error}); run: pip install 'fdfast[train]'"
        ) from error
    return httpx2


def read_key(name: str, *, user: str, setting: str) -> str:
    """The key in environment variable `name`; "" if `name` is "".

    Args:
        name: of the variable.
        user: who needs the key, for errors.
        setting: what names the variable, for errors.

    Raises:
        InputError: it is not set, or can be no key; the message does not show it.
    """
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise InputError(
            f"{user}: the environment variable {name} holds no key; export it, or set "
            f"{setting} to another name ('' for a server that wants none)"
        )
    if not all("!" <= c <= "~" for c in key):
        raise InputError(
            f"{user}: the environment variable {name} must hold a key of printable ASCII "
            "without spaces; what it holds is not shown"
        )
    return key


def check_url(url: str, *, setting: str, form: str, key_setting: str) -> None:
    """Refuse what is no address, or one that carries a secret; never repeat the secret.

    Args:
        url: to check.
        setting: what it was given as, for errors.
        form: what it must look like, for errors.
        key_setting: the setting that names the key's variable, for errors.

    Raises:
        InputError: it is none, or carries one.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        carries = "@" in parts.netloc or bool(parts.query or parts.fragment)
    except ValueError:
        host, carries, parts = None, False, urlsplit("")
    if carries:
        raise InputError(
            f"{setting} must carry no user, password or query (not shown here); put the key "
            f"into the variable that {key_setting} names"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"{setting} must be {form}; got {url!r}")


def one_line(text: str, key: str) -> str:
    """One line of what a server said, which may repeat the key."""
    return " ".join(without_key(text, key).split())[:300]


def without_key(text: str, key: str) -> str:
    """The text, without the key."""
    return text.replace(key, "[key]") if key else text


def error_text(response: "httpx2.Response") -> str:
    """What the server says went wrong, without its JSON around it."""
    try:
        said = response.json()["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, LookupError, TypeError):
        return response.text


def retry_after_s(response: "httpx2.Response") -> float:
    """Retry-After in seconds, of either form; 0 if there is none that can be read."""
    text = response.headers.get("Retry-After", "").strip()
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def backoff_s(
    retry: int,
    asked_s: float,
    uniform: Callable[[float, float], float],
    longest_s: float = _LONGEST_WAIT_S,
) -> float:
    """Seconds before retry number `retry` (from 0): exponential with full jitter, on top of what
    the server asks for.
    """
    return asked_s + uniform(0.0, min(longest_s, _FIRST_WAIT_S * 2 ** min(retry, 20)))


class LoopThread:
    """An event loop in a thread of its own: the caller may have a loop already (a notebook), and
    Ctrl-C or SIGTERM then strikes a wait and never the inside of the loop. A context manager.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it there."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.submit(_cancel_others()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


async def _cancel_others() -> None:
    """End whatever else runs in this loop, and wait for its end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
