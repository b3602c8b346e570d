"""The rows of the REPL benchmark: medians over the turns of each contender."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import render, replio_peers
from benchmarks.targets import Row

# column -> its heading for people; wall and CPU seconds are those of a thousand commands
COLUMNS = {
    "commit": "",
    "machine": "",
    "versions": "",
    "case": "",
    "shape": "",
    "contender": "",
    "workers": "workers",
    "turns": "turns",
    "per_s": "a second",
    "wall_s": "wall s/1k",
    "cpu_s": "CPU s/1k",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "grown_mib": "grown MiB",
    "targets": "",
    "note": "",
}
OWN = ("case", "shape", "contender", "workers", "note")
MEASURED = ("per_s", "wall_s", "cpu_s", "p50_us", "p99_us", "grown_mib")


def summarize(benchmarks: Sequence[dict[str, Any]], device: str) -> list[Row]:
    """One row a contender of a case; "" where there is no number."""
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for info in (b["extra_info"] for b in benchmarks):
        if "case" in info:
            turns.setdefault((info["case"], info["contender"]), []).append(info)
    versions = ", ".join(f"{name} {number}" for name, number in replio_peers.versions().items())
    about = {"commit": render.git_commit(), "machine": render.machine(device), "versions": versions}
    return [render.median_row(seen, COLUMNS, OWN, MEASURED) | about for seen in turns.values()]


def results_path(device: str) -> Path:
    """Where the CSV goes."""
    return render.HERE / "results" / f"replio_{render.file_name(render.machine(device))}.csv"
