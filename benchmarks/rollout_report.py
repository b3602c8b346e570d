"""The rows of the rollout benchmark: medians over the turns of each contender."""

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
OWN = ("case", "shape", "contender", "note")
MEASURED = ("tokens_per_s", "verdicts_per_s", "wall_s", "cpu_s", "idle_share")


def summarize(benchmarks: Sequence[dict[str, Any]], device: str) -> list[Row]:
    """One row a contender of a case; "" where there is no number."""
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for info in (b["extra_info"] for b in benchmarks):
        turns.setdefault((info["case"], info["contender"]), []).append(info)
    about = {"commit": render.git_commit(), "machine": render.machine(device)}
    return [
        render.median_row(seen, COLUMNS, OWN, MEASURED) | about | {"versions": versions()}
        for seen in turns.values()
    ]


def results_path(device: str) -> Path:
    """Where the CSV goes."""
    return render.HERE / "results" / f"rollout_{render.file_name(render.machine(device))}.csv"
