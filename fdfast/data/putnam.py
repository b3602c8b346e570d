"""PutnamBench's .lean files: one problem a file, its answer withheld in an `abbrev`.

A problem that asks for a value has `abbrev NAME_solution : T := sorry`, and the value in the line
comment below. A theorem about that `sorry` cannot be proved, so the published value takes its
place: the theorem says that the answer is right, as in PutnamBench's own evaluation with answers.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from fdfast.data.records import Theorem, read_placed, read_text, text_field
from fdfast.data.statements import Declaration, StatementError, declarations, lean_code
from fdfast.errors import InputError

_SOLUTION = re.compile(
    r"^(?:noncomputable[ \t]+)?(?:abbrev|def)[ \t]+(?P<name>[\w.']*_solution)\b"
    r"[^\n]*(?:\n[ \t]+[^\n]*)*?:=\s*(?P<hole>sorry)(?=[ \t]*$)",
    re.MULTILINE,
)
_ANSWER = re.compile(r"[ \t]*\n(?P<lines>(?:--[^\n]*(?:\n|\Z))+)")


def fill_solution(text: str) -> str:
    """Put the published answers in the place of `sorry` in the definitions `..._solution`.

    Raises:
        StatementError: no answer follows in a line comment.
    """
    code, parts, position = lean_code(text), [], 0
    for match in _SOLUTION.finditer(code):
        answer = _ANSWER.match(text, match.end("hole"))
        words = "\n".join(
            line.removeprefix("--").removeprefix(" ")
            for line in (answer["lines"] if answer else "").splitlines()
        )
        if answer is None or not words.strip():
            raise StatementError(
                f"has `{match['name']}` as `sorry` without the answer in a line comment below"
                " (`-- 42`); write the answer there"
            )
        parts += [text[position : match.start("hole")], words.replace("\n", "\n  "), "\n"]
        position = answer.end()
    return "".join(parts) + text[position:]


def read_lean_file(path: Path, words: dict[str, str] | None = None) -> Iterator[Theorem]:
    """The theorems of a .lean file, each with what stands above it as its header.

    Args:
        path: the file.
        words: theorem -> what it says, for those without a documentation comment.

    Raises:
        InputError: the file cannot be read, or a theorem in it is not of the form wanted.
    """
    text = read_text(path)
    try:
        found = declarations(fill_solution(text))
    except StatementError as error:
        raise InputError(f"{path}: {error}") from error
    for declared in found:
        yield _theorem(declared, words or {})


def _theorem(declared: Declaration, words: dict[str, str]) -> Theorem:
    said = declared.documentation or words.get(declared.name, "")
    if said and not said.startswith("/-"):
        said = f"/-- {said.replace('-/', '- /')} -/"
    return Theorem(
        name=declared.name,
        split="",
        formal_statement=declared.statement,
        header=declared.above,
        informal_prefix=f"{said}\n" if said else "",
        proof=declared.proof,
    )


def read_informal(folder: Path) -> dict[str, str]:
    """PutnamBench's informal/putnam.json near a folder of .lean files: problem -> statement."""
    for root in (folder, folder.parent, folder.parent.parent):
        path = root / "informal" / "putnam.json"
        if path.is_file():
            return {
                text_field(record, "problem_name", place=place): text_field(
                    record, "informal_statement", place=place
                )
                for place, record in read_placed(path)
            }
    return {}


def lean_files(folder: Path) -> list[Path]:
    """The .lean files of a PutnamBench checkout, or of a folder, in order; [] if there are none."""
    for below in ("lean4/src", "src", "."):
        if files := sorted((folder / below).glob("*.lean")):
            return [file for file in files if file.name != "lakefile.lean"]
    return []
