"""A Lean file as an answer: its lemmas are judged, the statement is the problem's."""

import pytest

from fdfast.lean import LeanPool, find_lean
from fdfast.lean.submission import read_submission, refuse_helpers

STATEMENT = "theorem swap (p q : Prop) (h : And p q) : And q p :="


@pytest.fixture(scope="module")
def pool():
    with LeanPool(workers=1, toolchain=find_lean(backend="embedded")) as pool:
        yield pool


def judged(pool, text, statement=STATEMENT, header=""):
    submission = read_submission(text, statement, header)
    assert submission is not None
    return pool.check(statement, submission.proof, header, submission.context)


def test_a_file_with_lemmas_and_definitions_proves_its_theorem(pool):
    text = """import FdBase
/-- a lemma of its own -/
theorem right' (p q : Prop) (h : And p q) : q := h.right
def Left (p q : Prop) (h : And p q) : p := h.left
theorem swap (p q : Prop) (h : And p q) : And q p :=
  And.intro (right' p q h) (Left p q h)
"""
    verdict = judged(pool, text)
    assert verdict.proved, verdict


def test_honest_files_of_many_kinds_are_taken(pool):
    """Documentation, equations, `open`, and more theorems below."""
    text = """prelude
import FdBase
open Nat
/-- first -/
theorem right' (p q : Prop) : And p q → q
  | ⟨_, b⟩ => b
/-- second -/
private def left' (p q : Prop) (h : And p q) : p := h.left  -- a note
/-- The theorem
itself. -/
theorem swap (p q : Prop) (h : And p q) : And q p :=
  And.intro (right' p q h) (left' p q h)
/-- another -/
theorem below (p : Prop) (h : p) : p := h
"""
    verdict = judged(pool, text)
    assert verdict.proved, verdict


def test_a_printer_of_the_provers_own_prints_nothing_in_the_audit(pool):
    """The attack that a review found: False, proved by a printer that shows True as False."""
    context = (
        "def d : Nat → Nat | _ => 0 @[delab app.True] def e : Nat := 0\n"
        "theorem other : True := True.intro\nopen Nat namespace X\ndef False : Prop := True"
    )
    verdict = pool.check("theorem won : False :=", "True.intro", "", context)
    assert verdict.kind == "rejected"


def test_the_last_theorem_of_the_name_counts_and_others_below_do_not(pool):
    text = f"{STATEMENT} ⟨h.right, h.left⟩\ntheorem other (p : Prop) : p := sorry\n"
    assert judged(pool, text).proved


def test_the_statement_is_the_problems_not_the_files(pool):
    verdict = judged(pool, "theorem swap (p : Prop) (h : p) : p := h")
    assert verdict.kind == "failed"


def test_a_file_without_the_theorem_is_no_answer():
    assert read_submission("theorem other (p : Prop) (h : p) : p := h", STATEMENT) is None
    assert read_submission("theorem swap : True /- open", STATEMENT) is None
    assert read_submission("I would use `And.intro`.", STATEMENT) is None


@pytest.mark.parametrize(
    "above",
    [
        "axiom cheat (p : Prop) : p",
        "theorem lie (p : Prop) : p := sorry",
        "theorem lie (p : Prop) : p := by sorry",
        'notation "And" => Or',
        'macro "h" : term => `(sorry)',
        "instance : Inhabited Nat := ⟨0⟩",
        "set_option debug.skipKernelTC true",
        "set_option maxRecDepth 5",
        "variable (x : False)",
        "namespace X",
        "@[simp] theorem a (p : Prop) (h : p) : p := h",
        "theorem a (p : Prop) (h : p) : p := h\n#eval 1",
        "unsafe def a : Nat := 0",
        "inductive And' : Prop",
        "def a : Nat := 0\nrun_cmd skip",
        "open Nat in\ntheorem a (p : Prop) (h : p) : p := h",
        "def a : Nat",
        # A whole command within what looks like one, and what would print in the audit's place.
        "def f : Nat → Nat | _ => 0 @[delab app.True] def d : Nat := 0",
        "theorem a : True @[delab app.True] def d : Nat := 0",
        "def a : Nat inductive B : Type | c def d : Nat := 0",
        "open Nat namespace X",
        "open Nat axiom",
        'def s := "\ndef t : Nat := 0 -- " @[simp] theorem a (p : Prop) (h : p) : p := h',
        "def «a» : Nat := 0",
        "def a (x : Nat := by sorry) : Nat := 0",
        "theorem a : True := trivial\nattribute [delab app.True] a",
        "/- never closed",
    ],
)
def test_what_may_not_stand_above_is_refused(above):
    assert refuse_helpers(above)


def test_a_definition_that_would_change_the_statement_is_found_out(pool):
    """`Goal` is false; a file that makes its name mean something else proves nothing."""
    header = "prelude\nimport FdBase\ndef Goal : Prop := False\n"
    statement = "theorem won : Goal :="
    text = "def Mine.Goal : Prop := True\nopen Mine\ntheorem won : Goal := trivial\n"
    assert judged(pool, text, statement, header).kind in ("rejected", "failed")
    again = "def Goal : Prop := True\ntheorem won : Goal := trivial\n"
    assert judged(pool, again, statement, header).kind in ("rejected", "failed")
    bare = "theorem won : Mine.Goal :="
    shadowed = pool.check(bare, "True.intro", header, "def Mine.Goal : Prop := True")
    assert shadowed.kind == "rejected"  # the statement means nothing without the file's own words


def test_what_the_header_has_already_is_not_repeated():
    header = "import FdBase\nopen Nat\n"
    text = f"import FdBase\nopen Nat\n{STATEMENT} ⟨h.right, h.left⟩"
    submission = read_submission(text, STATEMENT, header)
    assert submission == ("⟨h.right, h.left⟩", "")
