"""LeanDojo's benchmark and its package, in small samples of our own with the published fields."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fdfast.data.jsonl import Theorem, read_theorems
from fdfast.data.leandojo import from_lean_dojo, lean_dojo_theorems
from fdfast.errors import InputError


def write_list(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


SOURCE = """import Mathlib.Order.Basic

namespace Pair
variable {a b : Prop}

/-- They change places. -/
@[simp] protected theorem swap (h : a ∧ b) : b ∧ a :=
  ⟨h.2, h.1⟩

theorem next : True := trivial
"""
TRACED = {
    "url": "https://github.com/someone/pairs",
    "commit": "0" * 40,
    "file_path": "Pairs/Basic.lean",
    "full_name": "Pair.swap",
    "start": [6, 1],
    "end": [8, 13],
    "traced_tactics": [],
}


def test_leandojo_with_the_sources_of_its_repository(tmp_path: Path) -> None:
    (tmp_path / "pairs" / "Pairs").mkdir(parents=True)
    (tmp_path / "pairs" / "Pairs" / "Basic.lean").write_text(SOURCE)
    folder = tmp_path / "leandojo_benchmark_4" / "random"
    for split in ("train", "val", "test"):
        write_list(folder / f"{split}.json", TRACED)
    theorems = read_theorems(folder, sources=tmp_path / "pairs")
    assert [theorem.split for theorem in theorems] == ["train", "val", "test"]
    assert [theorem.name for theorem in theorems] == ["Pair.swap", "Pair.swap#2", "Pair.swap#3"]
    assert theorems[0] == Theorem(
        "Pair.swap",
        "train",
        "theorem swap (h : a ∧ b) : b ∧ a :=",
        "import Mathlib.Order.Basic\n\nnamespace Pair\nvariable {a b : Prop}\n",
        "/-- They change places. -/\n",
        "⟨h.2, h.1⟩",
    )
    assert read_theorems(folder, sources=tmp_path / "pairs", split="val") == [theorems[1]]
    text = TRACED | {"start": "(6, 1)", "end": "(8, 13)"}
    (same,) = read_theorems(write_list(folder / "x.json", text), sources=tmp_path / "pairs")
    assert same.formal_statement == theorems[0].formal_statement


def test_leandojo_with_the_published_corpus(tmp_path: Path) -> None:
    premise = {"full_name": "Pair.swap", "code": "theorem swap (h : a ∧ b) : b ∧ a"}
    imports = [".lake/packages/batteries/Batteries/Data/List.lean", "Mathlib/Order/Basic.lean"]
    corpus = {"path": "Pairs/Basic.lean", "imports": imports, "premises": [premise]}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(corpus))
    path = write_list(tmp_path / "novel_premises" / "test.json", TRACED)
    (theorem,) = read_theorems(path)
    assert theorem.formal_statement == "theorem swap (h : a ∧ b) : b ∧ a\n:="
    assert theorem.header == "import Batteries.Data.List\nimport Mathlib.Order.Basic\n"
    assert (theorem.split, theorem.proof) == ("test", "")
    own = TRACED | {"theorem_statement": "theorem own : True := by"}
    (theorem,) = read_theorems(write_list(tmp_path / "random" / "val.json", own))
    assert (theorem.formal_statement, theorem.split) == ("theorem own : True :=", "val")


def traced_theorem() -> SimpleNamespace:
    """What lean-dojo 4.20's TracedTheorem shows of itself."""
    repo = SimpleNamespace(url=TRACED["url"], commit=TRACED["commit"])
    named = SimpleNamespace(repo=repo, file_path=Path("Pairs/Basic.lean"), full_name="Pair.swap")
    lean_file = SimpleNamespace(code=SOURCE.split("\n")[:-1])
    return SimpleNamespace(
        theorem=named,
        repo=repo,
        start=(6, 1),
        end=(8, 13),
        traced_file=SimpleNamespace(lean_file=lean_file),
    )


def test_theorems_of_the_package_lean_dojo(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = traced_theorem()
    wrong = traced_theorem()
    wrong.repo, wrong.end = traced.repo, (10, 31)
    package = ModuleType("lean_dojo")
    package.trace = lambda repo: SimpleNamespace(  # type: ignore[attr-defined]
        get_traced_theorem=lambda theorem: traced if theorem is traced.theorem else None,
        get_traced_theorems=lambda: [traced, wrong],
    )
    monkeypatch.setitem(sys.modules, "lean_dojo", package)
    theorem = from_lean_dojo(traced.theorem, split="train")
    assert theorem == from_lean_dojo(traced, split="train")
    assert theorem.formal_statement == "theorem swap (h : a ∧ b) : b ∧ a :="
    assert (theorem.name, theorem.proof) == ("Pair.swap", "⟨h.2, h.1⟩")
    skipped: list[str] = []
    assert len(list(lean_dojo_theorems(traced.repo, skipped=skipped))) == 1
    assert "must hold one theorem" in skipped[0]
    absent = SimpleNamespace(**vars(traced.theorem))
    with pytest.raises(InputError, match=r"Pair\.swap is not in Pairs/Basic\.lean"):
        from_lean_dojo(absent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": [6]}, r"field 'start' must be \[line, column\]"),
        ({"end": [99, 1]}, r"\[99, 1\] are no part of the file, which has 11 lines; check out"),
        ({"file_path": "../../etc/passwd"}, r"field 'file_path' must name a file of the repo"),
        ({"file_path": "Pairs/Absent.lean"}, r"Absent\.lean: cannot be read \(No such file"),
        ({"full_name": "Pair.other"}, r"line 6: holds swap, not Pair\.other; check out the rec"),
        ({"start": [8, 1]}, r"line 8: has no `theorem NAME`.*; is this the record's commit\?"),
    ],
)
def test_sources_that_do_not_fit_the_record_are_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    (tmp_path / "Pairs").mkdir()
    (tmp_path / "Pairs" / "Basic.lean").write_text(SOURCE)
    path = write_list(tmp_path / "train.json", TRACED | change)
    with pytest.raises(InputError, match=message):
        read_theorems(path, sources=tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            TRACED,
            r"train\.json\[0\]: field 'theorem_statement' is missing, .*give sources, a checko",
        ),
        (TRACED | {"full_name": None}, r"train\.json\[0\]: field 'full_name' is missing"),
    ],
)
def test_a_record_that_says_no_statement_is_named(
    tmp_path: Path, record: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_theorems(write_list(tmp_path / "train.json", record))
