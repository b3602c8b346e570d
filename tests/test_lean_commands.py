"""`fdfast lean check` and `fdfast lean doctor`, and how a .lean file is taken apart."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fdfast.errors import InputError
from fdfast.lean import Toolchain, commands

FILE = """prelude
import FdBase
/-! A file; its text says theorem fake : False := sorry, which is no theorem. -/
namespace Mine
/-- Twice a number. -/
noncomputable def twice (n : Nat) : Nat := Nat.add n n
/-- Documented. -/
@[simp] theorem one (n : Nat) : Eq (twice n) (Nat.add n n) := rfl
theorem bad (n : Nat) : Eq (twice n) n := rfl
theorem on_bad (n : Nat) : Eq (twice n) n :=
  bad n
theorem on_one (n : Nat) : Eq (twice n) (Nat.add n n) :=
  one n
theorem hole : True := sorry
/- theorem commented : False := sorry -/
axiom cheat : False
theorem by_axiom : False := cheat
variable {a : Prop}
theorem with_variable (h : a) : a := h
theorem by_cases : Nat → True
  | _ => True.intro
end Mine
"""


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["lean", *map(str, arguments)])
    return int(parsed.run(parsed))


def test_every_theorem_of_a_file_gets_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.lean").write_text(FILE)
    assert run("check", tmp_path / "a.lean") == 1
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == [
        *("one", "bad", "on_bad", "on_one", "hole", "by_axiom", "with_variable", "by_cases"),
    ]
    assert lines["one"] == lines["on_one"] == lines["with_variable"] == "proved"
    assert lines["bad"].startswith("failed: 0:0: Not a definitional equality")
    assert lines["on_bad"] == "failed: 2:2: Unknown identifier `bad`"
    assert lines["hole"] == "rejected: sorry"
    assert lines["by_axiom"] == "rejected: the proof uses the axiom Mine.cheat"
    assert lines["by_cases"].startswith("rejected: the theorem has no `:=`")


def test_a_file_whose_theorems_are_all_proved_ends_with_status_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.lean").write_text("theorem t (a : Prop) (h : a) : a := h\n")
    assert run("check", tmp_path / "a.lean", tmp_path / "a.lean") == 0
    assert capsys.readouterr().out == "t: proved\nt: proved\n"


HIDDEN = """def one : Nat := 1
namespace A
  theorem indented : True := True.intro
  @[simp] theorem with_attribute : True := nosuch
\ttheorem tabbed : True := sorry
end A
open Nat in theorem opened : False := sorry
set_option pp.all true in theorem with_option : False := sorry
mutual theorem in_mutual : False := sorry
end
mutual
theorem in_block : False := other
  theorem other : False := in_block
end
section theorem in_section : False := sorry
end
def number : Nat := 1theorem glued : False := sorry
theorem «with a space» : True := True.intro
theorem /- a comment -/ commented : True := True.intro
theorem with_universe.{u} (a : Sort u) : True := True.intro
theorem : True := True.intro
def text : String := "theorem in a string : True := sorry"
/-- A
  theorem in a comment below a string. -/
def two : Nat := 2
theorem last : Eq two 2 := rfl
"""


def test_no_theorem_of_a_file_is_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.lean").write_text(HIDDEN)
    assert run("check", tmp_path / "a.lean") == 1
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    proved = ["indented", "commented", "with_universe", "last"]
    assert [name for name, verdict in lines.items() if verdict == "proved"] == proved
    assert lines.pop("with_attribute") == "failed: 1:1: Unknown identifier `nosuch`"
    assert lines.pop("tabbed") == lines.pop("in_section") == "rejected: sorry"
    assert lines.pop("«with a space»").startswith("rejected: formal_statement must begin with")
    hidden = ["opened", "with_option", "in_mutual", "in_block", "glued"]
    for name in hidden:
        assert lines.pop(name).startswith("rejected: the theorem has no `:=` or does not begin its")
    assert lines.pop("?").startswith("rejected: formal_statement must begin with `theorem NAME`")
    assert list(lines) == proved


def test_jsonl_files_are_checked_and_json_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"name": "yes", "formal_statement": "theorem yes : True :=", "proof": "True.intro"},
        {"name": "no", "formal_statement": "theorem no : True :=", "proof": "nosuch"},
        {"name": "none", "formal_statement": "theorem none : True :="},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run("check", path, "--json", "--timeout", "20") == 1
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(record["name"], record["kind"]) for record in printed] == [
        ("yes", "proved"),
        ("no", "failed"),
        ("none", "rejected"),
    ]
    assert printed[1]["messages"][0]["text"] == "Unknown identifier `nosuch`"
    assert printed[1]["file"] == str(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.lean", None, r"absent.lean: cannot be read \(No such file"),
        ("absent.jsonl", None, r"absent.jsonl: cannot be read \(No such file"),
        ("a.lean", b"", "a.lean: is empty"),
        ("a.lean", b" \n", "a.lean: is empty"),
        ("a.lean", b"def x := 1\n", "a.lean: claims no theorem"),
        ("a.lean", b"\xff", r"a.lean: is not UTF-8 \(byte 0\)"),
        ("a.lean", b"theorem t : True := /- open", "a.lean: unclosed comment, opened in line 1"),
        ("a.lean", b"theorem t\0", "a.lean: the text has a NUL byte"),
        ("a.jsonl", b"", "a.jsonl: holds no theorem"),
        ("a.jsonl", b"{}\n{", "a.jsonl:1: field 'name' is missing"),
        ("a.txt", b"x", "a.txt: a file to check ends in .lean, .jsonl, .json, .parquet"),
    ],
)
def test_a_file_that_cannot_be_checked_is_an_input_error(
    tmp_path: Path, name: str, text: bytes | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=message):
        run("check", tmp_path / name)


def test_a_timeout_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--timeout must be more than 0 seconds; got 0"):
        run("check", tmp_path / "a.lean", "--timeout", "0")


def test_the_doctor_names_lean_and_proves_something(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert "4.35.0 (embedded)" in out
    assert "chosen       the embedded Lean: no project named by FDFAST_LEAN_PROJECT\n" in out
    assert "level 2      the embedded kernel's own replay\n" in out
    assert out.rstrip().endswith("proved")


@pytest.mark.parametrize("kind", ["lean", "repl"])
def test_the_doctor_shows_the_project_that_was_chosen(
    leans: dict[str, Toolchain],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    monkeypatch.setattr(commands, "find_lean", lambda: leans[kind])
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert f"({kind}), {leans[kind].origin}\n" in out
    assert f"chosen       {leans[kind].reason}\n" in out
    replay = "none: the REPL writes" if kind == "repl" else str(leans[kind].leanchecker)
    assert f"level 2      {replay}" in out
    assert "axioms       Classical.choice, Quot.sound, propext allowed\n" in out
    assert out.rstrip().endswith("proved")


def test_level_2_is_told_in_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.lean").write_text("theorem t (a : Prop) (h : a) : a := h\n")
    for level in ("1", "2"):
        assert run("check", tmp_path / "a.lean", "--json", "--level", level) == 0
        assert json.loads(capsys.readouterr().out)["level"] == int(level)


@pytest.mark.parametrize("command", ["check", "doctor"])
def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path, command: str) -> None:
    text = "".join(f"theorem t{i} (a : Prop) (h : a) : a := h\n" for i in range(20))
    (tmp_path / "a.lean").write_text(text)
    files = [str(tmp_path / "a.lean")] if command == "check" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "fdfast.cli", "lean", command, *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if command == "check":
        assert process.stdout.readline() == "t0: proved\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), said) == (141, "")
