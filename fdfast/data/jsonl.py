"""Theorems as JSON Lines, in the fields of miniF2F."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fdfast.errors import InputError


@dataclass(frozen=True)
class Theorem:
    """One theorem.

    Attributes:
        name: its name, unique in its file.
        split: `train`, `valid`, `test` or whatever the file says; "" if it says nothing.
        formal_statement: Lean from `theorem NAME` to `:=`.
        header: Lean above the statement; "" is the default of the Lean that checks it.
        informal_prefix: what is to be shown, as a Lean comment.
        proof: a known proof, the text after `:=`; "" if there is none.
    """

    name: str
    split: str
    formal_statement: str
    header: str
    informal_prefix: str
    proof: str


def read_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield each object of a JSON Lines file with its line number; blank lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, or a line that is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start})") from error
    # Not splitlines(): it also splits at characters that JSON strings may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place}: is not JSON ({error})") from error
        except RecursionError as error:
            raise InputError(f"{place}: is nested too deep to be a theorem") from error
        if not isinstance(record, dict):
            raise InputError(f"{place}: a JSON object is wanted; got {type(record).__name__}")
        yield number, record


def text_field(
    record: dict[str, object], field: str, *, place: str, default: str | None = None
) -> str:
    """Return a field's text; null counts as absent.

    Raises:
        InputError: the field is absent and has no default, or is no text.
    """
    value = record.get(field)
    if value is None:
        if default is None:
            raise InputError(f"{place}: field '{field}' is missing")
        return default
    if not isinstance(value, str):
        raise InputError(f"{place}: field '{field}' must be text; got {type(value).__name__}")
    return value


def read_theorems(path: Path, split: str | None = None) -> list[Theorem]:
    """Read a theorem set; with `split`, the theorems of that split only.

    `name` and `formal_statement` are needed; `split`, `header`, `informal_prefix` and `proof` may
    be absent.

    Raises:
        InputError: `FILE:LINE: ...` for the first line that is wrong; a file without theorems; a
            split that is not there.
    """
    theorems: list[Theorem] = []
    seen: dict[str, str] = {}
    for number, record in read_records(path):
        place = f"{path}:{number}"
        name = text_field(record, "name", place=place)
        statement = text_field(record, "formal_statement", place=place)
        if not name.strip() or not statement.strip():
            raise InputError(f"{place}: fields 'name' and 'formal_statement' must not be empty")
        if name in seen:
            raise InputError(f"{place}: field 'name': {name!r} is taken by {seen[name]}")
        seen[name] = place
        rest = (
            text_field(record, field, place=place, default="")
            for field in ("header", "informal_prefix", "proof")
        )
        theorems.append(
            Theorem(name, text_field(record, "split", place=place, default=""), statement, *rest)
        )
    if not theorems:
        raise InputError(f"{path}: holds no theorem")
    if split is None:
        return theorems
    chosen = [theorem for theorem in theorems if theorem.split == split]
    if not chosen:
        there = ", ".join(sorted({repr(theorem.split) for theorem in theorems}))
        raise InputError(f"{path}: has no split {split!r}; it has {there}")
    return chosen
