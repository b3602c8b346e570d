"""A Lean file as an answer to one problem: the proof of its theorem, with the lemmas above it.

The statement is the problem's, never the file's. What stands above it was written by the prover, so
it is not trusted as a header is: it may hold lemmas, definitions and `open`, each with an honest
proof or body, and the compiled theorem must still have the type that the statement has without them
(`checker`, the audit).
"""

import re
from typing import NamedTuple

from fdfast.lean.leanfile import split_pieces
from fdfast.lean.screen import (
    blank_comments,
    documentation_as_comments,
    refuse_context,
    refuse_proof,
    refuse_text,
)
from fdfast.lean.statement import import_section, parse_statement

# What a prover may declare: its keyword is looked past, all else of it is screened as a proof is.
_DECLARATION = re.compile(
    r"(?:(?:private|protected|noncomputable)\s+)*(?:theorem|lemma|def|abbrev)\s"
)
_OPEN = re.compile(r"open((?:\s+(?!in\b)[A-Za-z_][\w'.]*)+)\s*\Z")


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
    chosen = pieces[places[-1]]
    stop = sum(len(piece.text) for piece in pieces[: places[-1] + 1])
    # What documents the next command is no part of this one's proof.
    own = code[stop - len(chosen.proof) : stop].rstrip()
    return Submission(chosen.proof[: len(own)].strip(), "".join(above).strip())


def refuse_helpers(context: str) -> str:
    """Why what a prover put above the theorem cannot be taken, or "".

    Lemmas and definitions alone, and `open`; in all of them, names, binders and types too, no word
    that begins a command, no attribute and no string, so that nothing runs or stays behind in the
    compiled file but terms that the kernel has checked.
    """
    if not context:
        return ""
    if reason := refuse_context(context):
        return reason
    if found := re.search('["«]', context):
        return f"`{found.group()}` above the theorem; put no strings there, and no names in « »"
    code, fault = blank_comments(documentation_as_comments(context))
    if fault:
        return fault
    at = 0
    for piece in split_pieces(context, code):
        begun = code[at : at + len(piece.text)].strip()
        at += len(piece.text)
        if begun and (reason := _refuse_command(begun)):
            return reason
    return ""


def _refuse_command(code: str) -> str:
    """The same for one command, without comments."""
    shown = code.split("\n", maxsplit=1)[0]
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    if (opened := _OPEN.match(code)) is not None:
        reason = refuse_proof(opened[1])
    elif (lead := _DECLARATION.match(code)) is not None:
        rest = code[lead.end() :]
        reason = "" if ":=" in rest or "|" in rest else "no `:=`"
        reason = reason or refuse_proof(rest)
    else:
        return f"`{shown}` above the theorem; put lemmas and definitions there, and nothing else"
    return f"{reason}, in `{shown}` above the theorem" if reason else ""
