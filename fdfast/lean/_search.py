"""The process that searches: a regular expression can run for ever, so it runs where it can be
killed. It reads one job (JSON) and writes one JSON object a line; see `search`.

It imports nothing of fdfast: `python -I -S` starts it in 15 ms.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator

_MEMORY_BYTES = 1 << 30


def lean_files(folder: str) -> Iterator[str]:
    """The .lean files below a folder, in order; hidden ones and links are passed over."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from lean_files(entry.path)
        elif entry.name.endswith(".lean") and entry.is_file(follow_symlinks=False):
            yield entry.path


def candidates(ripgrep: str, pattern: str, folder: str) -> set[str] | None:
    """The files with a line that fits the weaker pattern; None: ripgrep cannot say."""
    if not ripgrep or not pattern:
        return None
    command = [ripgrep, "--no-config", "--no-ignore", "--no-messages", "--files-with-matches"]
    command += ["--null", "--text", "--encoding", "none", "--glob", "*.lean", "--regexp", pattern]
    done = subprocess.run(
        [*command, "--", folder],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    if done.returncode not in (0, 1):
        return None
    return {os.fsdecode(path) for path in done.stdout.split(b"\0")}


def lines(path: str, file_bytes: int) -> Iterator[tuple[int, str]]:
    """A file's lines with their numbers; none where it is too large or no UTF-8."""
    try:
        with open(path, "rb") as file:
            data = file.read(file_bytes + 1)
        text = data.decode() if len(data) <= file_bytes else ""
    except (OSError, UnicodeDecodeError):
        return
    for number, line in enumerate(text.split("\n"), 1):
        yield number, line.removesuffix("\r")


def matches(job: dict, expression: re.Pattern[str]) -> Iterator[str]:  # type: ignore[type-arg]
    """`LIBRARY/FILE:LINE: TEXT` for each line that fits, file by file."""
    for name, folder in job["folders"]:
        possible = candidates(job["ripgrep"], job["weaker"], folder)
        for path in lean_files(folder):
            shown = f"{name}/{os.path.relpath(path, folder)}"
            if job["path"] not in shown or (possible is not None and path not in possible):
                continue
            for number, line in lines(path, job["file_bytes"]):
                if expression.search(line):
                    yield f"{shown}:{number}: {line.strip()}"


def main() -> None:
    """Search, and say at the end how far it went."""
    job = json.load(sys.stdin)
    # If whoever started us is gone. The signal's own action needs no Python, so it comes even in
    # the midst of a match.
    signal.alarm(int(job["seconds"]) + 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    count = 0
    try:
        expression = re.compile(job["pattern"], re.IGNORECASE if job["ignore_case"] else 0)
        for found in matches(job, expression):
            if count == job["lines"]:
                print(json.dumps({"end": "more"}), flush=True)
                return
            count += 1
            print(json.dumps({"line": found[: job["line_chars"]]}), flush=True)
    except (re.error, OverflowError, RecursionError) as error:
        print(json.dumps({"error": f"is no regular expression of Python ({error})"}), flush=True)
    except MemoryError:
        print(json.dumps({"error": "needs too much memory"}), flush=True)
    else:
        print(json.dumps({"end": "all"}), flush=True)


if __name__ == "__main__":
    main()
