"""Every kind of text, honest, wrong and hostile, gets its verdict and harms nothing after it.

One Checker serves a whole test, so "and the next good proof is still proved" is about the very same
Lean process, the harder case.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdfast.errors import InputError, MachineError
from fdfast.lean import Attempt, Toolchain, Verdict, find_lean, folder, verify, verify_many
from fdfast.lean import checker as checker_module
from fdfast.lean.checker import Checker
from fdfast.lean.process import Finished, LeanProcess

GOOD = "theorem good (a : Prop) (h : a) : a :="
FALSE = "theorem wrong : False :="


@pytest.fixture
def checker() -> Iterator[Checker]:
    checker = Checker(find_lean(), timeout_s=20.0, memory_bytes=2 << 30)
    yield checker
    checker.close()


def assert_still_works(checker: Checker) -> None:
    verdict = checker.verify(GOOD, "h", "")
    assert verdict.proved, verdict


def children() -> set[int]:
    """Every live descendant of this process."""
    found, queue = set(), [os.getpid()]
    while queue:
        pid = queue.pop()
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                queue += (new := [int(child) for child in tasks.read_text().split()])
            except (FileNotFoundError, ProcessLookupError):
                continue
            found |= set(new)
    return found


def test_honest_proofs_are_proved(checker: Checker) -> None:
    cases = [
        (GOOD, "h"),
        (GOOD, ' h -- a comment with axiom, sorry, open and "quotes" in it'),
        (GOOD, "\n  -- first\n  /- outer /- inner: theorem -/ end -/\n  id h\n"),
        (GOOD, "/- < -//- two comments -/h--c/-"),
        (GOOD, "have k := h; (k)"),
        (GOOD, "show a from h"),
        (GOOD, "let f := fun (x : a) => x; f h"),
        ("theorem t (a b : Prop) (h' : And a b) : And b a :=", "⟨h'.right, h'.left⟩"),
        (
            "theorem t (a b : Prop) (h : Or a b) : Or b a :=",
            "match h with\n  | .inl x => .inr x\n  | .inr x => .inl x",
        ),
        ("theorem t (a b : Prop) : a → b → a :=", "fun open_a _ => open_a"),
        ("theorem t (n : Nat) : Eq (Nat.add n 0) n :=", "@rfl Nat n"),
        ("theorem Deep.name.t : True :=", "True.intro"),
        ("theorem u {T : Type} (x : T) : Eq x x :=", "rfl"),
        ('theorem t : Eq "a" "a" :=', "rfl"),
    ]
    for statement, proof in cases:
        verdict = checker.verify(statement, proof, "")
        assert verdict.proved, f"{statement} {proof}: {verdict}"


def test_wrong_proofs_fail_with_lines_of_the_proof_text(checker: Checker) -> None:
    verdict = checker.verify(GOOD, "id\n  (True.intro)", "")
    assert verdict.kind == "failed"
    error = next(message for message in verdict.messages if message.severity == "error")
    assert (error.line, error.column) == (2, 2)
    assert "mismatch" in error.text
    assert str(verdict).startswith("failed: 2:2: Application type mismatch")
    for proof in ("_", "nosuchname", "by exact h", "(h", "h)", "fun", "42", "h h", '"abc'):
        verdict = checker.verify(GOOD, proof, "")
        assert verdict.kind == "failed", f"{proof!r}: {verdict}"
        assert verdict.messages
    assert_still_works(checker)


@pytest.mark.parametrize(
    ("proof", "reason"),
    [
        ("", "the proof is empty"),
        (" \n\t", "the proof is empty"),
        ("-- nothing", "the proof is empty: it has only comments"),
        ("sorry", "sorry"),
        ("sorryAx _ Bool.true", "sorry"),
        ("_root_.sorryAx _ Bool.true", "sorry"),
        ("h\nset_option warn.sorry false", "`set_option` in the proof"),
        ("set_option debug.skipKernelTC true in h", "`set_option` in the proof"),
        ("h\naxiom cheat : False", "`axiom` in the proof"),
        ("h axiom cheat : False", "`axiom` in the proof"),
        ("h\nunsafe axiom cheat : False", "`unsafe` in the proof"),
        ("h\ntheorem good : True := True.intro", "`theorem` in the proof"),
        ("h\nend\nnamespace X", "`end` in the proof"),
        ("h\nopen Nat", "`open` in the proof"),
        ('h\nnotation "False" => True', "`notation` in the proof"),
        ('h\nlocal macro "x" : term => `(True)', "`local` in the proof"),
        ("h\nmacro_rules | `(x) => `(y)", "`macro_rules` in the proof"),
        ("h\nimport Evil", "`import` in the proof"),
        ("h\ninstance : Nat := 1", "`instance` in the proof"),
        ("h\n@[simp] def x := 1", "`@[` in the proof"),
        ("h\n#exit", "`#exit` in the proof"),
        ("h\n#eval 1", "`#eval` in the proof"),
        ("h\nrun_cmd skip", "`run_cmd` in the proof"),
        ("h\ninitialize x : Nat ← y", "`initialize` in the proof"),
        ("/- h", "unclosed comment, opened in line 1"),
        ("h\n/- /- -/", "unclosed comment, opened in line 2"),
        ("h /-/", "unclosed comment, opened in line 1"),
        ("h /-- doc -/", "documentation comment"),
        # Comments to us, symbols to Lean: `<-` `-1`, `//` `-x`.
        ("a <--1\nb //-x axiom -/ c", "ambiguous comment: `<--`"),
        ("b //-x axiom -/ c", "ambiguous comment: `//-`"),
        ("b \\/-x axiom -/ c", "ambiguous comment: `\\/-`"),
        # What could hide a word from us but not from Lean, or the other way round:
        ("h «--»\naxiom x : False", "`axiom` in the proof"),
        ("h '\"' axiom x : False --\"", "`axiom` in the proof"),
        ('h "-- \\" /-"\naxiom x : False', "`axiom` in the proof"),
        ("h 0b1open", "a number glued to a word: `0b1open`"),
        ("h 1.axiom", "`axiom` in the proof"),
        ("h ..axiom x : False", "`axiom` in the proof"),
        ("h⁻¹axiom x : False", "`axiom` in the proof"),
        ("lcProof", "`lcProof` in the proof"),
        ("h\0", "the text has a NUL byte"),
        ("h \ud800", "the text is no Unicode: lone surrogate at character 2"),
        ("h" * (5 << 20), f"the text has {5 << 20} characters; at most {4 << 20} are read"),
    ],
)
def test_dishonest_text_is_rejected_before_lean_sees_it(proof: str, reason: str) -> None:
    verdict = verify(GOOD, proof)
    assert (verdict.kind, verdict.reason) == ("rejected", reason)


def test_axioms_are_found_by_the_audit_whatever_the_screen_thinks(checker: Checker) -> None:
    header = "axiom cheat : False\n"
    verdict = checker.verify(FALSE, "cheat", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "the proof uses the axiom cheat")
    header = "noncomputable def hole : False := sorryAx _ Bool.true\n"
    verdict = checker.verify(FALSE, "hole", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "sorry")
    header = "theorem hole {T : Sort u} (x : T) : Eq x x := sorryAx _ Bool.true\n"
    verdict = checker.verify("theorem t : Eq 1 1 :=", "hole 1", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "sorry")
    header = "set_option warn.sorry false\ntheorem hole : False := sorryAx _ Bool.true\n"
    verdict = checker.verify(FALSE, "hole", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "sorry")
    assert_still_works(checker)


def test_headers_that_switch_the_kernel_off_or_run_code_are_rejected() -> None:
    for header, reason in (
        ("set_option debug.skipKernelTC true\n", "`debug.skipKernelTC` above the theorem"),
        ("run_cmd skip\n", "`run_cmd` above the theorem"),
        ("#exit\n", "`#exit` above the theorem"),
        ("/- open\n", "unclosed comment, opened in line 3"),
    ):
        verdict = verify(FALSE, "h", header=header)
        assert (verdict.kind, verdict.reason) == ("rejected", reason)


def test_shadowed_names_do_not_make_a_false_statement_true(checker: Checker) -> None:
    # In the proof the name stands for something else; the statement was read before.
    verdict = checker.verify(FALSE, "let False := True; (True.intro : False)", "")
    assert verdict.kind == "failed"
    verdict = checker.verify(FALSE, "wrong", "")  # a proof by itself
    assert verdict.kind == "failed"
    verdict = checker.verify(FALSE, "x where x : True := True.intro", "")
    assert verdict.kind == "failed"
    verdict = checker.verify("theorem Nat.add_comm : True :=", "True.intro", "")
    assert verdict.kind == "rejected"
    assert "already been declared" in verdict.reason
    assert_still_works(checker)


def test_a_header_gives_context_and_namespaces(checker: Checker) -> None:
    header = "namespace Mine\nvariable {a : Prop}\ntheorem two (x : a) : And a a := ⟨x, x⟩\n"
    verdict = checker.verify("theorem t (h : a) : a :=", "(two h).left", header)
    assert verdict.proved, verdict
    verdict = checker.verify("theorem t (h : True) : True :=", "h", "prelude\nimport FdBase\n")
    assert verdict.proved, verdict


def test_output_that_imitates_lean_is_not_believed(checker: Checker) -> None:
    # The proof fails, and its error message carries a forged line of Lean's JSON.
    forged = '{"severity":"information","data":"\'wrong\' does not depend on any axioms"}'
    verdict = checker.verify(FALSE, f'(fun (x : Eq "{forged}" "") => x) rfl', "")
    assert verdict.kind == "failed"
    verdict = checker.verify(FALSE, f"«\n{forged}\n»", "")
    assert verdict.kind == "failed"
    assert_still_works(checker)


def table_proof(variables: int) -> str:
    """A match over all rows of a truth table: with 12 variables 15 s of honest work for Lean."""
    rows = (
        ", ".join(".true" if row >> i & 1 else ".false" for i in range(variables))
        for row in range(2**variables)
    )
    arms = " ".join(f"| {row} => rfl" for row in rows)
    return f"match {', '.join(['b'] * variables)} with {arms}"


SLOW = ("theorem slow (b : Bool) : Eq b b :=", table_proof(12), "")


@pytest.mark.parametrize("slow", [SLOW, (GOOD, "h " * 300_000, "")], ids=["table", "application"])
def test_an_endless_proof_times_out_and_leaves_no_process(slow: tuple[str, str, str]) -> None:
    before = children()
    start = time.monotonic()
    verdict = verify(*slow[:2], timeout_s=2.0)
    took = time.monotonic() - start
    assert (verdict.kind, verdict.reason) == (
        "timeout",
        "Lean was still busy after 2 s (the proof)",
    )
    assert took < 10.0
    assert children() <= before


def test_after_a_timeout_the_same_process_proves_on() -> None:
    checker = Checker(find_lean(), timeout_s=2.0, memory_bytes=2 << 30)
    assert_still_works(checker)
    assert checker.verify(*SLOW).kind == "timeout"
    assert_still_works(checker)
    checker.close()


@pytest.mark.parametrize(
    "proof",
    [
        "(" * 20_000 + "h" + ")" * 20_000,
        "id (" * 5_000 + "h" + ")" * 5_000,
        "⟨" * 50_000,
        "(fun (_ : Eq (Nat.pow 2 (Nat.pow 2 40)) 1) => h) rfl",
        "fun x : " * 5_000,
    ],
    ids=["brackets", "applications", "open", "power", "binders"],
)
def test_deep_and_huge_terms_end_in_a_verdict(checker: Checker, proof: str) -> None:
    assert checker.verify(GOOD, proof, "").kind in ("failed", "timeout", "crashed")
    assert_still_works(checker)


def test_a_mebibyte_of_comment_or_string_is_no_obstacle(checker: Checker) -> None:
    assert checker.verify(GOOD, "h -- " + "x" * (1 << 20), "").proved
    assert checker.verify(GOOD, f'(fun (_ : String) => h) "{"x" * (1 << 20)}"', "").proved


def test_long_output_is_capped_and_still_a_failure(checker: Checker) -> None:
    proof = "\n".join(f"have x{i} := nosuch{i}" for i in range(60)) + "\nh"
    verdict = checker.verify(GOOD, proof, "")
    assert (verdict.kind, len(verdict.messages)) == ("failed", 60)
    proof = f'(rfl : Eq "{"x" * (2 << 20)}" "")'
    verdict = checker.verify(GOOD, proof, "")
    assert verdict.kind == "failed"
    assert sum(len(message.text) for message in verdict.messages) <= 1 << 20
    assert_still_works(checker)


def test_a_proof_over_the_memory_limit_crashes_alone() -> None:
    checker = Checker(find_lean(), timeout_s=20.0, memory_bytes=200 << 20)
    proof = "".join(f"have x{i} := nosuch{i}; " for i in range(300)) + "h"
    verdict = checker.verify(GOOD, proof, "")
    assert (verdict.kind, verdict.reason) == (
        "crashed",
        "Lean went over its memory limit of 200 MiB (the proof)",
    )
    assert_still_works(checker)
    checker.close()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_message_with_a_line_separator_in_it_is_one_message(
    checker: Checker, separator: str
) -> None:
    verdict = checker.verify(FALSE, f"«a{separator}b»", "")
    assert verdict.kind == "failed", verdict
    assert len(verdict.reason.splitlines()) == 1


Job = tuple[str, ...]


def spoil_jobs(
    monkeypatch: pytest.MonkeyPatch, *spoilt: str, status: int = -signal.SIGKILL
) -> list[Job]:
    """Let the next jobs whose file begins with these names end with `status`; what was run."""
    left, seen = list(spoilt), []
    run = LeanProcess.run

    def spoil(self: LeanProcess, arguments: list[str], **options: object) -> Finished:
        seen.append(tuple(arguments))
        finished = run(self, arguments, **options)  # type: ignore[arg-type]
        if left and arguments[-1].startswith(left[0]):
            left.pop(0)
            return Finished("exit", status, "", "", False)
        return finished

    monkeypatch.setattr(LeanProcess, "run", spoil)
    return seen


@pytest.mark.parametrize("stage", ["Statement", "Attempt", "Audit", "Warm"])
def test_a_job_killed_from_outside_is_run_again_then_a_machine_error(
    checker: Checker, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    for number, times in enumerate((1, 2)):
        monkeypatch.setattr(checker_module, "_WARM", set())
        checker.close()
        statement = f"theorem {stage}{number} (a : Prop) (h : a) : a :="
        with monkeypatch.context() as patch:
            jobs = spoil_jobs(patch, *[stage] * times)
            if times == 1:
                assert checker.verify(statement, "h", "").proved
            else:
                with pytest.raises(MachineError, match=r"^lean: .*(signal 9|status -9)[^\n]*$"):
                    checker.verify(statement, "h", "")
            assert sum(job[-1].startswith(stage) for job in jobs) == 2
        assert_still_works(checker)


@pytest.mark.parametrize("status", [-signal.SIGSEGV, -signal.SIGABRT, 1, 134])
def test_only_the_run_that_holds_the_proof_can_crash(
    checker: Checker, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    assert_still_works(checker)
    with monkeypatch.context() as patch:
        jobs = spoil_jobs(patch, "Attempt", status=status)
        verdict = checker.verify(GOOD, "h", "")
        assert verdict.kind == "crashed", verdict
        assert len(jobs) == 1
    for stage in ("Statement", "Audit"):
        statement = f"theorem only{stage}{abs(status)} (a : Prop) (h : a) : a :="
        with monkeypatch.context() as patch:
            spoil_jobs(patch, stage, stage, status=status)
            with pytest.raises(MachineError, match=r"^lean: Lean ended with (signal|status) "):
                checker.verify(statement, "h", "")
    assert_still_works(checker)


def test_a_process_killed_from_outside_is_replaced(checker: Checker) -> None:
    assert_still_works(checker)
    assert checker._process is not None
    old = checker._process._process.pid
    os.kill(old, signal.SIGKILL)
    assert_still_works(checker)
    timer = threading.Timer(0.3, kill_holder, [checker])  # while a job runs
    timer.start()
    verdict = checker.verify("theorem slow (b : Bool) : Eq b b :=", table_proof(9), "")
    timer.join()
    assert verdict.kind in ("proved", "failed"), verdict


def kill_holder(checker: Checker) -> None:
    assert checker._process is not None
    os.kill(checker._process._process.pid, signal.SIGKILL)


def test_a_memory_limit_too_low_for_lean_itself_is_a_machine_error() -> None:
    checker = Checker(find_lean(), timeout_s=20.0, memory_bytes=1 << 20)
    try:
        with pytest.raises(MachineError, match=r"without any proof; raise memory_bytes$"):
            checker.verify("theorem low (a : Prop) (h : a) : a :=", "h" + " " * 1000, "")
    finally:
        checker.close()


def test_the_clock_does_not_run_while_lean_is_loaded(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = find_lean()
    start = type(lean).start

    def slow_start(self: Toolchain) -> LeanProcess:
        time.sleep(1.2)
        return start(self)

    monkeypatch.setattr(type(lean), "start", slow_start)
    monkeypatch.setattr(checker_module, "_WARM", set())
    assert verify(GOOD, "h", timeout_s=1.0).proved


def test_a_job_that_does_not_reach_lean_is_a_machine_error(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when _child.py is replaced by another version under a running program.
    assert_still_works(checker)
    dumps = json.dumps

    def without_path(job: dict[str, object]) -> str:
        return dumps({key: value for key, value in job.items() if key != "lean_path"})

    with monkeypatch.context() as patch:
        patch.setattr("fdfast.lean.process.json.dumps", without_path)
        with pytest.raises(MachineError, match=r"a job does not start in .*KeyError.*lean_path"):
            checker.verify(GOOD, "h", "")
    assert_still_works(checker)


def test_a_base_library_that_is_gone_is_a_machine_error(tmp_path: Path) -> None:
    source = find_lean()
    shutil.copytree(source.library_dirs[0], tmp_path / "base")
    lean = dataclasses.replace(source, library_dirs=(tmp_path / "base",))
    checker = Checker(lean, timeout_s=20.0, memory_bytes=2 << 30)
    assert_still_works(checker)
    (tmp_path / "base" / "FdBase.olean").unlink()
    for statement in (GOOD, "theorem other (a : Prop) (h : a) : a :="):
        with pytest.raises(MachineError, match=r"base library .* is gone"):
            checker.verify(statement, "h", "")
    checker.close()


def test_folders_of_dead_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine = f"fdfast-lean-{folder._machine()}"
    stale = tmp_path / f"{mine}-{dead.pid}-abc"
    kept = [
        tmp_path / f"{mine}-{os.getpid()}-abc",  # ours
        tmp_path / f"{mine}-1-abc",  # a living process of another user, or ours
        tmp_path / f"fdfast-lean-00000000-{dead.pid}-abc",  # of another machine or container
        tmp_path / "fdfast-lean-notes",
        tmp_path / f"other-{dead.pid}-abc",
    ]
    for each in (stale, *kept):
        each.mkdir()
        (each / "file").touch()
    (tmp_path / f"{mine}-{dead.pid}-link").symlink_to(kept[0])
    folder.remove_stale_folders(str(tmp_path))
    assert not stale.exists()
    assert all((each / "file").exists() for each in kept)
    folder.remove_stale_folders(str(tmp_path / "absent"))


def test_a_killed_run_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    code = f"from fdfast.lean import verify; verify({GOOD!r}, {'h ' * 10!r} * 30_000)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    for _ in range(1000):
        if list(tmp_path.glob("fdfast-lean-*/Attempt_*")):
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(f"fdfast-lean-*-{process.pid}-*"))
    code = f"from fdfast.lean import verify; assert verify({GOOD!r}, 'h').proved"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(tmp_path.glob("fdfast-lean-*"))


def test_verdicts_come_in_the_order_of_the_items() -> None:
    rng = random.Random(0)
    items: list[Attempt | tuple[str, str, str]] = []
    kinds = []
    for i in range(16):
        good = rng.random() < 0.5
        statement = f"theorem t{i} (a : Prop) (h : a) : a :="
        items.append(
            (statement, "h" if good else "sorry", "") if i % 2 else Attempt(statement, "h")
        )
        kinds.append("proved" if good or i % 2 == 0 else "rejected")
    assert [verdict.kind for verdict in verify_many(items, workers=3)] == kinds
    assert verify_many([]) == []


def test_a_statement_that_does_not_elaborate_is_no_failure_of_the_proof() -> None:
    verdict = verify("theorem t : NoSuch :=", "rfl")
    assert verdict.kind == "rejected"
    assert verdict.reason.startswith("the statement does not elaborate: type of theorem")
    assert verify("theorem t : let x :=", "True; x").kind == "rejected"


@pytest.mark.parametrize(
    "statement",
    [
        "",
        "theorem t : True",
        "theorem t : True := trivial",
        "theorem : True :=",
        "def t : Nat :=",
        "-- theorem t : True :=",
        "theorem t : True -- :=",
        "True :=",
    ],
)
def test_a_malformed_statement_is_an_input_error_of_one_line(statement: str) -> None:
    with pytest.raises(InputError, match=r"^formal_statement [^\n]*$"):
        verify(statement, "h")


def test_an_import_that_is_not_there_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"header imports Mathlib, .* it has FdBase"):
        verify(GOOD, "h", header="import Mathlib\nopen Nat\n")


def test_workers_and_timeouts_must_be_positive() -> None:
    with pytest.raises(InputError, match=r"workers must be at least 1; got 0"):
        verify_many([(GOOD, "h", "")], workers=0)
    with pytest.raises(InputError, match=r"timeout_s must be more than 0; got 0"):
        verify(GOOD, "h", timeout_s=0)


def test_a_verdict_prints_as_one_line() -> None:
    assert str(Verdict("proved")) == "proved"
    assert str(Verdict("rejected", reason="sorry")) == "rejected: sorry"
    assert "\n" not in str(verify(GOOD, "id\n\n(\n)"))
