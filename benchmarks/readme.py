"""Copies measured numbers and plots into the README: `python benchmarks/readme.py [runs/demo]`.

Between `<!-- NAME -->` and `<!-- end -->` nothing is typed by hand.
"""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main(demo: Path) -> int:
    """Fill the README's marked parts from a finished demo and the newest benchmark results."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for figure in demo.glob("*.png"):
        shutil.copy(figure, RESULTS / f"demo_{figure.name}")
    summary = json.loads((demo / "summary.json").read_text())
    rows = [(c["claim"], c["seen"], "yes" if c["held"] else "no") for c in summary["checks"]]
    text = fill(text, "demo", table(("claim", "seen", "held"), rows) + f"\n\n{summary['machine']}.")
    blocks = []
    for path in sorted(RESULTS.glob("*.csv")):
        with path.open() as file:
            measured = list(csv.DictReader(file))
        blocks.append(bench(measured))
    if blocks:
        text = fill(text, "bench", "\n\n".join(blocks))
    readme.write_text(text)
    return 0


def bench(rows: list[dict[str, str]]) -> str:
    """A table of one machine's results."""
    first = rows[0]
    cells = [(r["contender"], r["wall_s"], r["cpu_s"], r["peak_mib"]) for r in rows]
    title = f"{first['case']}, {first['shape']}, forward and backward"
    where = f"{first['machine']}, {first['threads']} thread(s), torch {first['torch']}"
    head = ("", "wall s", "CPU s", "peak MiB beyond inputs and gradients")
    return (
        f"{title}:\n\n{table(head, cells)}\n\n{where}; medians of turns, commit {first['commit']}."
    )


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
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "demo")))
