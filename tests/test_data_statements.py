"""Published statements come out as `theorem NAME BINDERS : TYPE :=`, or are refused with reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdfast.data.statements import StatementError, lean_code, single_declaration
from fdfast.lean import verify
from fdfast.lean.statement import parse_statement


@pytest.mark.parametrize(
    "hole", ["", " sorry", " by sorry", "\nsorry", " by\n  sorry\n", " by", "by admit"]
)
@pytest.mark.parametrize(
    "statement",
    [
        "theorem t : True :=",
        "lemma t (n : Nat) : Eq n n :=",
        "theorem t : let x := 1; Eq x 1 :=",
        "theorem t : let x := 1; let y := x; Eq x y :=",
        "theorem t : have h : True := trivial; True :=",
        "theorem t (h : let x := 1; Eq x 1) : True :=",
        "theorem t (n : Nat := 3) (s : S := { x := 1 }) : f (n := 2) :=",
        "theorem t : f outlet letter.have -- := sorry\n  = 1 :=",
        "theorem t : A /- := sorry /- nested -/ := -/ :=",
        'theorem t : Eq s "a := by sorry -- \\" /-" :=',
        "theorem t : Eq c '\"' :=",
        "theorem t (h' : f '' s = g '' s) -- it's\n : True :=",
        "theorem sorry_free (h : sorryless) : nosorry' :=",
        "theorem t.{u} (T : Type u) : ∃ x : T, True :=",
    ],
)
def test_a_hole_is_cut_off_and_the_statement_stays(statement: str, hole: str) -> None:
    found = single_declaration(statement + hole)
    assert (found.statement, found.proof, found.above) == (statement, "", "")
    assert parse_statement(found.statement)[0] == statement


@pytest.mark.parametrize(
    ("text", "proof"),
    [
        ("theorem t : True := trivial", "trivial"),
        (
            "theorem t : True := by\n  have h := 1\n  exact trivial",
            "by\n  have h := 1\n  exact trivial",
        ),
        ("theorem t : let x := 1; Eq x 1 := rfl -- by sorry", "rfl -- by sorry"),
    ],
)
def test_a_proof_is_kept(text: str, proof: str) -> None:
    assert single_declaration(text).proof == proof


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("theorem t : True", "theorem t has no `:=` that ends its statement"),
        ("theorem t : let x := 1", "theorem t has no `:=` that ends its statement"),
        ("theorem t : let f | 0 => 1 | _ => 2; f 0 := by sorry", "theorem t has no `:=`"),
        ("theorem t : ∀ n, P n\n  | 0 => rfl", "theorem t has no `:=`"),
        ("theorem t : f sorry := by sorry", "`sorry` within its statement"),
        ("theorem t (h : A := by sorry) : B := by sorry", "`sorry` within its statement"),
        (
            "theorem t : True := by\n  have h : A := sorry\n  exact h",
            "a proof with the hole `sorry`",
        ),
        ("theorem t : True := by /- open", "an unclosed comment, opened in line 1"),
        ('theorem t : True := "open', "an unclosed string, opened in line 1"),
        ("theorem t : a <--b\n := sorry", "the signs `<--`"),
        ("theorem t : True := sorry\ntheorem u : True := sorry", r"it holds 2 \(t, u\)"),
        ("example : True := sorry", "has no `theorem NAME`"),
        ("", "has no `theorem NAME`"),
        ("theorem t : True := trivial\ndef x := 1", "goes on after the theorem with `def`"),
        ("theorem «a b» : True := sorry", "must begin with `theorem NAME`"),
        ("theorem (h : A) : True := sorry", "must begin with `theorem NAME`"),
    ],
)
def test_what_is_no_statement_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(StatementError, match=reason):
        single_declaration(text)


def test_what_stands_above_is_header_and_documentation() -> None:
    text = (
        "import Mathlib\n\nopen Nat -- why\n/-- one -/\nlemma_like\n\n-- a remark\n/-- two\n-/\n"
        "@[simp, norm_cast] private nonrec theorem t : True := by sorry\n\nend"
    )
    found = single_declaration(text)
    assert found.above == "import Mathlib\n\nopen Nat -- why\n/-- one -/\nlemma_like\n"
    assert found.documentation == "/-- two\n-/"
    assert (found.name, found.line) == ("t", 10)


def test_lean_agrees_about_a_let_in_the_statement() -> None:
    found = single_declaration("theorem t (a : Prop) (h : a) : let b := a; b := by sorry")
    assert verify(found.statement, "h").proved


@given(st.text("ab \n\"'«»-/\\:=()", max_size=60))
def test_blanking_keeps_every_place(text: str) -> None:
    try:
        code = lean_code(text)
    except StatementError:
        return
    assert len(code) == len(text)
    assert all(
        c in (" ", t) and (c == "\n") == (t == "\n") for c, t in zip(code, text, strict=True)
    )
