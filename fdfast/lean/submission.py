"""A Lean file as an answer to one problem: the proof of its theorem, with the lemmas above it.

The statement is the problem's, never the file's. What stands above it was written by the prover, so
it is not trusted as a header is: it may hold lemmas, definitions and `open`, each with an honest
proof or body, and the compiled theorem must still have the type that the statement has without them
(`checker`, the audit).
"""

import re
from typing import NamedTuple

from fdfast.lean.leanfile import Piece, definition_mark, split_pieces
from fdfast.lean.screen import (
    blank_comments,
    documentation_as_comments,
    refuse_context,
    refuse_proof,
    refuse_text,
)
from fdfast.lean.statement import import_section, parse_statement

_DEFINITION = re.compile(r"(?:(?:private|protected|noncomputable)\s+)*(?:def|abbrev)\b")
_HARMLESS = re.compile(r"open(?:\s+(?!in\b|scoped\b)[\w.]+)+\s*\Z")


class Submission(NamedTuple):
    """What is checked in the place of a file.

    Attributes:
        proof: what follows the theorem's `:=`.
        context: the lemmas and definitions above it.
    """

    proof: str
    context: str = ""


def read_submission(text: str, formal_statement: str, header: str = "") -> Submission | None:
    """The answer in a Lean file; None if it claims no theorem of that name.

    Args:
        text: the file's.
        formal_statement: of the problem; its name is looked for, the last one counts.
        header: of the problem; commands that it has already are left out of the context.

    Raises:
        InputError: the formal statement has not that form.
    """
    _, name = parse_statement(formal_statement)
    if refuse_text(text):
        return None
    body = text[import_section(text).end :]
    code, fault = blank_comments(documentation_as_comments(body))
    if fault:
        return None
    pieces = split_pieces(body, code)
    places = [place for place, piece in enumerate(pieces) if piece.name == name and piece.proof]
    if not places:
        return None
    known = {line.strip() for line in header.splitlines()}
    above = [piece.text for piece in pieces[: places[-1]] if piece.text.strip() not in known]
    return Submission(pieces[places[-1]].proof.strip(), "".join(above).strip())


def refuse_helpers(context: str) -> str:
    """Why what a prover put above the theorem cannot be taken, or ""."""
    if not context:
        return ""
    if reason := refuse_context(context):
        return reason
    code, fault = blank_comments(documentation_as_comments(context))
    if fault:
        return fault
    at = 0
    for piece in split_pieces(context, code):
        part = code[at : at + len(piece.text)]
        at += len(piece.text)
        if reason := _refuse_piece(piece, part):
            return reason
    return ""


def _refuse_piece(piece: Piece, code: str) -> str:
    """The same for one command; `code` is its text without comments."""
    begun = code.strip()
    if not begun or _HARMLESS.match(begun):
        return ""
    if piece.statement:
        lead = piece.text[: piece.text.index(piece.statement)]
        proof = piece.proof
    elif (match := _DEFINITION.match(begun)) is not None:
        start = len(code) - len(code.lstrip())
        mark = definition_mark(code, start + match.end(), len(code))
        lead, proof = "", piece.text[mark:] if mark >= 0 else ""
    else:
        lead, proof = "", ""
    if not proof or "@[" in lead:
        first = begun.split("\n")[0]
        shown = first if len(first) <= 60 else first[:57] + "..."
        return f"`{shown}` above the theorem; put lemmas and definitions with `:=` there"
    reason = refuse_proof(proof)
    return f"{reason} above the theorem" if reason else ""
