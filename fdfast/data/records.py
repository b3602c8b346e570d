"""A theorem as the project keeps it, and the records of a file with the place of each."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdfast.errors import InputError, MachineError

Record = Mapping[str, object]


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


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        InputError: no such file, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start})") from error


def read_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield each object of a JSON Lines file with its line number; blank lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, or a line that is no JSON object.
    """
    for number, line in _lines(read_text(path)):
        yield number, _object(_json(line, f"{path}:{number}"), f"{path}:{number}")


def refuse(error: InputError, skipped: list[str] | None) -> None:
    """Note the error in `skipped`, or raise it where there is no such list."""
    if skipped is None:
        raise error
    skipped.append(str(error))


def read_placed(
    path: Path, skipped: list[str] | None = None
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield each record of a file with its place: `FILE:LINE`, or `FILE[INDEX]` from 0.

    A .parquet file, a file that holds one JSON list, and JSON Lines are told apart by themselves.
    `skipped` takes a line for each record that is no JSON object; None raises the first.

    Raises:
        InputError: as `read_records`.
        MachineError: a .parquet file, and pyarrow is missing.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    text = read_text(path)
    is_list = path.suffix == ".json" and text.lstrip()[:1] == "["
    values: Iterator[tuple[int, Any]]
    values = enumerate(_json(text, str(path))) if is_list else _lines(text)
    for number, value in values:
        place = f"{path}[{number}]" if is_list else f"{path}:{number}"
        try:
            record = _object(value if is_list else _json(value, place), place)
        except InputError as error:
            refuse(error, skipped)
        else:
            yield place, record


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(): it also splits at characters that JSON strings may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: is not JSON ({error})") from error
    except RecursionError as error:
        raise InputError(f"{place}: is nested too deep to be a theorem") from error


def _object(value: Any, place: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InputError(f"{place}: a JSON object is wanted; got {type(value).__name__}")
    return value


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MachineError(
            f"{path}: .parquet files need pyarrow ({error}); run: pip install 'fdfast[data]'"
        ) from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except OSError as error:  # FileNotFoundError has a strerror, a broken file only words
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: is no parquet file ({error})") from error
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def text_field(record: Record, field: str, *, place: str, default: str | None = None) -> str:
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
