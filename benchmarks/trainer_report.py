"""The rows of the trainer benchmark: medians over the turns of each contender."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import render
from benchmarks.targets import Row
from benchmarks.trainer_cases import PHASES, versions

# column -> its heading for people; the phases add up to wall_s
COLUMNS = {
    "commit": "",
    "machine": "",
    "threads": "",
    "versions": "",
    "case": "",
    "shape": "",
    "contender": "",
    "turns": "turns",
    "wall_s": "wall s",
    "cpu_s": "CPU s",
    **PHASES,
    "peak_mib": "MiB",
    "rss_mib": "whole MiB",
    "loss_1": "",
    "grad_norm_1": "",
    "targets": "",
    "note": "",
}
MEASURED = ("wall_s", "cpu_s", *PHASES, "loss_1", "grad_norm_1")


def summarize(benchmarks: Sequence[dict[str, Any]], device: str) -> list[Row]:
    """One row a contender of a case; "" where there is no number."""
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for info in (b["extra_info"] for b in benchmarks):
        turns.setdefault((info["case"], info["contender"]), []).append(info)
    about = {
        "commit": render.git_commit(),
        "machine": render.machine(device),
        "versions": versions(),
    }
    return [_row(seen) | about for seen in turns.values()]


def _row(seen: Sequence[dict[str, Any]]) -> Row:
    row = render.median_row(seen, COLUMNS, ("case", "shape", "contender", "note"), MEASURED)
    row["threads"] = seen[0].get("threads", "")
    for name in ("peak_mib", "rss_mib"):
        if numbers := [turn[name] for turn in seen if name in turn]:
            row[name] = round(statistics.median(numbers))
    return row


def results_path(device: str) -> Path:
    """Where the CSV goes."""
    return render.HERE / "results" / f"trainer_{render.file_name(render.machine(device))}.csv"
