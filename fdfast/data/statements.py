"""A theorem's text as published, brought to the form that the checker wants.

Published sets write `theorem t : P := by sorry`, `:= sorry`, `:=` or a whole proof, with imports, a
documentation comment or definitions above it in the same text, or in a field of their own.
"""

import re
from dataclasses import dataclass

from fdfast.errors import InputError
from fdfast.lean.leanfile import Piece, definition_mark, split_pieces
from fdfast.lean.statement import parse_statement

# A comment's opening, or a literal whole: raw string, string, character, `«name»`. A quote that
# ends a name (h') or stands for an image (f '' s) begins no character.
_HIDDEN = re.compile(
    r"""--|/-|(?<![\w'])r(?P<raw>\#*)".*?"(?P=raw)|"(?:\\.|[^"\\])*"|«[^»\n]*»"""
    r"""|(?<![\w'!?»])'(?:\\[^'\n]{1,8}|\\'|[^\\'\n])'|(?P<open>["])""",
    re.DOTALL,
)
_NESTED = re.compile(r"/-|-/")
# Signs that Lean reads together with the first one of a comment: `<--` is `<-` and `-`.
_JOINED = {"--": "<", "/-": "/\\"}
_MODIFIER = re.compile(r"(?:@\[[^\]]*\]|\b(?:private|protected|noncomputable|public|nonrec))\Z")
_HOLE = re.compile(r"(?<![\w.'])(?:sorry|admit)(?![\w'!?])")
_WITHOUT_PROOF = ("", "by", "sorry", "admit", "by sorry", "by admit")


class StatementError(ValueError):
    """Why a text is not one theorem; readers say where it stands."""


@dataclass(frozen=True)
class Declaration:
    """One theorem of a text.

    Attributes:
        name: the theorem's own name.
        statement: from `theorem` to `:=`.
        proof: what follows, "" for a hole.
        above: the code above it, without its own documentation and attributes.
        documentation: its documentation comment, "" if it has none.
        line: the line of `theorem` in the text, from 1.
    """

    name: str
    statement: str
    proof: str
    above: str
    documentation: str
    line: int


def lean_code(text: str) -> str:
    """Blank comments and literals by spaces (newlines stay), so that only code is left.

    Raises:
        StatementError: an unclosed comment or string, or a comment that Lean may not take for one.
    """
    out, position = [], 0
    while match := _HIDDEN.search(text, position):
        begin, end, opening = match.start(), match.end(), match.group()
        if opening in _JOINED:
            if begin and text[begin - 1] in _JOINED[opening]:
                raise StatementError(
                    f"has the signs `{text[begin - 1]}{opening}`, which Lean may not take for a"
                    " comment; put a space before it"
                )
            end = _comment_end(text, begin)
        elif match["open"]:
            raise StatementError(
                f"has an unclosed string, opened in line {text.count(chr(10), 0, begin) + 1}"
            )
        out += [text[position:begin], re.sub(r"[^\n]", " ", text[begin:end])]
        position = end
    return "".join(out) + text[position:]


def _comment_end(text: str, begin: int) -> int:
    if text.startswith("--", begin):
        end = text.find("\n", begin)
        return len(text) if end < 0 else end
    depth = 0
    for match in _NESTED.finditer(text, begin):
        depth += 1 if match.group() == "/-" else -1
        if depth == 0:
            return match.end()
    line = text.count("\n", 0, begin) + 1
    raise StatementError(f"has an unclosed comment, opened in line {line}")


def single_declaration(text: str) -> Declaration:
    """The one theorem of a text.

    Raises:
        StatementError: there is none, or more than one, or it is not of the form that the checker
            wants: `theorem NAME BINDERS : TYPE :=`, with a proof, a hole or nothing behind.
    """
    found = declarations(text)
    if len(found) != 1:
        names = ", ".join(declaration.name for declaration in found[:3])
        raise StatementError(
            f"must hold one theorem; it holds {len(found)} ({names}); split the record"
        )
    return found[0]


def declarations(text: str) -> list[Declaration]:
    """The theorems of a text, each with the code above it, other theorems left out.

    Raises:
        StatementError: as `single_declaration`, but any number above 0 will do.
    """
    code = lean_code(text)
    found, start, above = [], 0, ""
    loose = 0  # where the code begins that is not yet in `above`
    for piece in split_pieces(text, code):
        stop = start + len(piece.text)
        if piece.name:
            begin = start + _theorem_begin(code[start:stop])
            kept, documentation = _split_above(text[loose:begin], code[loose:begin])
            above += kept
            found.append(_declaration(text, code, begin, stop, piece, above, documentation))
            loose = stop
        elif piece.statement:
            raise StatementError(
                f"must begin with `theorem NAME` and a plain name; got {piece.statement[:60]!r}"
            )
        start = stop
    if not found:
        raise StatementError("has no `theorem NAME` (or `lemma NAME`) at the left margin")
    rest = code[loose:].split()
    if rest and not (rest[0] == "end" or len(found) > 1):
        raise StatementError(f"goes on after the theorem with `{rest[0]}`; cut it off")
    return found


def _theorem_begin(code: str) -> int:
    match = re.search(r"\b(?:theorem|lemma)\b", code)
    assert match is not None  # the piece has a name
    return match.start()


def _split_above(text: str, code: str) -> tuple[str, str]:
    """What stands above a theorem: its code, and the theorem's documentation.

    Attributes, modifiers and plain comments right above the theorem are dropped.
    """
    stop = len(code.rstrip())
    while modifier := _MODIFIER.search(code, max(stop - 400, 0), stop):
        stop = len(code[: modifier.start()].rstrip())
    comments = text[stop:]
    documentation = ""
    if (begin := comments.rfind("/--")) >= 0:
        documentation = comments[begin : _comment_end(comments, begin)]
    kept = text[:stop].strip("\n")
    return (f"{kept}\n" if kept.strip() else ""), documentation


def _declaration(
    text: str, code: str, begin: int, stop: int, piece: Piece, above: str, documentation: str
) -> Declaration:
    mark = definition_mark(code, begin, stop)
    if mark < 0:
        raise StatementError(
            f"theorem {piece.name} has no `:=` that ends its statement (outside brackets, and not"
            " that of a `let` or `have` in it); write `theorem NAME BINDERS : TYPE := by sorry`"
        )
    if match := _HOLE.search(code, begin, mark):
        raise StatementError(
            f"theorem {piece.name} has `{match.group()}` within its statement: nothing can prove"
            " it; write out what is meant"
        )
    proof, behind = text[mark:stop].strip(), code[mark:stop]
    if " ".join(behind.split()) in _WITHOUT_PROOF:
        proof = ""
    elif match := _HOLE.search(behind):
        raise StatementError(
            f"theorem {piece.name} has a proof with the hole `{match.group()}`; leave the whole"
            " proof out (`:= by sorry`), or finish it"
        )
    try:
        statement, name = parse_statement(text[begin:mark])
    except InputError as error:
        raise StatementError(str(error)) from error
    line = text.count("\n", 0, begin) + 1
    return Declaration(name, statement, proof, above, documentation, line)
