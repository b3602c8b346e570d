"""Compiling a whole file: what is no text for Lean, whose lines the messages name, what imports."""

from collections.abc import Iterator

import pytest

from fdfast.errors import InputError
from fdfast.lean import LeanPool, Toolchain, find_lean
from fdfast.lean.statement import complete_header, import_section, imports_of

GOOD = "theorem good (a : Prop) (h : a) : a :="


@pytest.fixture(scope="module")
def pool() -> Iterator[LeanPool]:
    with LeanPool(workers=1, timeout_s=20.0, toolchain=find_lean(backend="embedded")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\ud800", "the text is no Unicode: lone surrogate at character 0"),
        ("a\0b", "the text has a NUL byte"),
        ("-" * (5 << 20), "the text has 5242880 characters; at most 4194304 are read"),
        ("import Mathlib\n", "header imports Mathlib, which the embedded Lean does not have;"),
        ("module\nimport FdBase\n", "header begins with `module`, and a module cannot import"),
    ],
)
def test_a_text_that_is_not_for_lean_is_an_error_in_line_1(
    pool: LeanPool, text: str, said: str
) -> None:
    (message,) = pool.check_file(text).messages
    assert (message.severity, message.line, message.column) == ("error", 1, 0)
    assert message.text.startswith(said)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("theorem t : True :=", 1),
        ("theorem t : True :=\n", 2),
        ("theorem t : True :=\n\n\n", 4),
        ("import FdBase\ntheorem t : True :=", 2),
        ("import FdBase theorem t : True := nosuch\n", 1),
        (" prelude\n\nimport FdBase -- so\n\n#check nosuch", 5),
        ("/- import Foo\nimport Bar -/\n#check nosuch\n", 3),
    ],
)
def test_no_message_is_past_the_end_of_its_file(pool: LeanPool, text: str, line: int) -> None:
    messages = pool.check_file(text).messages
    assert [message.line for message in messages if message.severity == "error"] == [line]


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ("import A\nimport B.C\n", "import A\nimport B.C\n"),
        (
            "-- import Z\nprelude /- import Y -/ import  A -- import X\nopen A",
            "prelude\nimport A\n",
        ),
        ("public import A meta import B\n", "public import A\nmeta import B\n"),
        (
            "module\npublic meta import A\nimport all B\n",
            "module\npublic meta import A\nimport all B\n",
        ),
        ("import «A-b».C\ndef x := 1\nimport Below\n", "import «A-b».C\n"),
        ("import A B\n", "import A\n"),
        ("open A\nimport B\n", ""),
        ('def s := "\nimport B\n"', ""),
        ("importA\npreludes\n", ""),
        ("", ""),
    ],
)
def test_imports_are_those_of_the_import_section(text: str, imports: str) -> None:
    assert imports_of(text) == imports
    assert text[: import_section(text).end].rstrip() == text[: import_section(text).end]


def test_a_comment_below_the_imports_imports_nothing(leans: dict[str, Toolchain]) -> None:
    header = "open Nat\n/- as in\nimport Mathlib\n-/\n"
    assert complete_header(leans["embedded"], header) == f"prelude\nimport FdBase\n{header}"
    for kind in ("embedded", "lean", "repl"):
        with LeanPool(workers=1, toolchain=leans[kind]) as pool:
            assert pool.check(GOOD, "h", header).proved
    with pytest.raises(InputError, match=r"^header imports Mathlib, which the embedded Lean"):
        complete_header(leans["embedded"], "/- -/ import Mathlib -- so")
