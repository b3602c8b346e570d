"""The search: Python's lines, whether ripgrep helps or not, within its limits."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdfast.lean.search import Found, search, weaker_pattern

RIPGREP = shutil.which("rg")

TEXTS = {
    "Order/Basic.lean": "theorem le_refl (h₁ : a ≤ b) : a ≤ a := sorry\r\n"
    "lemma Foo.bar' : ∀ x, x = x\n",
    "Order/Z.lean": "/-- KELVIN \u212a and \u017f and İ -/\n"
    "\ttheorem tab_le : {x | x ∈ s}.card = 3\n\n",
    "Algebra.lean": "theorem add_comm : a + b = b + a\nexample : (1 : Nat)[0]? = none\n"
    "-- a\\b | c^2$",
    "Zeta.lean": "structure S where\n  x y : Nat  \n@[simp] def f (n) := n.succ -- theorem",
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "notes.txt").write_text("theorem in a text")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "A.lean").write_text("theorem hidden")
    (tmp_path / "Bytes.lean").write_bytes(b"theorem \xff")
    (tmp_path / "Link.lean").symlink_to(tmp_path / "Zeta.lean")
    (tmp_path / ".gitignore").write_text("Zeta.lean\n")
    return tmp_path


def expected(pattern: str, *, ignore_case: bool = False) -> list[str]:
    """The lines by the plainest means."""
    expression = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    return [
        f"L/{name}:{number}: {line.strip()}"
        for name in sorted(TEXTS)
        for number, line in enumerate(TEXTS[name].replace("\r", "").split("\n"), 1)
        if expression.search(line)
    ]


PATTERNS = [
    *(
        "theorem",
        r"^theorem",
        r"\btheorem\b",
        r"le_refl.*:=",
        r"h\w",
        r"h₁\b",
        r"\S+ \+ \w",
        r"=\s*$",
    ),
    *("[a-z]+_[^ ]+", r"[\w.']+ :", "a|∈", r"(?:x ){2}", "x{,2}y", "{x", r"\{x \|", "∀ x,", r"\t"),
    *(
        r"\)\[0\]\?",
        r"(?=theorem)t",
        r"(a) \+ b = b \+ \1",
        "(?i)kelvin",
        r"\x41dd|\u2208",
        "^$",
        ".",
    ),
    *(
        "sorry$",
        "[^a]",
        "[]x]",
        r"\^2\$",
        "[&|]",
        r"(?P<n>s)imp",
        "a*+b?",
        "(?>ab|a)",
        "K",
        "[\u017f]",
    ),
]


@pytest.mark.parametrize("engine", ["", *([RIPGREP] if RIPGREP else [])])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ignore_case", [False, True])
def test_the_lines_are_pythons(library: Path, engine: str, pattern: str, ignore_case: bool) -> None:
    found = search(pattern, {"L": library}, ignore_case=ignore_case, ripgrep=engine)
    assert found == Found(tuple(expected(pattern, ignore_case=ignore_case)), "all")


pieces = st.sampled_from(
    [
        *"abkKsS₁ éİ.|*+?()[]{}^$-_'",
        r"\w",
        r"\d",
        r"\s",
        r"\W",
        r"\b",
        r"\B",
        r"\.",
        "[a-k]",
        "[^s]",
        *("{2}", "{,1}", "{1,}", "(?:", "[\u017f]", r"\x4b", r"\u212a", "(?i)", "*+", "{,}"),
    ]
)
letters = st.text(st.sampled_from([*"abkKsS₁ éİ\u212a.\u017f\u0131i|-_'(["]), max_size=12)


@pytest.mark.skipif(RIPGREP is None, reason="ripgrep is not installed")
@settings(max_examples=150)
@given(st.lists(pieces, min_size=1, max_size=6).map("".join), letters, st.booleans())
def test_what_python_fits_the_weaker_pattern_fits(
    pattern: str, line: str, ignore_case: bool
) -> None:
    weaker = weaker_pattern(pattern, ignore_case=ignore_case)
    if weaker is None:
        return
    try:
        expression = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except re.error:
        return
    if expression.search(line):
        assert RIPGREP is not None
        done = subprocess.run(
            [RIPGREP, "--no-config", "--quiet", "--text", "--encoding", "none", "-e", weaker],
            input=f"{line}\n".encode(),
            check=False,
            capture_output=True,
        )
        assert done.returncode == 0, (weaker, done.stderr)


@pytest.mark.parametrize(
    ("pattern", "weaker"),
    [
        ("ab", r"\x{61}\x{62}"),
        (r"\bf(?P<n>x)+?$", r"(?:)\x{66}(?:\x{78})+?(?:)"),
        ("[a-c][^d]", r"[\x{61}-\x{63}][^\x{64}]"),
        (r"[\w.]", "."),
        ("(?i)a1", r"[aA\x{80}-\x{10FFFF}]\x{31}"),
        ("x{,2}{", r"\x{78}{0,2}\x{7B}"),
        ("(?=a)", None),
        (r"(a)\1", None),
        ("a\nb", None),
        ("(?s:.)", None),
        ("[a", None),
        ("\\", None),
    ],
)
def test_patterns_are_weakened_as_written_here(pattern: str, weaker: str | None) -> None:
    assert weaker_pattern(pattern, ignore_case=False) == weaker


def fake_ripgrep(folder: Path, body: str) -> str:
    path = folder / "fake-rg"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_ripgrep_picks_the_files_and_a_failing_one_changes_nothing(library: Path) -> None:
    picked = fake_ripgrep(library, "sys.stdout.write(sys.argv[-1] + '/Zeta.lean\\0')")
    found = search("theorem", {"L": library}, ripgrep=picked)
    assert found.lines == ("L/Zeta.lean:3: @[simp] def f (n) := n.succ -- theorem",)
    failing = fake_ripgrep(library, "sys.exit(2)")
    assert list(search("theorem", {"L": library}, ripgrep=failing).lines) == expected("theorem")
    for pattern in ("(?=theorem)", "(a"):  # it is not even asked
        assert search(pattern, {"L": library}, ripgrep=picked) == search(
            pattern, {"L": library}, ripgrep=""
        )


def test_a_pattern_that_runs_for_ever_is_stopped_and_the_lines_so_far_stay(library: Path) -> None:
    (library / "AA.lean").write_text("theorem first\n")
    (library / "BB.lean").write_text("a" * 60 + "!\n")
    began = time.monotonic()
    found = search(r"theorem|^(a+)+$", {"L": library}, timeout_s=1.0, ripgrep="")
    assert time.monotonic() - began < 4
    assert found.end == "timeout"
    assert found.lines == ("L/AA.lean:1: theorem first", expected("theorem")[0])


def test_a_ripgrep_that_hangs_is_killed_with_the_search(library: Path) -> None:
    mark = library / "pid"
    body = f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    found = search("x", {"L": library}, timeout_s=1.0, ripgrep=fake_ripgrep(library, body))
    assert found == Found((), "timeout")
    command = Path(f"/proc/{mark.read_text()}/cmdline")
    until = time.monotonic() + 5
    while command.exists() and command.read_bytes():  # empty: a zombie, whose parent is gone
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("(a", "is no regular expression of Python"),
        ("*", "is no regular expression of Python"),
        ("a{99999999999}", "is no regular expression of Python"),
        ("(" * 5000 + ")" * 5000, "is no regular expression of Python"),
    ],
)
def test_a_pattern_that_is_none_is_an_answer(library: Path, pattern: str, error: str) -> None:
    assert search(pattern, {"L": library}).error.startswith(error)


def test_lines_are_limited_in_number_and_length(library: Path) -> None:
    found = search(".", {"L": library}, lines=2, line_chars=20)
    assert found == Found(tuple(line[:20] for line in expected(".")[:2]), "more")
    assert search(".", {"L": library}, path="Order/", lines=9).lines == tuple(
        line for line in expected(".") if "Order/" in line
    )
    assert search("theorem", {"A": library / "Order", "B": library}, path="B/Z").lines == (
        "B/Zeta.lean:3: @[simp] def f (n) := n.succ -- theorem",
    )
