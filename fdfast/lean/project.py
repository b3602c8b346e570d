"""The user's own Lean: a lake project, its toolchain, and the REPL if it has one.

`lake env` is run once, to learn the environment that it gives to a program; what we start gets that
environment, so no start of lake precedes each check.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fdfast.errors import InputError, MachineError

_LAKE_TIMEOUT_S = 600.0  # lake may have to read and compile the configuration of every dependency
_LAKEFILES = ("lakefile.lean", "lakefile.toml")
_SHOW_ENVIRONMENT = "import json, os, sys; json.dump(dict(os.environ), sys.stdout)"
_VERSION = re.compile(r"\bversion (?P<version>\d+\.\d+\.\d+\S*?),")
# Where lake puts the REPL: the project itself, or a dependency of either spelling.
_REPL_PLACES = (".", ".lake/packages/REPL", ".lake/packages/repl")


@dataclass(frozen=True)
class Project:
    """A lake project as `lake env` sees it.

    Attributes:
        folder: its folder.
        environment: of the programs that `lake env` runs there.
        lean: the toolchain's `lean`.
        version: of that.
        leanchecker: the toolchain's `leanchecker` (Lean 4.28 and later), None where it has none.
        repl: the REPL's binary, None where there is none.
        repl_reason: why that REPL, or why none.
    """

    folder: Path
    environment: tuple[tuple[str, str], ...]
    lean: Path
    version: str
    leanchecker: Path | None
    repl: Path | None
    repl_reason: str


def read_project(folder: Path, repl: Path | None) -> Project:
    """Look at a project.

    Args:
        folder: with a lakefile.
        repl: the REPL's binary; None looks for one that lake built in the project.

    Raises:
        InputError: `folder` is no lake project, or `repl` no program.
        MachineError: there is no lake, or it fails.
    """
    folder = folder.absolute()
    if not any((folder / name).is_file() for name in _LAKEFILES):
        raise InputError(
            f"find_lean: project must be a folder with {' or '.join(_LAKEFILES)}; got {folder};"
            " set FDFAST_LEAN_PROJECT to one, or unset it for the embedded Lean"
        )
    if repl is not None and not os.access(repl, os.X_OK):
        raise InputError(
            f"find_lean: repl must be the program of leanprover-community/repl; got {repl}, which"
            " cannot be run; set FDFAST_LEAN_REPL to .lake/build/bin/repl of its folder"
        )
    environment = _lake_environment(folder)
    lean = _tool(environment, "lean")
    if lean is None:
        raise MachineError(
            f"lean: `lake env` of {folder} gives no `lean`; run `lake env lean --version` there"
        )
    version = _lean_version(lean, folder, environment)
    if repl is not None:
        reason = "named by argument or FDFAST_LEAN_REPL"
    else:
        repl, reason = _built_repl(folder)
    return Project(
        folder=folder,
        environment=tuple(sorted(environment.items())),
        lean=lean,
        version=version,
        leanchecker=_tool(environment, "leanchecker", sysroot_only=True),
        repl=None if repl is None else repl.absolute(),
        repl_reason=reason,
    )


def _lake_environment(folder: Path) -> dict[str, str]:
    lake = shutil.which("lake")
    if lake is None:
        raise MachineError(
            f"lean: the project {folder} wants `lake`, which is not in PATH; install elan (the"
            " toolchain manager of Lean), or unset FDFAST_LEAN_PROJECT for the embedded Lean"
        )
    said = _run([lake, "env", sys.executable, "-I", "-S", "-c", _SHOW_ENVIRONMENT], folder, None)
    try:
        # What lake says of itself may precede it on stdout.
        environment = json.loads(said[said.index("{") :])
    except ValueError as error:
        raise MachineError(
            f"lean: `lake env` of {folder} does not run a program ({said[:200]!r});"
            " run `lake env lean --version` there"
        ) from error
    # Lake writes paths relative to the project; our jobs run elsewhere.
    for name in ("LEAN_PATH", "LEAN_SRC_PATH"):
        if name in environment:
            places = environment[name].split(os.pathsep)
            environment[name] = os.pathsep.join(
                os.path.normpath(folder / place) for place in places if place
            )
    return {str(name): str(value) for name, value in environment.items()}


def _lean_version(lean: Path, folder: Path, environment: Mapping[str, str]) -> str:
    said = _run([str(lean), "--version"], folder, environment)
    if (match := _VERSION.search(said)) is None:
        raise MachineError(f"lean: {lean} --version says {said[:200]!r}, which names no version")
    return match["version"]


def _run(command: list[str], folder: Path, environment: Mapping[str, str] | None) -> str:
    """The stdout of a program, which must end with status 0."""
    shown = " ".join(command[:3])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LAKE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(
            f"lean: `{shown}` in {folder} cannot be run ({error}); run `lake build` there"
        ) from error
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-300:] or "no word"
        raise MachineError(
            f"lean: `{shown}` in {folder} ended with status {done.returncode} ({said});"
            " run `lake build` there"
        )
    return done.stdout


def _tool(environment: Mapping[str, str], name: str, *, sysroot_only: bool = False) -> Path | None:
    """A program of the toolchain: of its own folder, else, unless `sysroot_only`, of the PATH."""
    if sysroot := environment.get("LEAN_SYSROOT"):
        tool = Path(sysroot, "bin", name)
        if os.access(tool, os.X_OK):
            return tool
    if sysroot_only:
        return None
    found = shutil.which(name, path=environment.get("PATH", ""))
    return None if found is None else Path(found)


def _built_repl(folder: Path) -> tuple[Path | None, str]:
    """The REPL that lake built in the project, and why that or why none."""
    for place in _REPL_PLACES:
        binary = folder / place / ".lake" / "build" / "bin" / "repl"
        if os.access(binary, os.X_OK):
            return binary, "built in the project"
    if any((folder / place).is_dir() for place in _REPL_PLACES[1:]):
        return None, "the project's REPL is not built: run `lake build repl` there"
    return None, "the project has no REPL: set FDFAST_LEAN_REPL to its program if you have one"
