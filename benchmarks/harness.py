"""`make bench`: runs the cases of this folder, prints a table for people and last one line of
JSON.
"""

import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
COLUMNS = (
    "commit",
    "machine",
    "threads",
    "torch",
    "case",
    "shape",
    "contender",
    "wall_s",
    "wall_p20_s",
)
COLUMNS += ("wall_p80_s", "cpu_s", "peak_mib", "dhidden_error", "dweight_error")


def main() -> int:
    """Run, render, save benchmarks/results/<machine>.csv."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q", "--benchmark-disable-gc"]
        command += [
            "-o",
            "python_files=bench_*.py",
            "-o",
            "python_functions=bench_*",
            "-p",
            "no:xdist",
        ]
        command += [
            f"--benchmark-json={data}",
            "--timeout=3000",
            "-x",
            "-W",
            "ignore",
            "--benchmark-columns=median",
        ]
        done = subprocess.run(command, check=False, stdout=sys.stderr)
        if done.returncode:
            return done.returncode
        rows = summarize(json.loads(data.read_text())["benchmarks"])
    where = HERE / "results" / f"policy_head_{machine().replace(' ', '_').lower()}.csv"
    with where.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    print(json.dumps(rows))
    return 0


def summarize(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a contender: medians over its turns."""
    turns: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for b in benchmarks:
        info = b["extra_info"]
        key = (info["case"], info["shape"], info["contender"])
        turns.setdefault(key, []).append(info | {"wall_s": b["stats"]["median"]})
    rows = []
    for (case, shape, contender), seen in turns.items():
        wall = sorted(s["wall_s"] for s in seen)
        fifths = statistics.quantiles(wall, n=5) if len(wall) > 1 else wall * 4
        once = next((s for s in seen if "peak_mib" in s), {})
        rows.append(
            {
                "commit": git_commit(),
                "machine": machine(),
                "threads": torch.get_num_threads(),
                "torch": version("torch"),
                "case": case,
                "shape": shape,
                "contender": contender,
                "wall_s": round(statistics.median(wall), 3),
                "wall_p20_s": round(fifths[0], 3),
                "wall_p80_s": round(fifths[3], 3),
                "cpu_s": round(statistics.median(s["cpu_s"] for s in seen), 3),
                "peak_mib": round(once["peak_mib"]) if once else "",
                "dhidden_error": f"{once['dhidden_error']:.1e}" if once else "",
                "dweight_error": f"{once['dweight_error']:.1e}" if once else "",
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, a block for each case."""
    lines: list[str] = []
    for row in rows:
        title = f"{row['case']}, {row['shape']}"
        if title not in lines:
            lines += ["", title]
            lines.append(
                f"{'':32}{'wall s':>8}{'CPU s':>8}{'MiB':>7}{'dhidden':>10}{'dweight':>10}"
            )
        lines.append(
            f"{row['contender']:32}{row['wall_s']:>8}{row['cpu_s']:>8}{row['peak_mib']:>7}"
            f"{row['dhidden_error']:>10}{row['dweight_error']:>10}"
        )
    return "\n".join(lines)


def machine() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def git_commit() -> str:
    """The commit that was measured."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False,
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
