"""The form of what a caller gives: the statement of a theorem, and the header above it."""

import functools
import re

from fdfast.errors import InputError
from fdfast.lean.screen import blank_comments, documentation_as_comments, refuse_text
from fdfast.lean.toolchain import Toolchain

_NAME = r"[^\W\d][\w'!?]*(?:\.[^\W\d][\w'!?]*)*"
_STATEMENT = re.compile(rf"\s*(?:theorem|lemma)\s+(?P<name>{_NAME})(?=[\s:.({{\[⦃])")
_IMPORT = re.compile(r"^\s*(?:public\s+)?import\s+((?:[\w.]+[ \t]*)+)", re.MULTILINE)


def parse_statement(formal_statement: str) -> tuple[str, str]:
    """Return the statement without white space around it, and the theorem's name.

    Raises:
        InputError: it is not `theorem NAME ... :=`.
    """
    statement = formal_statement.strip()
    shown = statement if len(statement) <= 80 else statement[:77] + "..."
    if not statement.endswith(":="):
        raise InputError(
            "formal_statement must be `theorem NAME BINDERS : TYPE :=`, with `:=` at its end;"
            f" got {shown!r}"
        )
    match = _STATEMENT.match(statement)
    if match is None:
        raise InputError(f"formal_statement must begin with `theorem NAME`; got {shown!r}")
    code, fault = blank_comments(statement)
    if fault:
        raise InputError(f"formal_statement cannot be read ({fault}); got {shown!r}")
    if not code.rstrip().endswith(":="):
        raise InputError(f"formal_statement has no `:=` outside its comments; got {shown!r}")
    return statement, match["name"]


@functools.lru_cache(maxsize=256)
def imports_of(header: str) -> str:
    """Return the lines of a complete header that make up its import section: `prelude`, imports."""
    code, _ = blank_comments(documentation_as_comments(header))
    first = "prelude\n" if re.match(r"\s*prelude\b", code) else ""
    names = [name for found in _IMPORT.findall(code) for name in found.split()]
    return first + "".join(f"import {name}\n" for name in names)


@functools.lru_cache(maxsize=256)
def complete_header(lean: Toolchain, header: str) -> str:
    """Return the header with what this Lean needs above it, ending in a newline.

    Raises:
        InputError: it imports a module that this Lean does not have.
    """
    if refuse_text(header):
        return header  # not for Lean at all: the screen will say why
    code, _ = blank_comments(documentation_as_comments(header))
    imported = [name for names in _IMPORT.findall(code) for name in names.split()]
    if lean.modules is not None:
        for name in imported:
            if name not in lean.modules:
                raise InputError(
                    f"header imports {name}, which the embedded Lean does not have;"
                    f" it has {', '.join(sorted(lean.modules))}"
                )
    if not imported:
        header = lean.default_header + header
    elif lean.kind == "embedded" and not re.match(r"\s*prelude\b", code):
        header = "prelude\n" + header
    return header if header.endswith("\n") else header + "\n"
