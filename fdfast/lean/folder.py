"""The private folder of a check, and what killed runs leave of theirs."""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "fdfast-lean"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder that only we use; its name tells whose it is: machine and process.

    Not tempfile's own, which a child forked off meanwhile would remove at its exit.

    Raises:
        OSError: there is no temporary folder to make it in.
    """
    remove_stale_folders(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{_machine()}-{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def remove_stale_folders(temporary: str) -> None:
    """Remove, once in a process, the private folders whose process is gone (SIGKILL, SIGTERM).

    A folder from another machine, container or user stays: whether its process lives cannot be told
    from here. So does one whose process id has been given to another process.
    """
    name = re.compile(rf"{_PREFIX}-{_machine()}-(?P<pid>[0-9]+)-\w+")
    with contextlib.suppress(OSError), os.scandir(temporary) as entries:
        for entry in entries:
            if (match := name.fullmatch(entry.name)) is None or _lives(int(match["pid"])):
                continue
            with contextlib.suppress(OSError):  # somebody else was quicker
                if (
                    entry.is_dir(follow_symlinks=False)
                    and entry.stat(follow_symlinks=False).st_uid == os.getuid()
                ):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@functools.cache
def _machine() -> str:
    """Where our process ids mean something: this boot of this machine, this pid namespace.

    Containers share a /tmp, and machines a TMPDIR on the network.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    namespace = Path("/proc/self/ns/pid").readlink()
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:8]
