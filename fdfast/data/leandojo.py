"""LeanDojo: its benchmark's files, and theorems of the package lean-dojo for those who have it.

A record of LeanDojo-Benchmark names a theorem (url, commit, file_path, full_name, start, end,
traced_tactics) and does not say its statement. That is taken, in this order,

* from a checkout of the repository (`sources`): the statement, the proof, and as header all that
  stands above it in its file, which is what a check needs;
* from the record's own `theorem_statement`, in newer files;
* from `corpus.jsonl` beside the splits, as published, with the file's imports as header. Namespaces,
  `open` and `variable` of the file are not in it: enough for a prompt, often not for a check.

The benchmark for Lean 3 has the same fields; Lean 4 cannot check it.
"""  # noqa: E501 - an item of the list

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fdfast.data.records import Record, Theorem, read_records, read_text, text_field
from fdfast.data.statements import Declaration, StatementError, lean_code, single_declaration
from fdfast.errors import InputError, MachineError
from fdfast.lean.leanfile import definition_mark

_PACKAGE = re.compile(r"^(?:\.lake/packages|lake-packages|_target/deps)/[^/]+/(?:src/lean/)?")
_POSITION = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)")


@dataclass
class Library:
    """Where the statements of a benchmark are.

    Attributes:
        sources: a checkout of the traced repository, or None.
        corpus: the benchmark's corpus.jsonl, or None.
    """

    sources: Path | None = None
    corpus: Path | None = None
    _texts: dict[Path, str] = field(default_factory=dict, repr=False)
    _codes: dict[tuple[str, str], tuple[str, str]] | None = field(default=None, repr=False)

    def source(self, path: Path) -> str:
        """A file's text; the last one read is kept, since records come file by file."""
        if path not in self._texts:
            self._texts = {path: read_text(path)}
        return self._texts[path]

    def code(self, file_path: str, full_name: str) -> tuple[str, str]:
        """The code and the imports of a theorem in the corpus; ("", "") if it is not there."""
        if self.corpus is None:
            return "", ""
        if self._codes is None:
            self._codes = _read_corpus(self.corpus)
        return self._codes.get((file_path, full_name), ("", ""))


def find_corpus(path: Path) -> Path | None:
    """corpus.jsonl beside a split's file or one folder above; None if it is not there."""
    folders = (path.parent, path.parent.parent)
    return next((f for folder in folders if (f := folder / "corpus.jsonl").is_file()), None)


def leandojo_theorem(record: Record, place: str, library: Library, *, split: str) -> Theorem:
    """The theorem that a record of the benchmark names.

    Raises:
        InputError: a field is missing or wrong, or its statement is nowhere.
    """
    name = text_field(record, "full_name", place=place)
    file_path = text_field(record, "file_path", place=place)
    if library.sources is not None:
        start, end = (_position(record, side, place) for side in ("start", "end"))
        path = _inside(library.sources, file_path, place)
        return _from_source(name, split, library.source(path), start, end, f"{place}: {path}")
    statement, imports = text_field(record, "theorem_statement", place=place, default=""), ""
    if statement.strip():
        where = f"{place}: field 'theorem_statement'"
    else:
        statement, imports = library.code(file_path, name)
        where = f"{place}: the code of {name} in {library.corpus}"
    if not statement.strip():
        url, commit = (
            text_field(record, key, place=place, default="?") for key in ("url", "commit")
        )
        raise InputError(
            f"{place}: field 'theorem_statement' is missing, and no corpus.jsonl beside the file"
            f" says what {name} is; give sources, a checkout of {url} at {commit}"
        )
    try:
        declared = single_declaration(with_mark(statement))
    except StatementError as error:
        raise InputError(f"{where}: {error}") from error
    return _theorem(name, split, declared, imports + declared.above)


def with_mark(statement: str) -> str:
    """A statement with the `:=` at its end that LeanDojo leaves out.

    Raises:
        StatementError: the text cannot be read.
    """
    statement = statement.rstrip()
    code = lean_code(statement)
    return statement if definition_mark(code, 0, len(code)) >= 0 else f"{statement}\n:="


def _theorem(name: str, split: str, declared: Declaration, header: str) -> Theorem:
    words = f"{declared.documentation}\n" if declared.documentation else ""
    return Theorem(name, split, declared.statement, header, words, declared.proof)


def _from_source(
    name: str, split: str, text: str, start: tuple[int, int], end: tuple[int, int], where: str
) -> Theorem:
    """The theorem between two places (line and column from 1, in characters) of its file."""
    lines = text.split("\n")
    (first, left), (last, right) = start, end
    if not (1 <= first <= last <= len(lines) and (first, left) < (last, right)):
        raise InputError(
            f"{where}: fields 'start' {list(start)} and 'end' {list(end)} are no part of the file,"
            f" which has {len(lines)} lines; check out the record's commit"
        )
    above = "\n".join([*lines[: first - 1], lines[first - 1][: left - 1]])
    part = lines[first - 1 : last]
    part[-1] = part[-1][: right - 1]
    part[0] = part[0][left - 1 :]
    try:
        declared = single_declaration("\n".join(part))
    except StatementError as error:
        raise InputError(f"{where}, line {first}: {error}; is this the record's commit?") from error
    if name.rpartition(".")[2] != declared.name.rpartition(".")[2]:
        raise InputError(
            f"{where}, line {first}: holds {declared.name}, not {name}; check out the record's"
            " commit"
        )
    above = above.rstrip()
    return _theorem(name, split, declared, f"{above}\n{declared.above}" if above else "")


def _position(record: Record, name: str, place: str) -> tuple[int, int]:
    """A field [line, column]; some versions write it as the text "(216, 1)"."""
    value = record.get(name)
    if isinstance(value, str) and (match := _POSITION.search(value)):
        value = [int(match[1]), int(match[2])]
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(type(number) is int and number > 0 for number in value)
    ):
        raise InputError(
            f"{place}: field '{name}' must be [line, column], two whole numbers from 1;"
            f" got {value!r}"
        )
    return value[0], value[1]


def _inside(sources: Path, file_path: str, place: str) -> Path:
    parts = PurePosixPath(file_path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise InputError(
            f"{place}: field 'file_path' must name a file of the repository; got {file_path!r}"
        )
    return sources.joinpath(*parts)


def _read_corpus(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    codes = {}
    for number, record in read_records(path):
        place = f"{path}:{number}"
        file_path = text_field(record, "path", place=place)
        imports = "".join(f"import {_module(name)}\n" for name in _list(record, "imports", place))
        for premise in _list(record, "premises", place):
            if not isinstance(premise, dict):
                raise InputError(f"{place}: field 'premises' must hold objects; got {premise!r}")
            code = text_field(premise, "code", place=place)
            name = text_field(premise, "full_name", place=place)
            codes[file_path, name] = (code, imports)
    return codes


def _list(record: Record, name: str, place: str) -> list[Any]:
    value = record.get(name, [])
    if not isinstance(value, list):
        raise InputError(f"{place}: field '{name}' must be a list; got {type(value).__name__}")
    return value


def _module(file_path: object) -> str:
    """`.lake/packages/batteries/Batteries/Data/List.lean` -> `Batteries.Data.List`."""
    return _PACKAGE.sub("", str(file_path)).removesuffix(".lean").replace("/", ".")


def from_lean_dojo(theorem: Any, *, split: str = "") -> Theorem:
    """A theorem of the package lean-dojo (4.x) as ours.

    Args:
        theorem: a `lean_dojo.Theorem`, whose repository is traced (long the first time, then from
            lean-dojo's cache), or a `TracedTheorem`.
        split: the split to write down.

    Raises:
        InputError: the repository has no such theorem, or it is not of the form wanted.
        MachineError: lean-dojo is not installed.
    """
    traced = theorem
    if not hasattr(theorem, "traced_file"):
        traced = _lean_dojo().trace(theorem.repo).get_traced_theorem(theorem)
        if traced is None:
            raise InputError(
                f"from_lean_dojo: {theorem.full_name} is not in {theorem.file_path} of"
                f" {theorem.repo.url} at {theorem.repo.commit}; name it in full"
            )
    text = "\n".join(traced.traced_file.lean_file.code)
    start, end = tuple(traced.start), tuple(traced.end)
    where = f"from_lean_dojo: {traced.theorem.file_path}"
    return _from_source(traced.theorem.full_name, split, text, start, end, where)


def lean_dojo_theorems(
    repo: Any, *, split: str = "", skipped: list[str] | None = None
) -> Iterator[Theorem]:
    """All theorems of a `lean_dojo.LeanGitRepo`, its own and not those it depends on.

    Args:
        repo: the repository; it is traced as in `from_lean_dojo`.
        split: the split to write down.
        skipped: takes a line for each theorem that cannot be read; None raises it.

    Raises:
        InputError: see `from_lean_dojo`.
        MachineError: lean-dojo is not installed.
    """
    for traced in _lean_dojo().trace(repo).get_traced_theorems():
        if traced.repo != repo:
            continue
        try:
            yield from_lean_dojo(traced, split=split)
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))


def _lean_dojo() -> Any:
    try:
        import lean_dojo
    except ImportError as error:
        raise MachineError(
            f"from_lean_dojo: lean-dojo cannot be imported ({error}); run: pip install lean-dojo"
            " (Python < 3.13, git and elan)"
        ) from error
    return lean_dojo
