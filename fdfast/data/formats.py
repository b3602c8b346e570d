"""The published fields of theorem sets, each turned into a `Theorem`.

| format | the fields that tell it, and where they are published |
|---|---|
| minif2f | name or id, formal_statement: miniF2F and ProofNet of DeepSeek-Prover (split, informal_prefix, header, goal), miniF2F-lean4 and ProofNet-lean4 on GitHub (informal_stmt, formal_proof), AI-MO/minif2f_test (the header within the statement), and our own files (proof) |
| proofnet | lean4_formalization: PAug/ProofNetSharp, ProofNetVerif (id, nl_statement, lean4_src_header) |
| putnambench | lean4_statement: PutnamBench's JSON (name, informal_statement); its .lean files: see `putnam` |
| lean_workbook | natural_language_statement: internlm/Lean-Workbook, one record a problem (proof: a list) or a record for each tactic (tactic, state_before, state_after) |
| leandojo | full_name, file_path: LeanDojo-Benchmark and LeanDojo-Benchmark-4: see `leandojo` |
"""  # noqa: E501 - a table

import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fdfast.data.leandojo import Library, leandojo_theorem
from fdfast.data.putnam import fill_solution
from fdfast.data.records import Record, Theorem, text_field
from fdfast.data.statements import Declaration, StatementError, single_declaration
from fdfast.errors import InputError

Placed = tuple[str, Record]
_MATHLIB = "import Mathlib\n"


@dataclass(frozen=True)
class Options:
    """What a reader is told beside the records.

    Attributes:
        header: for statements without a header; None is the format's own.
        split: the split of records that name none, such as a file's `train`.
        library: where LeanDojo's statements are.
    """

    header: str | None = None
    split: str = ""
    library: Library = field(default_factory=Library)


def as_documentation(words: str) -> str:
    """Words as a documentation comment; "" stays "", and one that is a comment stays as it is."""
    words = words.strip()
    if not words or words.startswith("/-"):
        return f"{words}\n" if words else ""
    return f"/-- {words.replace('-/', '- /').replace('/-', '/ -')} -/\n"


def _declared(record: Record, place: str, name: str, *, text: str | None = None) -> Declaration:
    """The declaration in a field; `text` if the field's text was worked on."""
    statement = text_field(record, name, place=place) if text is None else text
    try:
        return single_declaration(statement)
    except StatementError as error:
        raise InputError(f"{place}: field '{name}': {error}") from error


def _theorem(
    record: Record,
    place: str,
    declared: Declaration,
    options: Options,
    *,
    header: str,
    words: str,
    proof: str = "",
    default_header: str = "",
) -> Theorem:
    """Put together what the fields and the statement's own text say."""
    if header and not header.endswith("\n"):
        header += "\n"
    header += declared.above
    if not header.strip():
        header = default_header if options.header is None else options.header
    name = text_field(record, "name", place=place, default="")
    name = name or text_field(record, "id", place=place, default="") or declared.name
    return Theorem(
        name=name,
        split=text_field(record, "split", place=place, default=options.split),
        formal_statement=declared.statement,
        header=header,
        informal_prefix=as_documentation(words) or as_documentation(declared.documentation),
        proof=proof or declared.proof,
    )


def _first_text(record: Record, place: str, *names: str) -> str:
    texts = (text_field(record, name, place=place, default="") for name in names)
    return next((text for text in texts if text.strip()), "")


def _minif2f(record: Record, place: str, options: Options) -> Theorem:
    key = "id" if "id" in record and record.get("name") is None else "name"
    needed = (key, "formal_statement")
    if not all(text_field(record, field, place=place).strip() for field in needed):
        raise InputError(f"{place}: fields '{key}' and 'formal_statement' must not be empty")
    words = _first_text(record, place, "informal_prefix", "informal_stmt")
    proof = _first_text(record, place, "proof", "formal_proof")
    header = text_field(record, "header", place=place, default="")
    declared = _declared(record, place, "formal_statement")
    return _theorem(record, place, declared, options, header=header, words=words, proof=proof)


def _proofnet(record: Record, place: str, options: Options) -> Theorem:
    return _theorem(
        record,
        place,
        _declared(record, place, "lean4_formalization"),
        options,
        header=text_field(record, "lean4_src_header", place=place, default=""),
        words=text_field(record, "nl_statement", place=place, default=""),
        default_header=_MATHLIB,
    )


def _putnambench(record: Record, place: str, options: Options) -> Theorem:
    statement = text_field(record, "lean4_statement", place=place)
    try:
        statement = fill_solution(statement)
    except StatementError as error:
        raise InputError(f"{place}: field 'lean4_statement': {error}") from error
    declared = _declared(record, place, "lean4_statement", text=statement)
    imported = "import " in declared.above
    mathlib = _MATHLIB if options.header is None else options.header
    return _theorem(
        record,
        place,
        declared,
        options,
        header="" if imported else mathlib,
        words=_first_text(record, place, "informal_statement", "informal_stmt"),
    )


def _lean_workbook(record: Record, place: str, options: Options) -> Theorem:
    return _theorem(
        record,
        place,
        _declared(record, place, "formal_statement"),
        options,
        header="",
        words=text_field(record, "natural_language_statement", place=place, default=""),
        proof=_workbook_proof(record, place),
        default_header=_MATHLIB,
    )


def _workbook_proof(record: Record, place: str) -> str:
    """The first proof of a list, or the steps of one; tactics get the `by` that they leave out."""
    if text_field(record, "status", place=place, default="proved") != "proved":
        return ""  # what stands there is no proof of this statement
    found = record.get("proof")
    if isinstance(found, list):
        found = next((text for text in found if isinstance(text, str) and text.strip()), None)
    if found is not None and not isinstance(found, str):
        raise InputError(
            f"{place}: field 'proof' must be text or a list of texts; got {type(found).__name__}"
        )
    text = (found or "").strip()
    if text.startswith(("theorem ", "lemma ")):
        return _declared(record, place, "proof", text=text).proof
    text = text.removeprefix(":=").strip()
    if not text or text.split(None, 1)[0] == "by":
        return text
    return "by\n" + textwrap.indent(text, "  ")


def _one_record_a_problem(records: Iterable[Placed]) -> Iterator[Placed]:
    """Lean-Workbook's rows of one tactic each, as one record with the whole proof."""
    groups: dict[object, list[Placed]] = {}
    for number, (place, record) in enumerate(records):
        key = record.get("id") if "tactic" in record else None
        groups.setdefault((number,) if key is None else str(key), []).append((place, record))
    for rows in groups.values():
        place, first = rows[0]
        if "tactic" not in first:
            yield place, first
            continue
        yield place, {**first, "proof": _chain(rows)}


def _chain(rows: list[Placed]) -> str:
    """The tactics of a proof, one below the other; "" where the states do not follow one another.

    Each step begins in the state in which the one before ended, and the last leaves no goal.
    """
    steps = [
        tuple(
            text_field(row, name, place=place, default="").strip()
            for name in ("tactic", "state_before", "state_after")
        )
        for place, row in rows
    ]
    ends_meet = all(a[2] == b[1] for a, b in itertools.pairwise(steps))
    if not ends_meet or not all(step[0] for step in steps) or steps[-1][2] != "no goals":
        return ""
    return "\n".join(step[0] for step in steps)


def _leandojo(record: Record, place: str, options: Options) -> Theorem:
    return leandojo_theorem(record, place, options.library, split=options.split)


def _as_they_are(records: Iterable[Placed]) -> Iterator[Placed]:
    yield from records


@dataclass(frozen=True)
class Format:
    """How a published set is read.

    Attributes:
        convert: a record, its place and the options -> the theorem.
        prepare: what is done to the records first.
    """

    convert: Callable[[Record, str, Options], Theorem]
    prepare: Callable[[Iterable[Placed]], Iterator[Placed]] = _as_they_are


FORMATS = {
    "minif2f": Format(_minif2f),
    "proofnet": Format(_proofnet),
    "putnambench": Format(_putnambench),
    "lean_workbook": Format(_lean_workbook, _one_record_a_problem),
    "leandojo": Format(_leandojo),
}


def tell_format(record: Record, place: str) -> str:
    """The format that a record's fields show.

    Raises:
        InputError: none, or one that is known to be of no use.
    """
    if "lean4_formalization" in record:
        return "proofnet"
    if "lean4_statement" in record:
        return "putnambench"
    if "natural_language_statement" in record:
        return "lean_workbook"
    if "full_name" in record and "file_path" in record:
        return "leandojo"
    if "src_header" in record:
        raise InputError(
            f"{place}: field 'src_header' is of ProofNet in Lean 3, which Lean 4 cannot check; take"
            " its Lean 4 form, hf:PAug/ProofNetSharp say"
        )
    if "formal_statement" in record or "name" in record or not record:
        return "minif2f"
    raise InputError(
        f"{place}: field 'formal_statement' is missing, and the fields"
        f" {', '.join(map(repr, sorted(record)[:8])) or '(none)'} are of no set that is known; name"
        f" its format ({', '.join(FORMATS)}) or rename the fields"
    )


def known_splits(folder: Path) -> list[Path]:
    """LeanDojo's files in a folder: train.json, val.json, test.json."""
    return [
        path for name in ("train", "val", "test") if (path := folder / f"{name}.json").is_file()
    ]
