"""A lake project on a machine without lake: its `lean` is real, made from the embedded library.

`lake` is a shell script that sets the environment and runs the program; `Init` is our base library,
compiled under that name; `leanchecker` calls the library's own replay; the REPL is
repl_stand_in.py. So the verdicts that come through a project's backends are Lean's.
"""

import os
import subprocess
import sys
from pathlib import Path

import fdfast.lean.toolchain
from fdfast.lean import Toolchain, find_lean
from fdfast.lean.embedded import BASE_SOURCE

_MAIN = "int lean_main(int, char **); int main(int c, char **v) { return lean_main(c, v); }"
_STAND_IN = Path(__file__).with_name("repl_stand_in.py")
_LEAN_FOLDER = Path(fdfast.lean.toolchain.__file__).parent
_LEANCHECKER = f"""
import ctypes, os, sys
sys.path.append({str(_LEAN_FOLDER)!r})
import _replay
lean = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
lean.lean_initialize()
found = [f"{{place}}/{{sys.argv[2]}}.olean" for place in os.environ["LEAN_PATH"].split(":")]
olean = next(path for path in found if os.path.exists(path))
refused = _replay.replay(lean, olean)
sys.stderr.write(refused and f"uncaught exception: {{refused}}\\n")
sys.stderr.flush()
os._exit(bool(refused))
"""


def make_project(folder: Path) -> Path:
    """Make the project and its toolchain; put `folder / "bin"` into PATH to find its lake."""
    library = find_lean(backend="embedded").origin
    project, tools, modules = folder / "project", folder / "toolchain" / "bin", folder / "modules"
    for each in (project / ".lake" / "build" / "bin", tools, modules, folder / "bin"):
        each.mkdir(parents=True)
    (project / "lakefile.toml").write_text('name = "project"\n')
    lean = tools / "lean"
    subprocess.run(
        [
            *("cc", "-x", "c", "-", "-o", str(lean), f"-L{library.parent}", "-lleanshared"),
            *("-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{library.parent}"),
        ],
        input=_MAIN,
        text=True,
        check=True,
    )
    (folder / "Init.lean").write_bytes(BASE_SOURCE.read_bytes())
    command = [str(lean), "-o", str(modules / "Init.olean"), "Init.lean"]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "leanchecker.py").write_text(_LEANCHECKER)
    # Relative to the project, as lake has it.
    path = os.path.relpath(modules, project)
    _script(
        folder / "bin" / "lake",
        '[ "$1" = env ] || exit 2; shift',
        f"export LEAN_PATH=./{path} LEAN_SYSROOT={tools.parent}",
        'exec "$@"',
    )
    python = f"exec {sys.executable} -I -S"
    _script(tools / "leanchecker", f'{python} {folder}/leanchecker.py {library} "$@"')
    repl = project / ".lake" / "build" / "bin" / "repl"
    _script(repl, f"{python} {_STAND_IN} {library} {_LEAN_FOLDER}")
    return project


def toolchains(folder: Path) -> dict[str, Toolchain]:
    """The embedded Lean, and the two backends of a project made in `folder`."""
    project = make_project(folder)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{before}"
    try:
        return {
            "embedded": find_lean(backend="embedded"),
            "lean": find_lean(project, backend="lean"),
            "repl": find_lean(project, backend="repl"),
        }
    finally:
        os.environ["PATH"] = before


def _script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
