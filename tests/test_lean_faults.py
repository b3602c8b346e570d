"""No fault of the machine is a verdict: it is tried once more, then it is a MachineError."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdfast.errors import InputError, MachineError
from fdfast.lean import LeanPool, Toolchain, backend, find_lean, repl, repl_backend
from fdfast.lean.jobs import Finished, Job

GOOD = "theorem good (a : Prop) (h : a) : a :="
SLOW = (GOOD, "h " * 60_000)  # many seconds of work for Lean
KINDS = ("embedded", "lean", "repl")


@pytest.fixture
def pool() -> Iterator[LeanPool]:
    with LeanPool(workers=1, timeout_s=20.0, toolchain=find_lean(backend="embedded")) as pool:
        yield pool


def assert_still_works(pool: LeanPool) -> None:
    verdict = pool.check(GOOD, "h")
    assert verdict.proved, verdict


def spoil_jobs(
    monkeypatch: pytest.MonkeyPatch, *spoilt: str, status: int = -signal.SIGKILL
) -> list[str]:
    """Let the next jobs whose file begins with these names end with `status`; what was run."""
    left, seen = list(spoilt), []
    finished = Job.finished

    def spoil(self: Job, *arguments: object) -> Finished:
        seen.append(self.arguments[-1])
        found = finished(self, *arguments)  # type: ignore[arg-type]
        if left and self.arguments[-1].startswith(left[0]):
            left.pop(0)
            return Finished(status, "", "", False)
        return found

    monkeypatch.setattr(Job, "finished", spoil)
    return seen


@pytest.mark.parametrize("stage", ["Statement", "Attempt", "Audit", "Warm"])
def test_a_job_killed_from_outside_is_run_again_then_a_machine_error(
    pool: LeanPool, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    for number, times in enumerate((1, 2)):
        monkeypatch.setattr(backend, "_WARM", set())
        statement = f"theorem {stage}{number} (a : Prop) (h : a) : a :="
        with monkeypatch.context() as patch:
            jobs = spoil_jobs(patch, *[stage] * times)
            if times == 1:
                assert pool.check(statement, "h").proved
            else:
                with pytest.raises(MachineError, match=r"^lean: .*signal 9[^\n]*$"):
                    pool.check(statement, "h")
            assert sum(job.startswith(stage) for job in jobs) == 2
        assert_still_works(pool)


@pytest.mark.parametrize("status", [-signal.SIGSEGV, -signal.SIGABRT, 1, 134])
def test_only_the_run_that_holds_the_proof_can_crash(
    pool: LeanPool, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    assert_still_works(pool)
    with monkeypatch.context() as patch:
        jobs = spoil_jobs(patch, "Attempt", status=status)
        verdict = pool.check(GOOD, "h")
        assert verdict.kind == "crashed", verdict
        # Not again with the proof; that our own theorem passes shows whose fault it was.
        assert [job.split("_")[0] for job in jobs] == ["Attempt", "Warm.lean"]
    for stage in ("Statement", "Audit"):
        statement = f"theorem only{stage}{abs(status)} (a : Prop) (h : a) : a :="
        with monkeypatch.context() as patch:
            spoil_jobs(patch, stage, stage, status=status)
            with pytest.raises(MachineError, match=r"^lean: Lean ended with (signal|status) "):
                pool.check(statement, "h")
    assert_still_works(pool)


def test_a_replay_that_cannot_be_run_is_a_machine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with LeanPool(workers=1, level=2) as pool:
        assert_still_works(pool)
        finished = Job.finished

        def spoil(self: Job, *arguments: object) -> Finished:
            found = finished(self, *arguments)  # type: ignore[arg-type]
            return found._replace(status=-signal.SIGSEGV) if self.replay else found

        monkeypatch.setattr(Job, "finished", spoil)
        with pytest.raises(MachineError, match=r"signal 11 \(the replay\)"):
            pool.check(GOOD, "h")


@pytest.mark.parametrize("kind", KINDS)
def test_workers_killed_from_outside_are_replaced(leans: dict[str, Toolchain], kind: str) -> None:
    with LeanPool(workers=1, timeout_s=20.0, toolchain=leans[kind]) as pool:
        for _ in range(2):
            assert_still_works(pool)
            kill_all(pool)  # idle
        for wait in (0.02, 0.05, 0.1):  # at work
            timer = threading.Timer(wait, kill_all, [pool])
            timer.start()
            verdict = pool.check(f"theorem at{int(wait * 100)} (a : Prop) (h : a) : a :=", "h")
            timer.join()
            assert verdict.proved, verdict
        assert_still_works(pool)


def kill_all(pool: LeanPool) -> None:
    for pid in pool.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_killed_again_and_again_are_a_machine_error(
    leans: dict[str, Toolchain], kind: str
) -> None:
    with LeanPool(workers=1, timeout_s=60.0, toolchain=leans[kind]) as pool:
        assert_still_works(pool)
        over = threading.Event()

        def kill_on() -> None:
            while not over.wait(0.4):
                kill_all(pool)

        killer = threading.Thread(target=kill_on)
        killer.start()
        try:
            with pytest.raises(MachineError, match=r"^lean: [^\n]*free memory[^\n]*$"):
                pool.check(*SLOW)
        finally:
            over.set()
            killer.join()
        assert_still_works(pool)


def test_the_clock_does_not_run_while_lean_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = find_lean(backend="embedded")
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 1.2\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with LeanPool(workers=1, timeout_s=1.0, toolchain=lean) as pool:
        assert_still_works(pool)


def test_a_job_that_does_not_reach_lean_is_a_machine_error(
    pool: LeanPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when _child.py is replaced by another version under a running program.
    assert_still_works(pool)
    dumps = json.dumps

    def without_path(job: dict[str, object]) -> str:
        return dumps({key: value for key, value in job.items() if key != "lean_path"})

    with monkeypatch.context() as patch:
        patch.setattr("fdfast.lean.jobs.json.dumps", without_path)
        with pytest.raises(MachineError, match=r"a job does not start in .*KeyError.*lean_path"):
            pool.check(GOOD, "h")
    assert_still_works(pool)


def test_a_program_that_cannot_be_run_is_a_machine_error(leans: dict[str, Toolchain]) -> None:
    lost = dataclasses.replace(leans["lean"], origin=Path("/nowhere/lean"))
    with (
        LeanPool(workers=1, toolchain=lost) as pool,
        pytest.raises(MachineError, match=r"a job does not start in .*FileNotFoundError"),
    ):
        pool.check(GOOD, "h")
    lost = dataclasses.replace(leans["repl"], origin=Path("/nowhere/repl"))
    with (
        LeanPool(workers=1, toolchain=lost) as pool,
        pytest.raises(
            MachineError, match=r"^lean: no worker starts \([^\n]*/nowhere/repl: [^\n]*$"
        ),
    ):
        pool.check(GOOD, "h")


def test_a_base_library_that_is_gone_is_a_machine_error(tmp_path: Path) -> None:
    source = find_lean(backend="embedded")
    shutil.copytree(source.library_dirs[0], tmp_path / "base")
    lean = dataclasses.replace(source, library_dirs=(tmp_path / "base",))
    with LeanPool(workers=1, toolchain=lean) as pool:
        assert_still_works(pool)
        (tmp_path / "base" / "FdBase.olean").unlink()
        for statement in (GOOD, "theorem other (a : Prop) (h : a) : a :="):
            with pytest.raises(MachineError, match=r"base library .* is gone"):
                pool.check(statement, "h")


@pytest.mark.parametrize("left_bytes", [0, 100, 20_000])
def test_a_base_library_that_is_cut_short_is_a_machine_error(
    tmp_path: Path, left_bytes: int
) -> None:
    source = find_lean(backend="embedded")
    shutil.copytree(source.library_dirs[0], tmp_path / "base")
    lean = dataclasses.replace(source, library_dirs=(tmp_path / "base",))
    with LeanPool(workers=1, toolchain=lean) as pool:
        assert_still_works(pool)
        library = tmp_path / "base" / "FdBase.olean"
        whole = library.read_bytes()
        library.unlink()  # what Lean has mapped stays as it was
        library.write_bytes(whole[:left_bytes])
        for statement in (GOOD, f"theorem cut{left_bytes} (a : Prop) (h : a) : a :="):
            with pytest.raises(MachineError, match=r"^lean: [^\n]*run `fdfast lean doctor`$"):
                pool.check(statement, "h")
        library.write_bytes(whole)
        assert_still_works(pool)


LIMITS = {
    "NOFILE": (resource.RLIMIT_NOFILE, 3),
    "NOFILE for Lean": (resource.RLIMIT_NOFILE, 7),
    "AS": (resource.RLIMIT_AS, 3000 << 20),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("kind", ["embedded", "lean"])
def test_a_limit_on_the_machine_is_a_machine_error(
    leans: dict[str, Toolchain], kind: str, limit: str
) -> None:
    which, value = LIMITS[limit]
    with LeanPool(workers=1, toolchain=leans[kind]) as pool:
        assert_still_works(pool)
        before = [(pid, resource.prlimit(pid, which)) for pid in pool.pids()]
        for pid, (_, most) in before:
            resource.prlimit(pid, which, (value, most))
        with pytest.raises(MachineError, match=r"^lean: "):
            pool.check(GOOD, "h")
        for pid, limits in before:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, which, limits)
        assert_still_works(pool)


def test_a_limit_on_one_repl_costs_no_proof(leans: dict[str, Toolchain]) -> None:
    with LeanPool(workers=1, toolchain=leans["repl"]) as pool:
        assert_still_works(pool)
        for pid in pool.pids():
            resource.prlimit(pid, resource.RLIMIT_AS, (3000 << 20, resource.RLIM_INFINITY))
        assert_still_works(pool)


def test_a_limit_on_every_repl_is_a_machine_error(
    leans: dict[str, Toolchain], tmp_path: Path
) -> None:
    program, tight = tmp_path / "repl", tmp_path / "tight"
    program.write_text(
        f"#!/bin/sh\n[ -e {tight} ] && ulimit -v 3000000\nexec {leans['repl'].origin}\n"
    )
    program.chmod(0o755)
    with LeanPool(workers=1, toolchain=dataclasses.replace(leans["repl"], origin=program)) as pool:
        assert_still_works(pool)
        tight.touch()
        kill_all(pool)
        with pytest.raises(MachineError, match=r"^lean: "):
            pool.check(GOOD, "h")
        tight.unlink()
        kill_all(pool)
        assert_still_works(pool)


def test_a_repl_that_a_proof_brings_down_twice_is_the_proofs_fault(
    leans: dict[str, Toolchain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdfast.lean.checker.refuse_proof", lambda _: "")
    with LeanPool(workers=1, toolchain=leans["repl"]) as pool:
        assert_still_works(pool)
        verdict = pool.check(GOOD, "h -- crash")
        assert verdict.kind == "crashed", verdict
        assert pool.stats()["crashed"] == 2
        assert_still_works(pool)


def test_a_temporary_folder_that_no_lean_path_can_name_is_a_machine_error(
    pool: LeanPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_still_works(pool)
    (tmp_path / "a:b").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a:b"))
    with pytest.raises(MachineError, match=r"^lean: the audit cannot import [^\n]*; set TMPDIR$"):
        pool.check(GOOD, "h")


@pytest.mark.parametrize("kind", ["lean", "repl"])
def test_a_header_that_a_project_cannot_import_is_an_input_error(
    leans: dict[str, Toolchain], kind: str
) -> None:
    with LeanPool(workers=1, toolchain=leans[kind]) as pool:
        with pytest.raises(InputError, match=r"^header: [^\n]*unknown module prefix 'Nowhere'"):
            pool.check(GOOD, "h", "import Nowhere\n")
        assert pool.check(GOOD, "h", "import Init\n").proved


def test_what_a_proof_leaves_running_is_killed_before_its_verdict(
    leans: dict[str, Toolchain], tmp_path: Path
) -> None:
    # As code that runs during a check could; here the program itself does it.
    pids, program = tmp_path / "pids", tmp_path / "lean"
    program.write_text(
        "#!/bin/sh\n"
        f"sleep 600 & echo $! >> {pids}\n"
        f"setsid sh -c 'echo $$ >> {pids}; sleep 600; echo' &\n"
        "sleep 0.1\n"
        'printf \'{"status":0}\\n\\n{"severity":"information","data":"x"}\\n\'\n'
        f'exec {leans["lean"].origin} "$@"\n'
    )
    program.chmod(0o755)
    with LeanPool(workers=1, toolchain=dataclasses.replace(leans["lean"], origin=program)) as pool:
        assert pool.check(GOOD, "h").proved
        assert pool.check(GOOD, "nosuch").kind == "failed"
        left = [int(pid) for pid in pids.read_text().split()]
        assert len(left) >= 6
        assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]


def test_a_pickle_that_cannot_be_written_or_read_is_a_machine_error(
    leans: dict[str, Toolchain], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with LeanPool(workers=1, toolchain=leans["repl"]) as pool:
        assert_still_works(pool)
        with monkeypatch.context() as patch:
            elsewhere = repl.PickleEnvironment(str(tmp_path / "absent" / "a.olean"))
            patch.setattr(repl, "PickleEnvironment", lambda _: elsewhere)
            with pytest.raises(MachineError, match=r"^lean: the REPL cannot write [^\n]*crashed"):
                pool.check(GOOD, "h")
        with monkeypatch.context() as patch:
            nowhere = repl.UnpickleEnvironment(str(tmp_path / "absent.olean"))
            patch.setattr(repl, "UnpickleEnvironment", lambda _: nowhere)
            with pytest.raises(MachineError, match=r"^lean: the REPL cannot read [^\n]*crashed"):
                pool.check(GOOD, "h")
        assert_still_works(pool)


def test_a_repl_of_another_protocol_is_a_machine_error(
    leans: dict[str, Toolchain], tmp_path: Path
) -> None:
    program = tmp_path / "repl"
    program.write_text("#!/bin/sh\nwhile read line; do read blank; echo '[]'; echo; done\n")
    program.chmod(0o755)
    lean = dataclasses.replace(leans["repl"], origin=program)
    with LeanPool(workers=1, toolchain=lean) as pool, pytest.raises((MachineError, InputError)):
        pool.check(GOOD, "h")


def test_a_repl_over_half_its_memory_is_replaced(leans: dict[str, Toolchain]) -> None:
    # The stand-in with its library takes about 100 MB, over half of 180.
    with LeanPool(workers=1, memory_mb=180, toolchain=leans["repl"]) as pool:
        for _ in range(3):
            assert_still_works(pool)
        assert pool.stats()["recycled"] >= 2


def test_the_probe_of_the_repl_names_its_secret() -> None:
    query = json.loads(repl_backend._PROBE)
    assert query == {"path": "/%s.lean"}


def test_a_full_temporary_folder_is_a_machine_error(
    pool: LeanPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(MachineError, match=r"lean: .*TMPDIR"):
        pool.check(GOOD, "h")
