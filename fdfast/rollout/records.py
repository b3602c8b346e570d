"""Trajectories in files: a JSON object a line as they come, and Parquet with real list columns.

A file can be read without the tokenizer: each id's text stands beside it.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from fdfast.data.problems import Problem
from fdfast.errors import InputError
from fdfast.files import atomic_file
from fdfast.interrupts import uninterrupted
from fdfast.lean.verdict import Message, Verdict
from fdfast.rollout.record_fields import FIELDS, FORMAT, FieldError, checked
from fdfast.rollout.record_table import need_pyarrow, read_rows, write_rows
from fdfast.rollout.trajectory import ToolCall, Trajectory

SUFFIXES = (".jsonl", ".parquet")

# Some programs take them for the end of a line; JSON may as well spell them.
_LINE_ENDS = re.compile("[\u0085\u2028\u2029]")
_TORN = "\ufffd"


@dataclass(frozen=True)
class Record:
    """One trajectory with all that is known of it. Log-probabilities are natural.

    Attributes:
        problem: its name.
        statement: what was asked: `Problem.prompt`.
        trajectory: ids, tool calls, prompt ids, verdict.
        tokens: the text of each id; together the readable text of all that follows the prompt,
            special tokens included. A character that several ids write stands at its last one.
        prompt: the text of the prompt's ids.
        feedback: what the teacher was told; None: nothing, or it failed.
        student_logprobs: of each id under the student, at the loss's temperature; 0 where the model
            did not write. None: not computed.
        teacher_logprobs: likewise under the teacher, who has read the feedback.
        model: name of the student.
        seed: of the rollout.
        step: optimizer steps before it; None outside a run.
        evaluation: whether it was not trained on.
    """

    problem: str
    statement: str
    trajectory: Trajectory
    tokens: list[str] = field(default_factory=list)
    prompt: str = ""
    feedback: str | None = None
    student_logprobs: list[float] | None = None
    teacher_logprobs: list[float] | None = None
    model: str = ""
    seed: int = 0
    step: int | None = None
    evaluation: bool = False

    @property
    def text(self) -> str:
        """All that follows the prompt, tools' answers and special tokens included."""
        return "".join(self.tokens)

    @property
    def log_ratios(self) -> list[float] | None:
        """Teacher's less student's log-probability of each id, nats; 0 where the model did not
        write; None where one of the two is not known.
        """
        if self.student_logprobs is None or self.teacher_logprobs is None:
            return None
        pairs = zip(
            self.teacher_logprobs, self.student_logprobs, self.trajectory.wrote, strict=True
        )
        return [teacher - student if wrote else 0.0 for teacher, student, wrote in pairs]


def make_record(
    problem: Problem,
    trajectory: Trajectory,
    tokenizer: Any,
    *,
    feedback: str | None = None,
    student_logprobs: Sequence[float] | None = None,
    teacher_logprobs: Sequence[float] | None = None,
    model: str = "",
    seed: int = 0,
    step: int | None = None,
    evaluation: bool = False,
) -> Record:
    """A trajectory as a record, with the text of its ids; see `Record`."""
    return Record(
        problem=problem.name,
        statement=problem.prompt,
        trajectory=trajectory,
        tokens=token_pieces(tokenizer, trajectory.ids),
        prompt=_decode(tokenizer, trajectory.prompt_ids),
        feedback=feedback,
        student_logprobs=None if student_logprobs is None else list(student_logprobs),
        teacher_logprobs=None if teacher_logprobs is None else list(teacher_logprobs),
        model=model,
        seed=seed,
        step=step,
        evaluation=evaluation,
    )


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each id; joined they are the text of all, as `decode` gives it (where there are
    bytes that make no character, sentencepiece's byte tokens may leave another number of U+FFFD).

    A character that several ids write stands at the last of them; the others have less text, or
    none. Special tokens are text, too.

    Args:
        tokenizer: any of transformers.
        ids: token ids.
    """
    pieces: list[str] = []
    # What ids[begin:settled] wrote is settled; they are decoded again only as context, since some
    # tokenizers drop the space before the first word.
    begin = settled = shown = 0
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[begin:end])
        whole = text if end == len(ids) else text.rstrip(_TORN)
        pieces.append(text[shown : len(whole)])
        shown = max(shown, len(whole))
        if len(whole) == len(text):
            begin, settled = settled, end
            shown = len(_decode(tokenizer, ids[begin:settled]))
        elif end - settled > 16:
            # No characters at all. The last three may begin one; the others are given up, lest
            # a model that writes nothing else be decoded in quadratic time.
            pieces[-1] += _decode(tokenizer, ids[begin : end - 3])[shown:]
            begin = settled = end - 3
            shown = 0
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def to_dict(record: Record) -> dict[str, Any]:
    """The record as one flat object: what a line holds, and a row. Lone surrogates, which no file
    in UTF-8 can hold, become U+FFFD.

    Raises:
        InputError: a number that is not finite, a list that is not as long as the ids, a wrong
            type.
    """
    row: dict[str, Any] = {"format": FORMAT}
    row |= {f.name: getattr(record, f.name) for f in fields(record) if f.name != "trajectory"}
    trajectory = record.trajectory
    row |= {f.name: getattr(trajectory, f.name) for f in fields(trajectory)}
    row["tool_calls"] = [asdict(call) for call in trajectory.tool_calls]
    row["verdict"] = None if trajectory.verdict is None else asdict(trajectory.verdict)
    row["completion"] = row.pop("text")
    return _checked_row(row, f"record of {record.problem!r}")


def from_dict(row: Mapping[str, Any], *, place: str = "record") -> Record:
    """The record that `to_dict` wrote.

    Args:
        row: the object.
        place: what an error begins with.

    Raises:
        InputError: it is of a newer format, has a key that this one has not, or lacks one; a value
            is not what it must be.
    """
    version = row.get("format")
    if version is None:
        raise InputError(f"{place}: has no 'format', so it is no trajectory that fdfast wrote")
    if version != FORMAT:
        raise InputError(
            f"{place}: is of format {version!r}; this fdfast reads format {FORMAT}: take the "
            "fdfast that wrote it"
        )
    values = _checked_row(dict(row), place)
    del values["format"]
    values["text"] = values.pop("completion")
    values["tool_calls"] = [ToolCall(**call) for call in values["tool_calls"]]
    if (verdict := values["verdict"]) is not None:
        messages = tuple(Message(**message) for message in verdict["messages"])
        values["verdict"] = Verdict(**{**verdict, "messages": messages})
    own = {f.name: values.pop(f.name) for f in fields(Record) if f.name in values}
    return Record(**own, trajectory=Trajectory(**values))


def _checked_row(row: dict[str, Any], place: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = checked(row, FIELDS)
    except FieldError as wrong:
        raise InputError(f"{place}: {wrong}") from None
    count = len(values["ids"])
    for name in ("logprobs", "wrote", "tokens", "student_logprobs", "teacher_logprobs"):
        if values[name] is not None and len(values[name]) != count:
            raise InputError(
                f"{place}: field '{name}' must have an element for each of the {count} ids; it has "
                f"{len(values[name])}"
            )
    return values


def _line(record: Record) -> bytes:
    text = json.dumps(to_dict(record), ensure_ascii=False, allow_nan=False)
    text = _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.encode() + b"\n"


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """A line for each record; the file is whole or not there.

    Raises:
        InputError: see `to_dict`.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.writelines(map(_line, records))


def write_parquet(path: Path, records: Iterable[Record]) -> None:
    """A row for each record, with list and struct columns; the file is whole or not there.

    Raises:
        InputError: see `to_dict`.
        MachineError: pyarrow is missing.
    """
    write_rows(path, map(to_dict, records))


class RecordWriter:
    """Appends records to a .jsonl file, each on disk when `write` returns. A context manager.

    A last line that a crash tore is cut away first.

    Args:
        path: the .jsonl file; what it holds stays.
        parquet: written from all of `path` when the writer is left without an error; None: none.

    Raises:
        InputError: `path` does not end in .jsonl, or `parquet` in .parquet.
        MachineError: a Parquet file is asked for, and pyarrow is missing: now, not after hours.
    """

    def __init__(self, path: Path, *, parquet: Path | None = None) -> None:
        for name, suffix in ((path, ".jsonl"), (parquet, ".parquet")):
            if name is not None and name.suffix != suffix:
                raise InputError(f"{name}: the name must end in {suffix}")
        if parquet is not None:
            need_pyarrow(parquet)
        self.path, self.parquet = path, parquet
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        _mend(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is None and self.parquet is not None:
            write_parquet(self.parquet, read_records(self.path))

    def write(self, record: Record) -> None:
        """Add a line; Ctrl-C waits until it is whole.

        Raises:
            InputError: see `to_dict`.
        """
        line = _line(record)
        with uninterrupted():
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the .jsonl file; no Parquet is written."""
        self._file.close()


def _mend(file: BinaryIO) -> None:
    """Let the file end with a whole line: cut a torn one away, end one that lacks its newline."""
    end = file.seek(0, 2)
    tail = b""
    start = end
    while start and b"\n" not in tail:
        step = min(1 << 16, start)
        start = file.seek(start - step)
        tail = file.read(step) + tail
    tail = tail[tail.rfind(b"\n") + 1 :]
    if not tail:
        return
    try:
        json.loads(tail)
    except ValueError:
        file.truncate(end - len(tail))
    else:
        file.write(b"\n")


def read_records(path: Path, notes: list[str] | None = None) -> Iterator[Record]:
    """Yield the records of a .jsonl or .parquet file, one at a time.

    A last line that a crash tore is left out.

    Args:
        path: the file.
        notes: takes a line about what was left out; None: it is a warning.

    Raises:
        InputError: no such file, another ending, or a wrong record: `FILE:LINE: ...` (of Parquet
            `FILE[ROW]: ...`, from 0).
        MachineError: a .parquet file, and pyarrow is missing.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a file of trajectories ends in {' or '.join(SUFFIXES)}")
    rows = read_rows(path) if path.suffix == ".parquet" else _read_lines(path, notes)
    for place, row in rows:
        yield from_dict(row, place=place)


def _read_lines(path: Path, notes: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
                if line.endswith(b"\n"):
                    raise InputError(
                        f"{path}:{number}: is not JSON ({error}); remove the line"
                    ) from error
                note = f"{path}:{number}: the last line is torn, and left out"
                if notes is None:
                    warnings.warn(note, stacklevel=3)
                else:
                    notes.append(note)
                return
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}:{number}: a JSON object is wanted; got {type(row).__name__}"
                )
            yield f"{path}:{number}", row
