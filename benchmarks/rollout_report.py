"""The rows of the rollout benchmark: medians over the turns of each contender."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import render
from benchmarks.rollout_cases import versions
from benchmarks.targets import Row

# column -> its heading for people
COLUMNS = {
    "commit": "",
    "machine": "",
    "versions": "",
    "case": "",
    "shape": "",
    "contender": "",
    "turns": "turns",
    "tokens_per_s": "tokens/s",
    "verdicts_per_s": "verdicts/s",
    "wall_s": "wall s",
    "cpu_s": "CPU s",
    "idle_share": "waits",
    "targets": "",
    "note": "",
}
MEASURED = ("tokens_per_s", "verdicts_per_s", "wall_s", "cpu_s", "idle_share")


def summarize(benchmarks: Sequence[dict[str, Any]], device: str) -> list[Row]:
    """One row a contender of a case; "" where there is no number."""
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for info in (b["extra_info"] for b in benchmarks):
        turns.setdefault((info["case"], info["contender"]), []).append(info)
    about = {"commit": render.git_commit(), "machine": render.machine(device)}
    return [_row(seen) | about | {"versions": versions()} for seen in turns.values()]


def _row(seen: Sequence[dict[str, Any]]) -> Row:
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {c: seen[0][c] for c in ("case", "shape", "contender", "note")}
    row["turns"] = sum("wall_s" in turn for turn in seen) or ""
    for name in MEASURED:
        numbers = [turn[name] for turn in seen if name in turn]
        if numbers:
            row[name] = render.number(statistics.median(numbers))
    return row


def results_path(device: str) -> Path:
    """Where the CSV goes."""
    return render.HERE / "results" / f"rollout_{render.file_name(render.machine(device))}.csv"
