"""The theorem set over the base library: its script makes it, and Lean accepts all of it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fdfast.data import base_theorems, base_theorems_path, propositions
from fdfast.data.jsonl import read_records, read_theorems
from fdfast.errors import InputError
from fdfast.lean import verify_many


def test_every_proof_of_the_set_is_accepted_by_lean() -> None:
    theorems = read_theorems(base_theorems_path())
    items = [(theorem.formal_statement, theorem.proof, theorem.header) for theorem in theorems]
    verdicts = verify_many(items, workers=2, timeout_s=60)
    wrong = [
        f"{theorem.name}: {verdict}"
        for theorem, verdict in zip(theorems, verdicts, strict=True)
        if not verdict.proved
    ]
    assert not wrong
    assert len(theorems) >= 240


def test_the_script_makes_the_packaged_bytes_again(tmp_path: Path) -> None:
    out = tmp_path / "set.jsonl"
    command = [sys.executable, "-m", "fdfast.data.base_theorems", "--out", str(out), "--seed", "0"]
    subprocess.run(command, check=True, timeout=100)
    assert out.read_bytes() == base_theorems_path().read_bytes()


def test_another_seed_makes_another_set_of_the_same_families() -> None:
    first, other = base_theorems.generate(0), base_theorems.generate(1)
    assert first != other
    assert [record["name"] for record in first] == [record["name"] for record in other]


def test_about_a_fifth_is_for_testing_in_every_family() -> None:
    counts = Counter(
        (theorem.name.rsplit("_", 1)[0], theorem.split)
        for theorem in read_theorems(base_theorems_path())
    )
    families = {family for family, _ in counts}
    assert len(families) >= 10
    for family in families:
        train, test = counts[family, "train"], counts[family, "test"]
        assert 0.1 <= test / (train + test) <= 0.25, family


def test_no_two_statements_are_equal_up_to_renaming() -> None:
    shapes = Counter(
        base_theorems.shape(
            theorem.formal_statement.removesuffix(" :=").removeprefix(f"theorem {theorem.name} ")
        )
        for theorem in read_theorems(base_theorems_path())
    )
    assert [shape for shape, count in shapes.items() if count > 1] == []


def test_shapes_see_through_the_names_and_the_order_of_variables() -> None:
    shape = base_theorems.shape
    assert shape("(n m : Nat) : Eq n (Nat.add m n)") == shape("(n m : Nat) : Eq m (Nat.add n m)")
    assert shape("(a b : Prop) (h : a) : a") == shape("(b c : Prop) (k : c) : c")
    assert shape("(a b : Prop) (h : a) : a") != shape("(a b : Prop) (h : b) : a")


def test_every_statement_has_words_and_a_proof_without_a_hole() -> None:
    for theorem in read_theorems(base_theorems_path()):
        assert theorem.informal_prefix.startswith("/-- ")
        assert theorem.informal_prefix.endswith(". -/\n")
        assert theorem.formal_statement.startswith(f"theorem {theorem.name} ")
        assert theorem.proof
        assert "sorry" not in theorem.proof


def test_the_search_finds_no_proof_of_what_is_not_so() -> None:
    a, b = ("atom", "a"), ("atom", "b")
    assert propositions.prove({}, ("imp", a, b)) is None
    assert propositions.prove({}, ("or", a, ("not", a))) is None  # true, but not without axioms
    assert propositions.prove({("and", a, b): "h"}, b) == "h.right"


def test_a_split_is_chosen_by_name() -> None:
    test = read_theorems(base_theorems_path(), split="test")
    assert {theorem.split for theorem in test} == {"test"}
    with pytest.raises(InputError, match=r"has no split 'valid'; it has 'test', 'train'$"):
        read_theorems(base_theorems_path(), split="valid")


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def test_fields_of_minif2f_are_read_and_absent_ones_are_empty(tmp_path: Path) -> None:
    record = {"name": "t", "formal_statement": "theorem t : True :=", "goal": "x", "header": None}
    (theorem,) = read_theorems(write(tmp_path / "a.jsonl", "\n", record))
    assert (theorem.header, theorem.split, theorem.informal_prefix, theorem.proof) == ("",) * 4
    assert [number for number, _ in read_records(tmp_path / "a.jsonl")] == [2]


GOOD = {"name": "t", "formal_statement": "theorem t : True :="}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "a.jsonl: holds no theorem"),
        (["\n\n"], "a.jsonl: holds no theorem"),
        ([GOOD, "{\n"], "a.jsonl:2: is not JSON "),
        (["[" * 100_000], "a.jsonl:1: is nested too deep"),
        ([[1]], "a.jsonl:1: a JSON object is wanted; got list"),
        ([{"name": "t"}], "a.jsonl:1: field 'formal_statement' is missing"),
        ([{"name": 3}], "a.jsonl:1: field 'name' must be text; got int"),
        ([GOOD | {"name": " "}], "a.jsonl:1: fields 'name' and 'formal_statement' must not be"),
        ([GOOD | {"proof": []}], "a.jsonl:1: field 'proof' must be text; got list"),
        ([GOOD, GOOD], "a.jsonl:2: field 'name': 't' is taken by .*a.jsonl:1"),
    ],
)
def test_a_bad_file_is_named_with_its_line(
    tmp_path: Path, records: list[object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_theorems(write(tmp_path / "a.jsonl", *records))


def test_a_missing_file_and_foreign_bytes_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.jsonl: cannot be read \(No such file"):
        read_theorems(tmp_path / "absent.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"b.jsonl: is not UTF-8 \(byte 0\)"):
        read_theorems(tmp_path / "b.jsonl")
