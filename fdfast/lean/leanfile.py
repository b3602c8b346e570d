"""A .lean file as the theorems it claims, each with what stands above it."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from fdfast.errors import InputError
from fdfast.lean.screen import blank_comments, documentation_as_comments, refuse_text

# A command begins at the left margin. Words that do not begin one there (`by`, `|`, a name) go on
# with the one before.
_COMMAND = re.compile(
    r"^(?:/--|@\[|#\w|(?:theorem|lemma|def|abbrev|example|instance|axiom|opaque|inductive|structure|class|mutual|namespace"
    r"|section|end|open|universe|variable|export|set_option|attribute|macro|macro_rules|syntax|notation|notation3"
    r"|infix|infixl|infixr|prefix|postfix|elab|elab_rules|run_cmd|initialize|noncomputable|unsafe|partial|private"
    r"|protected|public|local|scoped|deriving|include|omit|import|prelude)\b)",
    re.MULTILINE,
)
_MODIFIERS = re.compile(
    r"(?:@\[[^\]]*\]\s*|(?:private|protected|noncomputable|public|nonrec)\s+)*(?=(?:theorem|lemma)\b)"
)
# Indented too, as in a namespace: no theorem may hide in the piece above it.
_INDENTED = re.compile(
    r"^[ \t]+(?:@\[[^\]\n]*\][ \t]*)?(?:(?:private|protected|noncomputable|public|nonrec)[ \t]+)*"
    r"(?:theorem|lemma)\b",
    re.MULTILINE,
)
_AFTER_SCOPE = re.compile(
    r"^[ \t]*(?:noncomputable[ \t]+)?(?:section|namespace|end)(?:[ \t]+[\w.]+)?[ \t]+"
    r"(?=(?:theorem|lemma)\b)",
    re.MULTILINE,
)
# One command with all that it declares.
_MUTUAL = re.compile(r"^[ \t]*mutual\b.*?(?:^[ \t]*end\b|\Z)", re.MULTILINE | re.DOTALL)
# After `open A in` and the like, or a number glued to it.
_HIDDEN = re.compile(r"(?<![A-Za-z_«])(?<![^\W\d]\.)(?:theorem|lemma)(?![\w'!?»])")
# What is no code, as far as that can be told without Lean's lexer: enough to find a theorem by, not
# to trust a proof by.
_NO_CODE = re.compile(
    r""""(?:\\.|[^"\\])*"|«[^»\n]*»|(?<![\w'!?])'(?:\\[^'\n]+|[^'\\\n])'|--[^\n]*|/-""",
    re.DOTALL,
)
_IN_COMMENT = re.compile(r"/-|-/")
_NOT_NEWLINE = re.compile(r"[^\n]")
# A name, `«with a space»` too.
_NAME = re.compile(r"\s*(?P<name>(?:«[^»]*»|[^\s:({\[⦃«])+)")
_OPENING, _CLOSING = "([{⟨⦃", ")]}⟩⦄"
# Whole names, so that no part of one is taken for a word; brackets; the mark itself.
_MARK = re.compile(r"[^\W\d][\w'!?]*(?:\.[^\W\d][\w'!?]*)*|:=|[(\[{⟨⦃)\]}⟩⦄]")
_CLAIMING = {"let", "have", "letI", "haveI", "let_fun", "let_delayed"}


@dataclass(frozen=True)
class Piece:
    """A run of a file's text that is one command, or what precedes the first.

    Attributes:
        text: the text, as it stands in the file.
        line: its first line, from 1.
        statement: of a theorem, from `theorem` to `:=`; "" for every other command and for a
            theorem without `:=`.
        proof: of a theorem, what follows the `:=`.
        name: of a theorem, its name; "" otherwise.
    """

    text: str
    line: int
    statement: str = ""
    proof: str = ""
    name: str = ""


def read_pieces(path: Path) -> list[Piece]:
    """Split a .lean file into its commands.

    Raises:
        InputError: the file cannot be read, is no UTF-8, is cut off in a comment, or claims no
            theorem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise InputError(f"{path}: is empty; a file to check claims at least one `theorem`")
    if reason := refuse_text(text):
        raise InputError(f"{path}: {reason}")
    code, fault = blank_comments(documentation_as_comments(text))
    if fault:
        raise InputError(f"{path}: {fault}")
    pieces = split_pieces(text, code)
    if not any(piece.name for piece in pieces):
        raise InputError(f"{path}: claims no theorem")
    return pieces


def split_pieces(text: str, code: str) -> list[Piece]:
    """Split a text into its commands; `code` is the text without comments, equally long."""
    bare = _without_strings(code)
    commands = {match.start() for match in _COMMAND.finditer(code)}
    indented = {match.start() for match in _INDENTED.finditer(bare)}
    indented |= {match.end() for match in _AFTER_SCOPE.finditer(bare)}
    inner = {
        start
        for block in _MUTUAL.finditer(bare)
        for start in commands | indented
        if block.start() < start < block.end()
    }
    starts = sorted({0, *(commands | indented) - inner, len(text)}) if text else [0, 0]
    return [_piece(text, code, bare, *bounds) for bounds in itertools.pairwise(starts)]


def _without_strings(code: str) -> str:
    """Blank strings too, and the comments that `blank_comments` leaves below the first of them."""
    out: list[str] = []
    at = depth = 0
    while match := (_IN_COMMENT if depth else _NO_CODE).search(code, at):
        between = code[at : match.start()]
        out.append(_NOT_NEWLINE.sub(" ", between) if depth else between)
        out.append(_NOT_NEWLINE.sub(" ", match.group()))
        depth += {"/-": 1, "-/": -1}.get(match.group(), 0)
        at = match.end()
    return "".join((*out, code[at:]))


def _piece(text: str, code: str, bare: str, start: int, stop: int) -> Piece:
    """The piece between two places; `code` and `bare` are equally long."""
    line = text.count("\n", 0, start) + 1
    whole = text[start:stop]
    lead = _MODIFIERS.match(code, start + len(code[start:stop]) - len(code[start:stop].lstrip()))
    if lead is None or lead.end() >= stop:
        # `open A in theorem t`: never mere context.
        hidden = _HIDDEN.search(bare, start, stop)
        return Piece(whole, line, name=_name(code, hidden.end(), stop) if hidden else "")
    begin = lead.end()
    name = _name(code, begin + len("theorem" if code[begin] == "t" else "lemma"), stop)
    end = definition_mark(code, begin, stop)
    if end < 0:
        return Piece(whole, line, name=name)
    return Piece(whole, line, text[begin:end], text[end:stop], name)


def _name(code: str, after: int, stop: int) -> str:
    """The name that stands there, without universes; `?` for none."""
    # Blanked from here, since below a string `code` still has the comments.
    match = _NAME.match(blank_comments(code[after : min(after + 4096, stop)])[0])
    return match["name"].removesuffix(".") if match else "?"


def definition_mark(code: str, begin: int, stop: int) -> int:
    """Return the place after the `:=` that ends the statement, -1 if there is none.

    That is the first one outside brackets which belongs to no `let` or `have` of the type, as in
    `theorem t : let x := 1; x = 1 :=`. `code` is a text without its comments (`blank_comments`).
    """
    depth = claimed = 0
    for match in _MARK.finditer(code, begin, stop):
        token = match.group()
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif depth == 0 and token in _CLAIMING:
            claimed += 1
        elif depth == 0 and token == ":=":
            if not claimed:
                return match.end()
            claimed -= 1
    return -1
