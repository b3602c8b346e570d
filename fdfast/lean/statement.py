"""The form of what a caller gives: the statement of a theorem, and the header above it."""

import functools
import re
from dataclasses import dataclass

from fdfast.errors import InputError
from fdfast.lean.screen import blank_comments, documentation_as_comments, refuse_text
from fdfast.lean.toolchain import Toolchain

_NAME = r"[^\W\d][\w'!?]*(?:\.[^\W\d][\w'!?]*)*"
_STATEMENT = re.compile(rf"\s*(?:theorem|lemma)\s+(?P<name>{_NAME})(?=[\s:.({{\[⦃])")
_IMPORT = re.compile(
    r"\s*(?:public\s+)?(?:meta\s+)?import\s+(?:all\s+)?(?P<name>(?:«[^»\n]*»|[\w.!?'])+)"
)
# What Lean reads before all else; an `import` further down is no import.
_SECTION = re.compile(
    rf"(?P<module>\s*module\b)?(?P<prelude>\s*prelude\b)?(?P<imports>(?:{_IMPORT.pattern})*)".replace(
        "(?P<name>", "(?:"
    )
)


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
    code, fault = blank_comments(statement)
    match = _STATEMENT.match(code)
    if match is None:
        raise InputError(f"formal_statement must begin with `theorem NAME`; got {shown!r}")
    if fault:
        raise InputError(f"formal_statement cannot be read ({fault}); got {shown!r}")
    if not code.rstrip().endswith(":="):
        raise InputError(f"formal_statement has no `:=` outside its comments; got {shown!r}")
    return statement, match["name"]


@dataclass(frozen=True)
class ImportSection:
    """What Lean reads of a text before all else.

    Attributes:
        is_module: whether it begins with `module`.
        has_prelude: whether `prelude` keeps Lean from importing `Init`.
        imports: each `import`, as it is written, without comments.
        names: the modules they name.
        end: where in the text the section ends.
    """

    is_module: bool
    has_prelude: bool
    imports: tuple[str, ...]
    names: tuple[str, ...]
    end: int


@functools.lru_cache(maxsize=256)
def import_section(text: str) -> ImportSection:
    """Return the import section of a header or a file."""
    code, _ = blank_comments(documentation_as_comments(text))
    section = _SECTION.match(code)
    assert section is not None  # it matches the empty text too
    found = list(_IMPORT.finditer(section["imports"]))
    return ImportSection(
        section["module"] is not None,
        section["prelude"] is not None,
        tuple(" ".join(match.group().split()) for match in found),
        tuple(match["name"] for match in found),
        section.end(),
    )


def imports_of(header: str) -> str:
    """Return the lines of a complete header that make up its import section."""
    section = import_section(header)
    words = ["module"] * section.is_module + ["prelude"] * section.has_prelude
    return "".join(f"{line}\n" for line in (*words, *section.imports))


@functools.lru_cache(maxsize=256)
def complete_header(lean: Toolchain, header: str) -> str:
    """Return the header with what this Lean needs above it, ending in a newline.

    Raises:
        InputError: it imports a module that this Lean does not have, or begins with what leaves the
            verdict without ground.
    """
    if refuse_text(header):
        return header  # not for Lean at all: the screen will say why
    section = import_section(header)
    for name in section.names:
        if lean.modules is not None and name not in lean.modules:
            raise InputError(
                f"header imports {name}, which the embedded Lean does not have;"
                f" it has {', '.join(sorted(lean.modules))}"
            )
    if lean.kind == "embedded" and section.is_module:
        raise InputError(
            "header begins with `module`, and a module cannot import FdBase; leave it out"
        )
    if lean.kind != "embedded" and section.has_prelude:
        # Below `prelude` the names of the allowed axioms are free, to mean anything.
        raise InputError(
            "header begins with `prelude`, which leaves the standard axioms undefined; leave it out"
        )
    if not section.names:
        header = lean.default_header + header
    elif lean.kind == "embedded" and not section.has_prelude:
        header = "prelude\n" + header
    return header if header.endswith("\n") else header + "\n"
