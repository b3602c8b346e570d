"""Theorem sets: one function that reads them all, from files, folders and the hub."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from fdfast.data.formats import FORMATS, Options, known_splits, tell_format
from fdfast.data.hub import PREFIX, read_hub
from fdfast.data.leandojo import Library, find_corpus
from fdfast.data.putnam import lean_files, read_informal, read_lean_file
from fdfast.data.records import Record, Theorem, read_placed, read_records, refuse, text_field
from fdfast.errors import InputError

__all__ = ["Theorem", "read_records", "read_theorems", "text_field"]


def read_theorems(
    path: Path,
    split: str | None = None,
    *,
    format: str | None = None,
    header: str | None = None,
    sources: Path | None = None,
    skipped: list[str] | None = None,
) -> list[Theorem]:
    """Read a theorem set; with `split`, the theorems of that split only.

    The set is told by its fields: see the table in `formats`. Statements that end in a hole
    (`:= by sorry`) come out as `theorem NAME BINDERS : TYPE :=`, the form that `lean.verify` takes;
    a proof that is published goes into `proof`. Where two different theorems of a set have one
    name, the later ones are called NAME#2, NAME#3 and so on.

    Args:
        path: a .jsonl, .json or .parquet file; a .lean file, or a folder of them (PutnamBench); a
            folder with LeanDojo's train.json, val.json and test.json; `hf:OWNER/NAME[@REVISION]`.
        split: the split to keep; LeanDojo's is the file's name, the hub's the split's.
        format: a name in `formats.FORMATS`; None tells it from the first record.
        header: for statements without a header; None is the format's own: nothing for miniF2F's
            fields, which is the default of the Lean that checks, and `import Mathlib` elsewhere.
        sources: for LeanDojo, a checkout of the traced repository.
        skipped: takes a line for each record that cannot be read, which is then left out; None
            raises the first.

    Raises:
        InputError: `PLACE: field '...': ...` for the first record that is wrong; a set without
            theorems; a split that is not there.
        MachineError: the package that reads this kind of set is missing.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    read = _read(path, format, header, sources, skipped)
    theorems = list(_under_their_own_names(read, skipped))
    if not theorems:
        kept = f" that can be read; the first: {skipped[0]}" if skipped else ""
        raise InputError(f"{path}: holds no theorem{kept}")
    if split is None:
        return theorems
    chosen = [theorem for theorem in theorems if theorem.split == split]
    if not chosen:
        there = ", ".join(sorted({repr(theorem.split) for theorem in theorems}))
        raise InputError(f"{path}: has no split {split!r}; it has {there}")
    return chosen


def _read(
    path: Path,
    format_name: str | None,
    header: str | None,
    sources: Path | None,
    skipped: list[str] | None,
) -> Iterator[tuple[str, Theorem]]:
    """Each theorem of a set with its place."""
    if str(path).startswith(PREFIX):
        by_split = itertools.groupby(read_hub(str(path)), lambda row: row[1])
        for name, rows in by_split:
            options = Options(header, name, Library(sources))
            placed = ((place, record) for place, _, record in rows)
            yield from _convert(placed, format_name, options, skipped)
    elif files := _lean_files(path):
        words = read_informal(path if path.is_dir() else path.parent)
        for file in files:
            try:
                for theorem in read_lean_file(file, words):
                    yield str(file), theorem
            except InputError as error:
                refuse(error, skipped)
    else:
        for file in _record_files(path):
            library = Library(sources, find_corpus(file))
            name = file.stem if file.name in ("train.json", "val.json", "test.json") else ""
            options = Options(header, name, library)
            yield from _convert(read_placed(file, skipped), format_name, options, skipped)


def _lean_files(path: Path) -> list[Path]:
    if path.is_dir():
        return lean_files(path)
    return [path] if path.suffix == ".lean" else []


def _record_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if files := known_splits(path):
        return files
    raise InputError(
        f"{path}: is a folder without .lean files and without train.json, val.json or test.json;"
        " name a file in it"
    )


def _convert(
    placed: Iterator[tuple[str, Record]],
    format_name: str | None,
    options: Options,
    skipped: list[str] | None,
) -> Iterator[tuple[str, Theorem]]:
    first = next(placed, None)
    if first is None:
        return
    kind = FORMATS[format_name or tell_format(first[1], first[0])]
    for place, record in kind.prepare(itertools.chain([first], placed)):
        try:
            theorem = kind.convert(record, place, options)
        except InputError as error:
            refuse(error, skipped)
        else:
            yield place, theorem


def _under_their_own_names(
    read: Iterator[tuple[str, Theorem]], skipped: list[str] | None
) -> Iterator[Theorem]:
    """Number different theorems of one name; one that is there twice is an error."""
    seen: dict[str, tuple[str, Theorem]] = {}
    counts: dict[str, int] = {}
    for place, theorem in read:
        name = theorem.name
        while name in seen:
            taken, other = seen[name]
            if (theorem.formal_statement, theorem.header, theorem.split) == (
                *(other.formal_statement, other.header, other.split),
            ):
                reason = f"{place}: field 'name': {theorem.name!r} is taken by {taken}"
                refuse(InputError(f"{reason}, the same theorem; remove one"), skipped)
                break
            counts[theorem.name] = counts.get(theorem.name, 1) + 1
            name = f"{theorem.name}#{counts[theorem.name]}"
        else:
            seen[name] = (place, theorem)
            yield Theorem(**{**vars(theorem), "name": name})
