"""Regex search in folders of Lean files, with limits on time and output.

The regular expressions are Python's, and Python decides about every line. Where ripgrep is
installed it first picks the files that can hold a match, by a *weaker* pattern: one that fits every
line that Python's fits, whatever the two think of words, cases and Unicode. So the lines are the
same with and without it, only sooner.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fdfast.errors import MachineError

_SCRIPT = Path(__file__).with_name("_search.py")
_FILE_BYTES = 4 << 20
_BEYOND_ASCII = r"\x{80}-\x{10FFFF}"
# Of a class: what it holds within ASCII, and anything beyond.
_WEAKER_CLASS = {
    "w": f"[0-9A-Za-z_{_BEYOND_ASCII}]",
    "d": f"[0-9{_BEYOND_ASCII}]",
    "s": rf"[\x{{9}}-\x{{D}}\x{{1C}}-\x{{20}}{_BEYOND_ASCII}]",
    **dict.fromkeys("WDS", "."),
    **dict.fromkeys("bBAZ", "(?:)"),
}
_CONTROL = {"t": "\t", "f": "\f", "v": "\v", "a": "\a"}
_TOKEN = re.compile(
    r"""(?P<class>\\[wdsWDSbBAZ])
    | \\x(?P<hex>[0-9a-fA-F]{2}) | \\u(?P<unicode>[0-9a-fA-F]{4})
    | \\(?P<control>[tfva]) | \\(?P<literal>[^\w\s]|[ ])
    | (?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])
    | (?P<group>\((?:\?:|\?>|\?P<\w+>|(?!\?)))
    | (?P<same>[)|.]|[*+?]|\{\d+(?:,\d*)?\}) | (?P<most>\{,\d*\})
    | (?P<nothing>[\^$]) | (?P<other>[^\\(\[])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Found:
    """What a search brought.

    Attributes:
        lines: `LIBRARY/FILE:LINE: TEXT`, in the order of the files.
        end: `all`, `more` (there are more lines than asked for) or `timeout`.
        error: why the pattern cannot be used, "" if it can.
    """

    lines: tuple[str, ...]
    end: str
    error: str = ""


def search(
    pattern: str,
    folders: Mapping[str, Path],
    *,
    ignore_case: bool = False,
    path: str = "",
    lines: int = 50,
    line_chars: int = 300,
    timeout_s: float = 10.0,
    ripgrep: str | None = None,
) -> Found:
    """Find the lines of .lean files that a regular expression fits.

    Args:
        pattern: Python's `re`, for a single line.
        folders: name -> folder; the name stands for the folder in what is shown.
        ignore_case: likewise.
        path: keep files whose shown path holds this text.
        lines: how many to give at most.
        line_chars: longer ones are cut.
        timeout_s: for the whole search; then the lines so far are given.
        ripgrep: the program; None is the one in PATH if there is one, "" none.

    Raises:
        MachineError: the process of the search cannot be run.
    """
    job = {
        "pattern": pattern,
        "weaker": weaker_pattern(pattern, ignore_case=ignore_case) or "",
        "ignore_case": ignore_case,
        "folders": [[name, str(folder)] for name, folder in folders.items()],
        "path": path,
        "lines": lines,
        "line_chars": line_chars,
        "file_bytes": _FILE_BYTES,
        "seconds": timeout_s,
        "ripgrep": (shutil.which("rg") or "") if ripgrep is None else ripgrep,
    }
    stdout, fault = _run(json.dumps(job).encode(), timeout_s)
    # Whole lines only: a process that is killed may leave half of one.
    records = [json.loads(line) for line in stdout.split(b"\n")[:-1]]
    found = tuple(record["line"] for record in records if "line" in record)
    last = records[-1] if records else {}
    if "error" in last:
        return Found(found, "all", last["error"])
    if "end" in last:
        return Found(found, last["end"])
    if fault:
        raise MachineError(f"search: its process {fault}; free memory")
    return Found(found, "timeout")


def _run(job: bytes, timeout_s: float) -> tuple[bytes, str]:
    """What the process wrote until its end or the time's, and how it ended if by itself."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(_SCRIPT)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError(
            f"search: cannot start a process ({error}); free memory or raise `ulimit -u`"
        ) from error
    with process:
        try:
            stdout, stderr = process.communicate(job, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            return process.communicate()[0], ""
        except BaseException:  # KeyboardInterrupt too: nobody else would end the process
            _kill(process)
            raise
    said = stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return stdout, f"ended with status {process.returncode} ({said or 'no word'})"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process and ripgrep below it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def weaker_pattern(pattern: str, *, ignore_case: bool) -> str | None:
    """A pattern for ripgrep that fits every line that Python's fits, and perhaps more.

    None where none is known: look-around, references, flags within the pattern, line breaks.
    """
    if pattern.startswith("(?i)"):
        pattern, ignore_case = pattern[4:], True
    out, position = [], 0
    while position < len(pattern):
        if (match := _TOKEN.match(pattern, position)) is None:
            return None
        weaker = _weaker(match, ignore_case=ignore_case)
        if weaker is None:
            return None
        out.append(weaker)
        position = match.end()
    return "".join(out)


def _weaker(match: re.Match[str], *, ignore_case: bool) -> str | None:
    kind, text = match.lastgroup, match.group()
    if kind == "class":
        return _WEAKER_CLASS[text[1]]
    if kind in ("hex", "unicode"):
        return _letter(chr(int(match[kind], 16)), ignore_case=ignore_case)
    if kind == "control":
        return _letter(_CONTROL[match[kind]], ignore_case=ignore_case)
    if kind in ("literal", "other"):
        return _letter(match[kind], ignore_case=ignore_case)
    if kind == "group":
        return "(" if text == "(" else "(?:"
    if kind == "most":
        return f"{{0{text[1:]}"
    if kind == "nothing":
        return "(?:)"
    if kind == "set":
        return _weaker_set(text[1:-1]) if not ignore_case else "."
    return text


def _letter(letter: str, *, ignore_case: bool) -> str | None:
    """One character; a letter of any case where the case does not count."""
    if letter in "\n\r" or "\ud800" <= letter <= "\udfff":
        return None
    if not ignore_case or (letter.isascii() and not letter.isalpha()):
        return rf"\x{{{ord(letter):X}}}"
    if letter.isascii():
        return f"[{letter.lower()}{letter.upper()}{_BEYOND_ASCII}]"
    return f"[A-Za-z{_BEYOND_ASCII}]"


def _weaker_set(inner: str) -> str:
    """A set of plain characters and ranges as it is; any other as any character."""
    negated = inner.startswith("^")
    plain = re.fullmatch(
        r"(?:[^\\\[\]^&~|\-\r\n])(?:[^\\\[\]&~|\-\r\n]|(?<=[0-9a-zA-Z])-(?=[0-9a-zA-Z]))*",
        inner[negated:],
    )
    if plain is None or not inner[negated:].isprintable():
        return "."
    escaped = re.sub(r"[^-]", lambda match: rf"\x{{{ord(match.group()):X}}}", inner[negated:])
    return f"[{'^' if negated else ''}{escaped}]"
