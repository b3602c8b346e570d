"""Hostile proofs get no reward on any backend, and each is told why.

`embedded` is the wheel's Lean; `lean` and `repl` are those of lean_project.py, whose verdicts are
real. Where the screen refuses a text before Lean sees it, a second test turns the screen off and
shows that the walls behind it hold by themselves.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdfast.errors import InputError
from fdfast.lean import LeanPool, Toolchain, checker
from fdfast.lean.backend import FileBackend, Output
from fdfast.lean.repl_backend import ReplBackend
from fdfast.lean.run import Run

GOOD = "theorem good (a : Prop) (h : a) : a :="
FALSE = "theorem wrong : False :="
KINDS = ("embedded", "lean", "repl")


@pytest.fixture(scope="module", params=KINDS)
def pool(request: pytest.FixtureRequest, leans: dict[str, Toolchain]) -> Iterator[LeanPool]:
    with LeanPool(workers=1, timeout_s=20.0, toolchain=leans[request.param]) as pool:
        yield pool


# Statement, proof, header, kind of verdict, and its reason or the beginning of that.
REFUSED = {
    "sorry": (FALSE, "sorry", "", "rejected", "sorry"),
    "sorryAx": (FALSE, "sorryAx _ Bool.true", "", "rejected", "sorry"),
    "sorryAx with warnings off": (
        FALSE,
        "hole",
        "set_option warn.sorry false\ntheorem hole : False := sorryAx _ Bool.true\n",
        "rejected",
        "sorry",
    ),
    "axiom in the proof": (FALSE, "cheat\naxiom cheat : False", "", "rejected", "`axiom` in the"),
    "axiom in the header": (
        FALSE,
        "cheat",
        "axiom cheat : False\n",
        "rejected",
        "the proof uses the axiom cheat",
    ),
    "the theorem again": (
        FALSE,
        "h\ntheorem wrong : True := True.intro",
        "",
        "rejected",
        "`theorem` in the proof",
    ),
    "its terms again": (FALSE, "h\ndef False := True", "", "rejected", "`def` in the proof"),
    "notation": (FALSE, 'h\nlocal notation "False" => True', "", "rejected", "`local` in the"),
    "macro": (FALSE, "h\nmacro_rules | `(x) => `(y)", "", "rejected", "`macro_rules` in the proof"),
    "macro in the header": (
        FALSE,
        "h",
        'macro "x" : term => `(True)\n',
        "rejected",
        "`macro` above the theorem",
    ),
    "no kernel": (
        FALSE,
        "set_option debug.skipKernelTC true in h",
        "",
        "rejected",
        "`set_option` in the proof",
    ),
    "no kernel by the header": (
        FALSE,
        "h",
        "set_option debug.skipKernelTC true\n",
        "rejected",
        "`debug.skipKernelTC` above the theorem",
    ),
    "#exit": (FALSE, "h\n#exit", "", "rejected", "`#exit` in the proof"),
    "#exit in the header": (FALSE, "h", "#exit\n", "rejected", "`#exit` above the theorem"),
    "unclosed comment": (FALSE, "h /- True.intro", "", "rejected", "unclosed comment, opened in"),
    "10 MB": (
        GOOD,
        "id (" * (10 << 18),
        "",
        "rejected",
        "the text has 10485760 characters; at most",
    ),
    "shadowed in a term": (FALSE, "let False := True; (True.intro : False)", "", "failed", "1:"),
    "itself": (FALSE, "wrong", "", "failed", "0:8: fail to show termination"),
    "where": (FALSE, "x where x : True := True.intro", "", "failed", "1:"),
    "a frame in a message": (
        FALSE,
        '(fun (x : Eq "{\\"env\\": 0}\n\n{\\"env\\": 0}" "") => x) rfl',
        "",
        "failed",
        "",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_proof_is_refused_with_its_reason(pool: LeanPool, case: str) -> None:
    statement, proof, header, kind, reason = REFUSED[case]
    verdict = pool.check(statement, proof, header)
    assert (verdict.kind, verdict.proved) == (kind, False), verdict
    assert verdict.reason.startswith(reason), verdict
    assert "\n" not in verdict.reason


def test_after_all_of_that_an_honest_proof_is_proved(pool: LeanPool) -> None:
    verdict = pool.check(GOOD, "h")
    assert (verdict.proved, verdict.level) == (True, 1), verdict


def test_an_endless_proof_is_stopped(leans: dict[str, Toolchain]) -> None:
    for kind in KINDS:
        with LeanPool(workers=1, timeout_s=1.0, toolchain=leans[kind]) as short:
            assert short.check(GOOD, "h").proved
            verdict = short.check(GOOD, "h " * 300_000)
            assert (verdict.kind, verdict.proved) == ("timeout", False)
            assert short.check(GOOD, "h").proved


def test_a_statement_made_trivial_by_its_header_is_what_the_caller_wrote(pool: LeanPool) -> None:
    # A header is the caller's word. A proof cannot bring one.
    header = "namespace X\ndef False : Prop := True\n"
    assert pool.check("theorem t : False :=", "True.intro", header).proved
    verdict = pool.check("theorem t : False :=", "True.intro\nend X\nnamespace Y", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "`end` in the proof")
    assert pool.check("theorem t : _root_.False :=", "True.intro", header).kind == "failed"


# With the screen off: what each does to Lean's own walls.
UNSCREENED = {
    "sorry": ("sorry", "sorry"),
    "sorryAx": ("sorryAx _ Bool.true", "sorry"),
    "axiom": ("cheat\naxiom cheat : False", "failed"),
    "again": ("wrong\ntheorem wrong : True := True.intro", "failed"),
    "notation": ('True.intro\nlocal notation "False" => True', "failed"),
    "option": ("set_option warn.sorry false in sorry", "sorry"),
    "skip": ("set_option debug.skipKernelTC true in True.intro", "failed"),
    "exit": ("sorry\n#exit\n", "sorry"),
    "comment": ("sorry /- ", "failed"),
    "two": ("sorry\ntheorem other : True := True.intro", "sorry"),
    "print": ("sorry\n#print axioms True.intro", "sorry"),
}


@pytest.mark.parametrize("case", UNSCREENED)
def test_the_walls_behind_the_screen_hold_by_themselves(
    pool: LeanPool, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    proof, outcome = UNSCREENED[case]
    monkeypatch.setattr(checker, "refuse_proof", lambda _: "")
    verdict = pool.check(FALSE, proof)
    assert outcome in (verdict.kind, verdict.reason), verdict
    assert not verdict.proved
    assert verdict.level == (0 if outcome == "failed" else 1)


@pytest.mark.parametrize("trick", ["forge_frame", "print_garbage", "forge_and_exit"])
@pytest.mark.parametrize("proof", ["h", "sorry"])
def test_an_answer_that_the_code_under_check_prints_is_no_verdict(
    leans: dict[str, Toolchain], monkeypatch: pytest.MonkeyPatch, trick: str, proof: str
) -> None:
    monkeypatch.setattr(checker, "refuse_proof", lambda _: "")
    with LeanPool(workers=1, toolchain=leans["repl"]) as pool:
        for _ in range(2):
            verdict = pool.check(GOOD, f"{proof} -- {trick}")
            assert verdict.kind in ("rejected", "crashed"), verdict
            # The next answers are those of the next checks.
            assert pool.check(FALSE, "h").kind == "failed"
            assert pool.check(GOOD, "h").proved


def patched_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[str, str]:
    """A false statement whose attempt is a compiled true theorem, changed behind the kernel's back.

    So would code look that adds a declaration without the kernel.
    """
    false = "theorem t : Eq (Nat.succ 7777777) 7777779 :="
    true = false.replace("79", "78")
    attempt = FileBackend.attempt

    def patched(self: FileBackend, run: Run, header: str, text: str, compiled: Path) -> Output:
        output = attempt(self, run, header, text.replace(false, true), compiled)
        old, new = (struct.pack("<Q", 2 * number + 1) for number in (7777778, 7777779))
        data = compiled.read_bytes()
        assert data.count(old) == 1
        compiled.write_bytes(data.replace(old, new))
        return output

    monkeypatch.setattr(FileBackend, "attempt", patched)
    return false, "@rfl Nat (Nat.succ 7777777)"


@pytest.mark.parametrize("kind", ["embedded", "lean"])
def test_the_replay_refuses_what_never_passed_the_kernel(
    leans: dict[str, Toolchain], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    statement, proof = patched_attempt(monkeypatch)
    with LeanPool(workers=1, toolchain=leans[kind], level=1) as pool:
        verdict = pool.check(statement, proof)
        # This is what the audit cannot see, so why there is a second rung.
        assert (verdict.kind, verdict.level) == ("proved", 1)
    with LeanPool(workers=1, toolchain=leans[kind], level=2) as pool:
        verdict = pool.check(statement, proof)
        assert (verdict.kind, verdict.level) == ("rejected", 2)
        assert verdict.reason.startswith("the kernel refuses the compiled proof: ")
        assert "(kernel) declaration type mismatch" in verdict.reason
        monkeypatch.undo()
        assert pool.check(statement, proof).kind == "failed"
        verdict = pool.check(GOOD, "h")
        assert (verdict.proved, verdict.level) == (True, 2)


def test_a_pickle_that_never_passed_the_kernel_is_refused_when_it_is_opened(
    leans: dict[str, Toolchain], monkeypatch: pytest.MonkeyPatch
) -> None:
    false = "theorem t : Eq (Nat.succ 7777777) 7777779 :="
    attempt = ReplBackend.attempt

    def patched(self: ReplBackend, run: Run, header: str, text: str, compiled: Path) -> Output:
        output = attempt(
            self, run, header, text.replace(false, false.replace("79", "78")), compiled
        )
        old, new = (struct.pack("<Q", 2 * number + 1) for number in (7777778, 7777779))
        compiled.write_bytes(compiled.read_bytes().replace(old, new))
        return output

    monkeypatch.setattr(ReplBackend, "attempt", patched)
    with LeanPool(workers=1, toolchain=leans["repl"]) as pool:
        verdict = pool.check(false, "@rfl Nat (Nat.succ 7777777)")
        assert verdict.kind == "rejected"
        assert verdict.reason.startswith("the kernel refuses the proof: ")


@pytest.mark.parametrize("kind", ["embedded", "lean"])
def test_a_type_with_a_numeral_is_compared_numeral_by_numeral(
    leans: dict[str, Toolchain], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # The base library has no `rawNatLit`, which the printer of numerals wants.
    attempt = FileBackend.attempt

    def other(self: FileBackend, run: Run, header: str, text: str, compiled: Path) -> Output:
        return attempt(self, run, header, text.replace("Eq 1 2", "Eq 1 1"), compiled)

    monkeypatch.setattr(FileBackend, "attempt", other)
    with LeanPool(workers=1, toolchain=leans[kind]) as pool:
        verdict = pool.check("theorem t : Eq 1 2 :=", "rfl")
        assert (verdict.kind, verdict.level) == ("rejected", 1), verdict
        assert verdict.reason == "the proof changes what the statement says"
        assert pool.check("theorem t : Eq 1 1 :=", "rfl").proved


def test_a_type_that_lean_cannot_print_is_refused(
    pool: LeanPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "_PRINT_ALL", "set_option pp.all true\n")
    for verdict in (
        pool.check("theorem unprinted : Eq 1 1 :=", "rfl"),
        pool.check("theorem unprinted2 : Eq 1 2 :=", "(rfl : Eq 1 1)"),
    ):
        assert verdict.kind == "rejected", verdict
        assert verdict.reason == "Lean cannot print the statement's type in full"


@pytest.mark.parametrize(
    "prelude", ["prelude", "module\nprelude", "/- a -/ module /- b -/ prelude"]
)
@pytest.mark.parametrize("kind", ["lean", "repl"])
def test_a_project_has_its_standard_axioms(
    leans: dict[str, Toolchain], prelude: str, kind: str
) -> None:
    header = f"{prelude}\nimport Init\naxiom Classical.choice : False\n"
    with (
        LeanPool(workers=1, toolchain=leans[kind]) as pool,
        pytest.raises(InputError, match=r"^header begins with `prelude`, which leaves the"),
    ):
        pool.check(FALSE, "Classical.choice", header)


AXIOMS = [
    ("axiom propext : False\n", "propext", "propext"),
    ("private axiom propext : False\n", "propext", "propext"),
    ("namespace Quot\naxiom sound : False\n", "Quot.sound", "Quot.sound"),
    ("axiom Classical.choice.{u} (a : Sort u) : False\n", "Classical.choice True", "choice"),
    ("axiom «Classical».«choice» : False\n", "Classical.choice", "choice"),
    (
        'def s := "/-"\naxiom /- -/ -- x : y\n /- : -/ propext : False\n/- -/\n',
        "propext",
        "propext",
    ),
    ("def n := 1axiom X.propext : False\nopen X\n", "X.propext", "propext"),
    ("namespace X axiom propext : False\nopen X\n", "X.propext", "propext"),
]


@pytest.mark.parametrize(("header", "proof", "name"), AXIOMS)
def test_no_axiom_of_a_header_passes_for_an_allowed_one(
    leans: dict[str, Toolchain], header: str, proof: str, name: str
) -> None:
    for kind in ("lean", "repl"):
        with LeanPool(workers=1, toolchain=leans[kind]) as pool:
            verdict = pool.check(FALSE, proof, header)
            assert verdict.kind == "rejected", verdict
            assert verdict.reason == f"`axiom {name.rpartition('.')[2]}` above the theorem"
            other = pool.check(FALSE, "soundly", "axiom soundly : False\n")
            assert other.reason == "the proof uses the axiom soundly"


@pytest.mark.parametrize("kind", ["lean", "repl"])
def test_the_audit_names_axioms_in_full(
    leans: dict[str, Toolchain], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(checker, "refuse_context", lambda _: "")
    with LeanPool(workers=1, toolchain=leans[kind]) as pool:
        private = pool.check(FALSE, "propext", "private axiom propext : False\n")
        assert private.kind == "rejected", private
        assert private.reason.startswith("the proof uses the axiom _private.")
        if kind == "lean":
            return
        # An opened pickle of the real REPL is inside the header's scopes.
        audit = ReplBackend.audit

        def scoped(self: ReplBackend, run: Run, header: str, text: str, compiled: Path) -> Output:
            return audit(self, run, header, f"open X {text}", compiled)

        monkeypatch.setattr(ReplBackend, "audit", scoped)
        verdict = pool.check(FALSE, "X.propext", "axiom X.propext : False\n")
        assert verdict.reason == "the proof uses the axiom X.propext", verdict


OPTIONS = """
    pp.all pp.explicit pp.universes pp.funBinderTypes pp.piBinderTypes pp.letVarTypes pp.unicode.fun
    pp.fullNames pp.privateNames pp.notation pp.proofs pp.raw pp.exprSizes pp.rawOnError pp.match
    pp.structureInstances pp.fieldNotation pp.coercions pp.instances pp.safeShadowing pp.beta
    """


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_headers_printing_options_do_not_matter(pool: LeanPool, value: str) -> None:
    header = "".join(f"set_option {option} {value}\n" for option in OPTIONS.split())
    statement = "theorem t : Eq (Prod.mk 1 (fun (x : Nat) => x)) (Prod.mk 1 (fun y => y)) :="
    verdict = pool.check(statement, "rfl", header)
    assert verdict.proved, verdict


@pytest.mark.parametrize("header", ["open Nat\n", "open Nat\nnamespace A.B\n"])
def test_a_name_that_is_ambiguous_in_its_header_is_its_own(
    pool: LeanPool, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    # An opened pickle of the real REPL is inside the header's scopes.
    audit, scopes = ReplBackend.audit, header.replace("\n", " ")

    def scoped(self: ReplBackend, run: Run, header: str, text: str, compiled: Path) -> Output:
        return audit(self, run, header, scopes + text, compiled)

    monkeypatch.setattr(ReplBackend, "audit", scoped)
    statement = "theorem add_comm (a b : Nat) : Eq (Nat.add a b) (Nat.add a b) :="
    verdict = pool.check(statement, "rfl", header)
    assert verdict.proved, verdict
    assert pool.check(statement, "sorryAx _ Bool.true", header).reason == "sorry"
    # So are those in the type, to an audit outside the header.
    header = f"def add (n : Nat) : Nat := n\n{header}"
    statement = "theorem three (n : Nat) : Eq (_root_.add n) n :="
    verdict = pool.check(statement, "rfl", header)
    assert verdict.proved, verdict
    assert pool.check(statement, "sorryAx _ Bool.true", header).reason == "sorry"
    # What the other one says is nothing of ours.
    statement = "theorem add_comm (a b : Nat) : Eq (Nat.add a b) (Nat.add a b) :="
    other = statement.replace("(Nat.add a b) :=", "(Nat.add b a) :=")
    assert pool.check(other, "rfl", header).kind == "failed"
