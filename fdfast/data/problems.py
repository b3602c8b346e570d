"""The problems a model is trained on: a chat question, or a theorem with its statement."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fdfast.data.jsonl import Theorem, read_records, read_theorems, text_field
from fdfast.errors import InputError
from fdfast.lean.leanfile import definition_mark
from fdfast.lean.screen import blank_comments

TASKS = ("chat", "lean")

_LANGUAGE = re.compile(r"\A[ \t]*lean4?(?=\s|\Z)", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        name: unique in its data set.
        prompt: what the user asks; of a theorem, its formal statement.
        theorem: the theorem, or None for a chat question.
    """

    name: str
    prompt: str
    theorem: Theorem | None = None


def questions_path() -> Path:
    """The packaged chat questions of the demo."""
    return Path(__file__).with_name("questions.jsonl")


def read_problems(
    path: Path, *, task: str, split: str | None = None, names: Sequence[str] = ()
) -> list[Problem]:
    """The problems of a file.

    Args:
        path: for chat a JSONL file, records with `prompt` (and `name`); for lean any set that
            `jsonl.read_theorems` reads.
        task: chat or lean.
        split: keep this split only; None for all.
        names: keep problems whose name fits one of these patterns, easy_* say; () for all.

    Raises:
        InputError: no such file, a malformed record (named by file and line), or none left.
    """
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if task == "lean":
        theorems = read_theorems(path, split=split)
        problems = [Problem(t.name, t.formal_statement, t) for t in theorems]
    else:
        problems = []
        for line, record in read_records(path):
            place = f"{path}:{line}"
            prompt = text_field(record, "prompt", place=place)
            if not prompt.strip():
                raise InputError(f"{place}: field 'prompt' must not be empty")
            if split is None or text_field(record, "split", place=place, default=split) == split:
                problems.append(Problem(str(record.get("name", place)), prompt))
    if names:
        problems = [p for p in problems if any(fnmatch.fnmatchcase(p.name, n) for n in names)]
    if not problems:
        named = f" named {' or '.join(names)}" if names else ""
        raise InputError(
            f"{path}: holds no problem of split {split!r}{named}; name another split or file"
        )
    return problems


def proof_text(answer: str) -> str:
    """The proof in a model's answer: what follows the statement's `:=`, out of its code fence.

    Small models repeat the statement, fence their code, or end it with a fence that they never
    opened; all of these are cut away, nothing else is mended.
    """
    text = fenced(answer).strip()
    if text.startswith(("theorem ", "lemma ", "example ")):
        # Where a comment is at fault, the rest of the text stands in `code` as it is.
        code, _ = blank_comments(text)
        text = text[max(definition_mark(code, 0, len(code)), 0) :]
    return text.strip().removeprefix(":=").strip()


def spoken(answer: str) -> str:
    """An answer without the thinking that some models write in front of it."""
    return answer.rpartition("</think>")[2].strip()


def fenced(answer: str) -> str:
    """The first fenced block; with one fence only, what it closes, or opens if it names Lean."""
    before, *blocks = answer.split("```")
    if not blocks:
        return before
    block = _LANGUAGE.sub("", blocks[0])
    opens = len(blocks) > 1 or block != blocks[0] or not before.strip()
    return block if opens and block.strip() else before
