"""Published theorem sets, in small samples of our own with the published fields."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdfast.data.formats import FORMATS
from fdfast.data.jsonl import Theorem, read_theorems
from fdfast.data.leandojo import from_lean_dojo
from fdfast.data.problems import read_problems
from fdfast.errors import InputError, MachineError
from fdfast.lean import verify
from fdfast.lean.statement import parse_statement

SWAP = "theorem swap (a b : Prop) (h : And a b) : And b a :="
MATHLIB = "import Mathlib\n\nopen Nat\n"


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_list(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1))
    return path


def test_minif2f_and_proofnet_of_deepseek_prover(tmp_path: Path) -> None:
    record = {
        "name": "swap",
        "split": "valid",
        "informal_prefix": "/-- And commutes. -/\n",
        "formal_statement": SWAP,
        "goal": "a b : Prop\n⊢ b ∧ a",
        "header": MATHLIB,
    }
    assert read_theorems(write(tmp_path / "minif2f.jsonl", record)) == [
        Theorem("swap", "valid", SWAP, MATHLIB, "/-- And commutes. -/\n", "")
    ]


def test_minif2f_lean4_has_its_own_words_and_proofs(tmp_path: Path) -> None:
    record = {
        "id": "swap_of_1",
        "split": "test",
        "formal_statement": f"{SWAP} sorry",
        "header": "import Mathlib.Data.Real.Basic\nopen Real",
        "informal_stmt": "And commutes; ends in -/ oddly.",
        "informal_proof": "Turn it.",
        "name": "swap_p1",
        "formal_proof": "⟨h.right, h.left⟩",
    }
    other = record | {"name": None, "formal_proof": None}
    first, second = read_theorems(write(tmp_path / "minif2f_lean4.jsonl", record, other))
    assert (first.name, second.name) == ("swap_p1", "swap_of_1")
    assert first.formal_statement == second.formal_statement == SWAP
    assert (first.proof, second.proof) == ("⟨h.right, h.left⟩", "")
    assert first.header == "import Mathlib.Data.Real.Basic\nopen Real\n"
    assert first.informal_prefix == "/-- And commutes; ends in - / oddly. -/\n"


def test_a_statement_that_brings_its_header_and_its_words(tmp_path: Path) -> None:
    text = f"{MATHLIB}\n/-- And commutes. -/\n@[simp]\n{SWAP} by\n  sorry\n"
    record = {"name": "swap", "informal_prefix": "", "formal_statement": text}
    (theorem,) = read_theorems(write(tmp_path / "minif2f_test.jsonl", record))
    assert theorem == Theorem("swap", "", SWAP, MATHLIB, "/-- And commutes. -/\n", "")


def test_proofnet_of_paug(tmp_path: Path) -> None:
    record = {
        "id": "Book|exercise_1",
        "nl_statement": "And commutes.",
        "nl_proof": "Turn it.",
        "lean4_src_header": MATHLIB,
        "lean4_formalization": f"{SWAP} sorry",
    }
    (theorem,) = read_theorems(write(tmp_path / "proofnet.jsonl", record))
    assert theorem == Theorem("Book|exercise_1", "", SWAP, MATHLIB, "/-- And commutes. -/\n", "")


def test_two_theorems_of_one_name_are_numbered(tmp_path: Path) -> None:
    records = [
        {"name": "e", "formal_statement": f"theorem e (a b : Prop) : {goal} :="}
        for goal in ("a", "b", "And a b")
    ]
    names = [theorem.name for theorem in read_theorems(write(tmp_path / "p.jsonl", *records))]
    assert names == ["e", "e#2", "e#3"]


PUTNAM = """import Mathlib
open Nat

abbrev putnam_2000_a1_solution : Nat → Nat := sorry
-- fun n =>
--   n + 1
/--
For which function is f '' s the "image"? -- this is no answer
-/
theorem putnam_2000_a1
  (s : Set Nat)
  (h : f '' s = s) -- := sorry
  : ∀ n, putnam_2000_a1_solution n = n + 1 :=
sorry
"""


def test_putnambench_with_its_published_answer(tmp_path: Path) -> None:
    folder = tmp_path / "lean4" / "src"
    folder.mkdir(parents=True)
    (folder / "putnam_2000_a1.lean").write_text(PUTNAM)
    (folder / "putnam_2000_b2.lean").write_text("theorem putnam_2000_b2 : True :=\n  sorry\n")
    words = {"problem_name": "putnam_2000_b2", "informal_statement": "Truth.", "tags": []}
    write_list(tmp_path / "informal" / "putnam.json", words)
    for root in (tmp_path, folder):
        first, second = read_theorems(root)
        assert first.name == "putnam_2000_a1"
        assert first.header == (
            "import Mathlib\nopen Nat\n\n"
            "abbrev putnam_2000_a1_solution : Nat → Nat := fun n =>\n    n + 1\n"
        )
        assert first.formal_statement.endswith(": ∀ n, putnam_2000_a1_solution n = n + 1 :=")
        assert '"image"?' in first.informal_prefix
        assert (second.header, second.informal_prefix) == ("", "/-- Truth. -/\n")
    assert read_theorems(folder / "putnam_2000_a1.lean") == [first]


def test_putnambench_as_json(tmp_path: Path) -> None:
    statement = PUTNAM.partition("open Nat\n")[2]
    record = {
        "name": "putnam_2000_a1",
        "lean4_statement": statement,
        "informal_statement": "Which function?",
        "informal_solution": "The successor.",
        "tags": ["algebra"],
    }
    (theorem,) = read_theorems(write_list(tmp_path / "putnam.json", record))
    assert theorem.header.startswith("import Mathlib\n")
    assert ":= fun n =>\n    n + 1\n" in theorem.header
    assert theorem.informal_prefix == "/-- Which function? -/\n"


def test_putnambench_without_the_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "putnam_2000_a1.lean"
    path.write_text(PUTNAM.replace("-- fun n =>\n--   n + 1\n", ""))
    with pytest.raises(
        InputError, match=r"a1\.lean: has `putnam_2000_a1_solution` as `sorry` without the answer"
    ):
        read_theorems(path)


WORKBOOK = {
    "natural_language_statement": "Show that $x = x$",
    "answer": "",
    "tags": ["equality"],
    "formal_statement": "theorem lean_workbook_7 (x : Nat) : x = x  :=  by sorry",
    "split": "lean_workbook",
    "proof": ["simp\ndone", "rfl"],
}


def test_lean_workbook_as_a_list(tmp_path: Path) -> None:
    (theorem,) = read_theorems(write_list(tmp_path / "lean_workbook.json", WORKBOOK))
    assert theorem == Theorem(
        "lean_workbook_7",
        "lean_workbook",
        "theorem lean_workbook_7 (x : Nat) : x = x  :=",
        "import Mathlib\n",
        "/-- Show that $x = x$ -/\n",
        "by\n  simp\n  done",
    )
    (other,) = read_theorems(tmp_path / "lean_workbook.json", header="import Mathlib\nopen Nat\n")
    assert other.header == "import Mathlib\nopen Nat\n"


@pytest.mark.parametrize(
    ("proof", "read"),
    [
        ([], ""),
        (None, ""),
        ("by rfl", "by rfl"),
        (":= by rfl", "by rfl"),
        (["", "rfl"], "by\n  rfl"),
        (["theorem lean_workbook_7 (x : Nat) : x = x := by\n  rfl"], "by\n  rfl"),
    ],
)
def test_lean_workbook_proofs_begin_with_by(tmp_path: Path, proof: object, read: str) -> None:
    path = write_list(tmp_path / "w.json", WORKBOOK | {"proof": proof})
    assert read_theorems(path)[0].proof == read


def steps(*states: str, status: str = "proved") -> list[dict[str, str]]:
    return [
        {
            "id": "lean_workbook_plus_3",
            "status": status,
            "tactic": f"step_{number}",
            "state_before": before,
            "state_after": after,
            "natural_language_statement": "Show it.",
            "formal_statement": "theorem lean_workbook_plus_3 : 1 = 1  :=  by sorry",
        }
        for number, (before, after) in enumerate(itertools.pairwise(states))
    ]


def test_lean_workbook_by_tactics_is_one_theorem_with_its_proof(tmp_path: Path) -> None:
    rows = steps("⊢ 1 = 1", "⊢ 2 = 2", "no goals")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (theorem,) = read_theorems(tmp_path / "train.parquet")
    assert (theorem.name, theorem.proof) == ("lean_workbook_plus_3", "by\n  step_0\n  step_1")


@pytest.mark.parametrize(
    "rows",
    [
        steps("⊢ 1 = 1", "⊢ 2 = 2"),
        steps("⊢ 1 = 1", "no goals", status="disproved"),
        [*steps("⊢ 1 = 1", "⊢ 2 = 2"), *steps("⊢ 3 = 3", "no goals")],
    ],
)
def test_steps_that_make_no_proof_of_the_statement_are_none(
    tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    (theorem,) = read_theorems(write_list(tmp_path / "w.json", *rows))
    assert theorem.proof == ""


def test_a_hub_set_is_read_with_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder / "train.jsonl", {"name": "a", "formal_statement": "theorem a : True := by sorry"})
    write(folder / "test.jsonl", {"name": "b", "formal_statement": "theorem b : True := by sorry"})
    theorems = read_theorems(Path(f"hf:{folder}"))
    assert {(theorem.name, theorem.split) for theorem in theorems} == {
        ("a", "train"),
        ("b", "test"),
    }
    with pytest.raises(
        InputError, match=r"^hf:/nowhere/at/all: cannot be loaded \(.*check the name"
    ):
        read_theorems(Path("hf:/nowhere/at/all"))


def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("datasets", "pyarrow", "lean_dojo"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MachineError, match=r"pyarrow .*pip install 'fdfast\[data\]'"):
        read_theorems(tmp_path / "a.parquet")
    with pytest.raises(MachineError, match=r"package datasets .*pip install 'fdfast\[data\]'"):
        read_theorems(Path("hf:someone/something"))
    with pytest.raises(MachineError, match=r"lean-dojo cannot be imported .*pip install lean-dojo"):
        from_lean_dojo(SimpleNamespace())


GOOD = {"name": "t", "formal_statement": "theorem t : True := by sorry"}


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("a.json", {"formal_statement": 3, "name": "t"}, r"a\.json\[1\]: field 'formal_statement'"),
        (
            "a.json",
            {"name": "t", "formal_statement": "def t := 1"},
            r"a\.json\[1\]: field 'formal_statement': has no `theorem NAME`",
        ),
        ("a.json", 7, r"a\.json\[1\]: a JSON object is wanted; got int"),
        ("a.json", GOOD | {"header": 1}, r"\[1\]: field 'header' must be text; got int"),
        ("a.json", GOOD, r"\[1\]: field 'name': 't' is taken by .*a\.json\[0\], the same theorem"),
    ],
)
def test_a_malformed_record_is_named_by_file_index_and_field(
    tmp_path: Path, name: str, record: object, message: str
) -> None:
    path = write_list(tmp_path / name, GOOD, record)
    with pytest.raises(InputError, match=message):
        read_theorems(path)
    skipped: list[str] = []
    assert [theorem.name for theorem in read_theorems(path, skipped=skipped)] == ["t"]
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"lean4_formalization": "theorem"}, r"\[0\]: field 'lean4_formalization': "),
        (
            {"formal_statement": "x", "src_header": ""},
            r"field 'src_header' is of ProofNet in Lean 3",
        ),
        ({"question": "x", "answer": "y"}, r"the fields 'answer', 'question' are of no set that"),
        (
            WORKBOOK | {"proof": {}},
            r"\[0\]: field 'proof' must be text or a list of texts; got dict",
        ),
    ],
)
def test_a_record_of_a_published_set_is_named_likewise(
    tmp_path: Path, record: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_theorems(write_list(tmp_path / "train.json", record))


def test_what_cannot_be_read_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write_list(tmp_path / "w.json", WORKBOOK, WORKBOOK | {"formal_statement": "theorem x"})
    skipped: list[str] = []
    assert len(read_theorems(path, skipped=skipped)) == 1
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{path}[1]: field 'formal_statement': theorem x has no `:=`")
    with pytest.raises(InputError, match="must be one of minif2f, proofnet"):
        read_theorems(path, format="coq")
    with pytest.raises(InputError, match=r"field 'full_name' is missing"):
        read_theorems(path, format="leandojo")
    assert set(FORMATS) == {"minif2f", "proofnet", "putnambench", "lean_workbook", "leandojo"}


def test_a_folder_without_a_set_and_an_empty_list_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder without \.lean files and without train"):
        read_theorems(tmp_path)
    with pytest.raises(InputError, match=r"e\.json: holds no theorem$"):
        read_theorems(write_list(tmp_path / "e.json"))


def test_the_trainer_and_the_checker_take_what_is_read(tmp_path: Path) -> None:
    record = {"name": "swap", "formal_statement": f"{SWAP} by sorry", "header": ""}
    path = write_list(tmp_path / "set.json", record)
    (problem,) = read_problems(path, task="lean")
    assert problem.prompt == SWAP
    theorem = problem.theorem
    assert theorem is not None
    assert verify(theorem.formal_statement, "⟨h.right, h.left⟩", header=theorem.header).proved


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=5))
def test_our_own_fields_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str, str]]
) -> None:
    written = [
        Theorem(
            f"t{number}", split, f"theorem t{number} : True :=", header, f"/-- {number} -/\n", p
        )
        for number, (split, header, p) in enumerate(texts)
        if not header.strip() or header.endswith("\n")
    ]
    path = tmp_path_factory.mktemp("set") / "a.jsonl"
    path.write_text(
        "".join(json.dumps(vars(theorem), ensure_ascii=False) + "\n" for theorem in written),
        encoding="utf-8",
        newline="",
    )
    if written:
        read = read_theorems(path)
        assert [(t.name, t.split, t.formal_statement) for t in read] == [
            (t.name, t.split, t.formal_statement) for t in written
        ]
        for ours, theirs in zip(read, written, strict=True):
            assert ours.proof == theirs.proof or not theirs.proof.strip()
            assert ours.header == theirs.header or not theirs.header.strip()
            parse_statement(ours.formal_statement)
