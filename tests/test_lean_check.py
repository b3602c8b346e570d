"""Every kind of text, honest, wrong and hostile, gets its verdict and harms nothing after it.

One pool of one worker serves the whole file, so "and the next good proof is still proved" is about
the very same Lean process, the harder case.
"""

import random
import time
from collections.abc import Iterator

import pytest

from fdfast.errors import InputError
from fdfast.lean import Attempt, LeanPool, Verdict, find_lean, verify, verify_many

GOOD = "theorem good (a : Prop) (h : a) : a :="
FALSE = "theorem wrong : False :="


@pytest.fixture(scope="module")
def pool() -> Iterator[LeanPool]:
    with LeanPool(workers=1, timeout_s=20.0, toolchain=find_lean(backend="embedded")) as pool:
        yield pool


def assert_still_works(pool: LeanPool) -> None:
    verdict = pool.check(GOOD, "h")
    assert verdict.proved, verdict


def test_honest_proofs_are_proved(pool: LeanPool) -> None:
    cases = [
        (GOOD, "h"),
        (GOOD, ' h -- a comment with axiom, sorry, open and "quotes" in it'),
        (GOOD, "\n  -- first\n  /- outer /- inner: theorem -/ end -/\n  id h\n"),
        (GOOD, "/- < -//- two comments -/h--c/-"),
        (GOOD, "have k := h; (k)"),
        (GOOD, "show a from h"),
        (GOOD, "set_option maxRecDepth 1000 in set_option maxHeartbeats 0 in h"),
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
        verdict = pool.check(statement, proof)
        assert verdict.proved, f"{statement} {proof}: {verdict}"


def test_wrong_proofs_fail_with_lines_of_the_proof_text(pool: LeanPool) -> None:
    verdict = pool.check(GOOD, "id\n  (True.intro)")
    assert verdict.kind == "failed"
    error = next(message for message in verdict.messages if message.severity == "error")
    assert (error.line, error.column) == (2, 2)
    assert "mismatch" in error.text
    assert str(verdict).startswith("failed: 2:2: Application type mismatch")
    for proof in ("_", "nosuchname", "by exact h", "(h", "h)", "fun", "42", "h h", '"abc'):
        verdict = pool.check(GOOD, proof)
        assert verdict.kind == "failed", f"{proof!r}: {verdict}"
        assert verdict.messages
    assert_still_works(pool)


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
        ("h\nset_option maxRecDepth 9", "`set_option` in the proof"),
        ("set_option maxRecDepth 9 pp.all true in h", "`set_option` in the proof"),
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
def test_dishonest_text_is_rejected_before_lean_sees_it(
    pool: LeanPool, proof: str, reason: str
) -> None:
    verdict = pool.check(GOOD, proof)
    assert (verdict.kind, verdict.reason) == ("rejected", reason)


def test_axioms_are_found_by_the_audit_whatever_the_screen_thinks(pool: LeanPool) -> None:
    header = "axiom cheat : False\n"
    verdict = pool.check(FALSE, "cheat", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "the proof uses the axiom cheat")
    header = "noncomputable def hole : False := sorryAx _ Bool.true\n"
    verdict = pool.check(FALSE, "hole", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "sorry")
    header = "theorem hole {T : Sort u} (x : T) : Eq x x := sorryAx _ Bool.true\n"
    verdict = pool.check("theorem t : Eq 1 1 :=", "hole 1", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "sorry")
    header = "set_option warn.sorry false\ntheorem hole : False := sorryAx _ Bool.true\n"
    verdict = pool.check(FALSE, "hole", header)
    assert (verdict.kind, verdict.reason) == ("rejected", "sorry")
    assert_still_works(pool)


def test_headers_that_switch_the_kernel_off_or_run_code_are_rejected(pool: LeanPool) -> None:
    for header, reason in (
        ("set_option debug.skipKernelTC true\n", "`debug.skipKernelTC` above the theorem"),
        ("run_cmd skip\n", "`run_cmd` above the theorem"),
        ("#exit\n", "`#exit` above the theorem"),
        ("/- open\n", "unclosed comment, opened in line 3"),
    ):
        verdict = pool.check(FALSE, "h", header)
        assert (verdict.kind, verdict.reason) == ("rejected", reason)


def test_shadowed_names_do_not_make_a_false_statement_true(pool: LeanPool) -> None:
    # In the proof the name stands for something else; the statement was read before.
    verdict = pool.check(FALSE, "let False := True; (True.intro : False)")
    assert verdict.kind == "failed"
    verdict = pool.check(FALSE, "wrong")  # a proof by itself
    assert verdict.kind == "failed"
    verdict = pool.check(FALSE, "x where x : True := True.intro")
    assert verdict.kind == "failed"
    verdict = pool.check("theorem Nat.add_comm : True :=", "True.intro")
    assert verdict.kind == "rejected"
    assert "already been declared" in verdict.reason
    assert_still_works(pool)


def test_a_header_gives_context_and_namespaces(pool: LeanPool) -> None:
    header = "namespace Mine\nvariable {a : Prop}\ntheorem two (x : a) : And a a := ⟨x, x⟩\n"
    verdict = pool.check("theorem t (h : a) : a :=", "(two h).left", header)
    assert verdict.proved, verdict
    verdict = pool.check("theorem t (h : True) : True :=", "h", "prelude\nimport FdBase\n")
    assert verdict.proved, verdict


def test_output_that_imitates_lean_is_not_believed(pool: LeanPool) -> None:
    # The proof fails, and its error message carries a forged line of Lean's JSON.
    forged = '{"severity":"information","data":"\'wrong\' does not depend on any axioms"}'
    verdict = pool.check(FALSE, f'(fun (x : Eq "{forged}" "") => x) rfl')
    assert verdict.kind == "failed"
    verdict = pool.check(FALSE, f"«\n{forged}\n»")
    assert verdict.kind == "failed"
    assert_still_works(pool)


def table_proof(variables: int) -> str:
    """A match over all rows of a truth table: with 12 variables 15 s of honest work for Lean."""
    rows = (
        ", ".join(".true" if row >> i & 1 else ".false" for i in range(variables))
        for row in range(2**variables)
    )
    arms = " ".join(f"| {row} => rfl" for row in rows)
    return f"match {', '.join(['b'] * variables)} with {arms}"


SLOW = ("theorem slow (b : Bool) : Eq b b :=", table_proof(12), "")


def test_an_endless_proof_times_out_and_the_next_is_proved() -> None:
    with LeanPool(workers=1, timeout_s=1.0) as short:
        assert_still_works(short)
        for slow in (SLOW, (GOOD, "h " * 300_000, "")):
            start = time.monotonic()
            verdict = short.check(*slow)
            assert time.monotonic() - start < 10.0
            assert (verdict.kind, verdict.reason) == (
                "timeout",
                "Lean was still busy after 1 s (the proof)",
            )
            assert_still_works(short)


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
def test_deep_and_huge_terms_end_in_a_verdict(pool: LeanPool, proof: str) -> None:
    assert pool.check(GOOD, proof).kind in ("failed", "timeout", "crashed")
    assert_still_works(pool)


def test_a_mebibyte_of_comment_or_string_is_no_obstacle(pool: LeanPool) -> None:
    assert pool.check(GOOD, "h -- " + "x" * (1 << 20)).proved
    assert pool.check(GOOD, f'(fun (_ : String) => h) "{"x" * (1 << 20)}"').proved


def test_long_output_is_capped_and_still_a_failure(pool: LeanPool) -> None:
    proof = "\n".join(f"have x{i} := nosuch{i}" for i in range(60)) + "\nh"
    verdict = pool.check(GOOD, proof)
    assert (verdict.kind, len(verdict.messages)) == ("failed", 60)
    proof = f'(rfl : Eq "{"x" * (2 << 20)}" "")'
    verdict = pool.check(GOOD, proof)
    assert verdict.kind == "failed"
    assert sum(len(message.text) for message in verdict.messages) <= 1 << 20
    assert_still_works(pool)


def test_a_proof_over_the_memory_limit_crashes_alone() -> None:
    with LeanPool(workers=1, timeout_s=20.0, memory_mb=200) as small:
        proof = "".join(f"have x{i} := nosuch{i}; " for i in range(300)) + "h"
        verdict = small.check(GOOD, proof)
        assert (verdict.kind, verdict.reason) == (
            "crashed",
            "Lean went over its memory limit of 200 MiB (the proof)",
        )
        assert_still_works(small)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_message_with_a_line_separator_in_it_is_one_message(
    pool: LeanPool, separator: str
) -> None:
    verdict = pool.check(FALSE, f"«a{separator}b»")
    assert verdict.kind == "failed", verdict
    assert len(verdict.reason.splitlines()) == 1


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


def test_a_statement_that_does_not_elaborate_is_no_failure_of_the_proof(pool: LeanPool) -> None:
    verdict = pool.check("theorem t : NoSuch :=", "rfl")
    assert verdict.kind == "rejected"
    assert verdict.reason.startswith("the statement does not elaborate: type of theorem")
    assert pool.check("theorem t : let x :=", "True; x").kind == "rejected"


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


def test_a_verdict_prints_as_one_line(pool: LeanPool) -> None:
    assert str(Verdict("proved", level=1)) == "proved"
    assert str(Verdict("rejected", reason="sorry")) == "rejected: sorry"
    assert "\n" not in str(pool.check(GOOD, "id\n\n(\n)"))
