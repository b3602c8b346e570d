"""Writes the README's measured numbers, plots and tree: `python -m benchmarks.readme [runs/demo]`.

Between `<!-- NAME -->` and `<!-- end -->` nothing is typed by hand.
"""

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


CODE = re.compile(
    r"\.(py|pyi|cpp|hpp|lean|jsonl)$|^Makefile$|^pyproject.toml$|^constraints(-vllm)?.txt$"
)
# Files that can't say what they are.
SAID = {
    "Makefile": "demo, test, test-slow, test-vllm, lint, bench, gpu: each makes .venv itself",
    "constraints.txt": "the versions that CI and the demo use",
    "constraints-vllm.txt": "the versions that make test-vllm uses",
    "pyproject.toml": "every setting",
    "fdfast/lean/FdBase.lean": "the base library under every embedded proof",
    "fdfast/data/base_theorems.jsonl": "the theorem set, each statement with a proof",
    "fdfast/data/questions.jsonl": "the chat questions of the demo",
    "fdfast/data/templates.jsonl": "statements of the theorem set that are written by hand",
}
WIDTH = 118
# Columns of the benchmarks' CSVs that the README shows, with their headings.
SHOWN_OF_REPLIO = {
    "workers": "workers",
    "turns": "turns",
    "per_s": "a second",
    "cpu_s": "CPU s of 1,000",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "grown_mib": "MiB grown",
}
SHOWN_OF_ROLLOUTS = {
    "turns": "turns",
    "tokens_per_s": "tokens/s",
    "verdicts_per_s": "verdicts/s",
    "wall_s": "wall s",
    "cpu_s": "CPU s",
    "idle_share": "share of waiting for tools",
}
SHOWN_OF_PREFIXES = {
    "wall_s": "wall s",
    "cpu_s": "CPU s",
    "peak_mib": "peak MiB",
    "time_saving": "time saved x",
    "memory_saving": "memory saved x",
    "token_limit": "limit in tokens x",
    "flop_limit": "limit in FLOPs x",
}
SHOWN_OF_STEPS = {
    "turns": "turns",
    "wall_s": "wall s",
    "cpu_s": "CPU s",
    "student_s": "student s",
    "teacher_s": "teacher s",
    "loss_s": "head and loss s",
    "backward_s": "backward s",
    "optimizer_s": "optimizer s",
    "other_s": "other s",
    "peak_mib": "peak MiB of the step",
    "rss_mib": "peak MiB of the process",
}
SHOWN = {
    "turns": "turns",
    "wall_s": "wall s",
    "cpu_s": "CPU s",
    "gflops": "GFLOP/s of the needed GEMMs",
    "peak_mib": "peak MiB beyond inputs and gradients",
    "dhidden_error": "error of dhidden",
    "dweight_error": "error of dweight",
}


def main(demo: Path | None) -> int:
    """Fill the README's marked parts: the tree, the newest benchmark results, a finished demo."""
    readme = ROOT / "README.md"
    text = fill(readme.read_text(), "tree", f"```text\n{tree()}\n```")
    if demo is not None:
        for figure in demo.glob("*.png"):
            shutil.copy(figure, RESULTS / f"demo_{figure.name}")
        summary = json.loads((demo / "summary.json").read_text())
        rows = [(c["claim"], c["seen"], "yes" if c["held"] else "no") for c in summary["checks"]]
        text = fill(
            text, "demo", f"{table(('claim', 'seen', 'held'), rows)}\n\n{summary['machine']}."
        )
    blocks = []
    for path in sorted(RESULTS.glob("*.csv")):
        with path.open() as file:
            results = list(csv.DictReader(file))
        if "targets" in results[0]:  # the kernels' report is a table of its own
            blocks.append(bench(results))
    if blocks:
        text = fill(text, "bench", "\n\n".join(blocks))
    readme.write_text(text)
    return 0


def tree() -> str:
    """Every file of code with the first sentence of what it says of itself."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.splitlines()
    files = [f for f in set(listed) if CODE.search(f) and not f.endswith("__init__.py")]
    files.sort(key=lambda f: ("/" in f, Path(f).parent.as_posix(), f))
    lines: list[str] = []
    folders: set[Path] = set()
    for name in files:
        path = Path(name)
        for folder in [*reversed(path.parents)][1:]:
            if folder not in folders:
                folders.add(folder)
                lines.append(f"{'  ' * (len(folder.parts) - 1)}{folder.name}/")
        entry = f"{'  ' * (len(path.parts) - 1)}{path.name}"
        lines.append(shorten(f"{entry:32}{about(name)}"))
    return "\n".join(lines)


def shorten(line: str) -> str:
    """At most WIDTH characters, cut at a word."""
    return line.rstrip() if len(line) <= WIDTH else f"{line[: WIDTH - 3].rsplit(' ', 1)[0]} ..."


def about(name: str) -> str:
    """The first sentence of a file's docstring or comment."""
    if name in SAID:
        return SAID[name]
    text = (ROOT / name).read_text()
    if name.endswith((".py", ".pyi")):
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(
            r"(?:\w+\n|#.*\n|\s)*(?:/-!?|//)\s*(.*?)(?:-/|\n(?!//))", text, re.DOTALL
        )
        said = comment[1].replace("//", "") if comment else ""
    sentence = re.split(r"(?<=[.;])\s", " ".join(said.split()), maxsplit=1)[0]
    return sentence.rstrip(".:;")


def prefixes(rows: list[dict[str, str]]) -> str:
    """What sharing saves in each case, beside what it could, and the targets."""
    ours = [row for row in rows if row["time_saving"]]
    columns = [c for c in SHOWN_OF_PREFIXES if c in rows[0]]
    cells = [(row["case"], *(row[c] for c in columns)) for row in ours]
    head = ("", *(SHOWN_OF_PREFIXES[c] for c in columns))
    first = rows[0]
    return (
        f"Packs that share prefixes against packs that do not, {first['shape']}; a case is prompt +"
        f" completions x tokens:\n\n{table(head, cells)}\n\nTargets:\n\n{_targets(rows)}\n\n"
        f"{first['machine']}, {first['threads']} thread(s), {first['versions']}; medians of turns, "
        f"commit {first['commit']}."
    )


def _targets(rows: list[dict[str, str]]) -> str:
    """The targets of all rows as a table; "" where there are none."""
    targets = [
        (row["case"], row["contender"], *said.rsplit(": ", 1))
        for row in rows
        for said in row["targets"].split("; ")
        if said
    ]
    return table(("case", "contender", "target", ""), targets) if targets else ""


def bench(rows: list[dict[str, str]]) -> str:
    """A table for each case of one machine's results, and one of its targets."""
    first = rows[0]
    if "token_limit" in first:
        return prefixes(rows)
    computed = "data" in first  # else commands are answered
    shown = SHOWN if computed else SHOWN_OF_REPLIO
    if "tokens_per_s" in first:
        shown = SHOWN_OF_ROLLOUTS
    if "backward_s" in first:
        shown = SHOWN_OF_STEPS
    parts = []
    untimed = [r for r in rows if computed and not r["wall_s"] and r["note"][:6] != "cannot"]
    for case in dict.fromkeys(row["case"] for row in rows if row not in untimed):
        some = [row for row in rows if row["case"] == case]
        columns = [c for c in shown if any(row[c] for row in some)]
        notes = any(row["note"] for row in some)
        cells = [
            (row["contender"], *(row[c] for c in columns), *([row["note"]] if notes else []))
            for row in some
        ]
        head = ("", *(shown[c] for c in columns), *([""] if notes else []))
        said = f"{case}, {some[0]['shape']}"
        if computed:
            said += f", {some[0]['data']} data, forward and backward"
        parts.append(f"{said}:\n\n{table(head, cells)}")
    for measure, heading in SHOWN.items():
        if some := [row for row in untimed if row[measure]]:
            parts.append(f"{heading[0].upper()}{heading[1:]}:\n\n{side_by_side(some, measure)}")
    if targets := _targets(rows):
        said = "Targets, wall and CPU time both" if computed else "Targets"
        parts.append(f"{said}:\n\n{targets}")
    where = f"{first['machine']}, {first['versions']}"
    if "threads" in first:
        where = f"{first['machine']}, {first['threads']} thread(s), {first['versions']}"
    if first.get("driver"):
        where += f", driver {first['driver']}"
    return "\n\n".join(parts) + f"\n\n{where}; medians of turns, commit {first['commit']}."


def side_by_side(rows: list[dict[str, str]], measure: str) -> str:
    """A table of one number: a line a case, a column a contender."""
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(f"{row['case']} ({row['shape']})", {})[row["contender"]] = row[measure]
    cells = [(case, *(seen.get(c, "") for c in contenders)) for case, seen in lines.items()]
    return table(("", *contenders), cells)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(text: str, name: str, content: str) -> str:
    """Put `content` between the README's marks of that name."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no <!-- {name} --> ... <!-- end -->")
    return pattern.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
