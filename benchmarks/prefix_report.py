"""The rows of the prefix benchmark: medians, and how far from its limit each saving is."""

import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import render
from benchmarks.prefix_cases import APART, GRID, GRID_MEAN, LAYERS, OURS, PASSES, Case
from benchmarks.targets import Row

SHAPE = f"{LAYERS} layers of SmolLM2-135M, float32"
# column -> its heading for people; savings are against packs in which nothing is shared
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
    "peak_mib": "MiB",
    "time_saving": "time x",
    "memory_saving": "memory x",
    "token_limit": "tokens x",
    "flop_limit": "FLOPs x",
    "time_over_limit": "over",
    "memory_over_limit": "mem over",
    "targets": "",
    "note": "",
}


def summarize(benchmarks: Sequence[dict[str, Any]], device: str) -> list[Row]:
    """One row a contender of a case, and the means over the grid."""
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    peaks: dict[tuple[str, str], float] = {}
    for info in (b["extra_info"] for b in benchmarks):
        if "wall_s" in info:
            turns.setdefault((info["case"], info["contender"]), []).append(info)
        for peak in info.get("peaks", ()):
            peaks[peak["case"], peak["contender"]] = peak["peak_mib"]
    about = {
        "commit": render.git_commit(),
        "machine": render.machine(device),
        "threads": torch.get_num_threads(),
        "versions": f"torch {version('torch')}, transformers {version('transformers')}",
    }
    rows = {key: _row(key, seen, peaks[key]) for key, seen in turns.items()}
    for (case, contender), row in rows.items():
        if contender == OURS:
            _savings(row, rows[case, APART])
    means = [_mean(name, rows) for name in PASSES if (Case(name, *GRID[-1]).name, OURS) in rows]
    return [row | about for row in (*rows.values(), *means)]


def _row(key: tuple[str, str], seen: Sequence[dict[str, Any]], peak_mib: float) -> Row:
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {"case": key[0], "contender": key[1], "shape": SHAPE, "turns": len(seen)}
    for name in ("wall_s", "cpu_s"):
        row[name] = render.number(statistics.median(turn[name] for turn in seen))
    row["peak_mib"] = round(peak_mib, 1)
    for name in ("token_limit", "flop_limit"):
        row[name] = render.number(seen[0][name]) if key[1] == OURS else ""
    return row


def _savings(ours: Row, apart: Row) -> None:
    """Against the limit in tokens; in time the worse of wall and CPU seconds counts."""
    time = min(apart[name] / ours[name] for name in ("wall_s", "cpu_s"))
    memory = apart["peak_mib"] / ours["peak_mib"]
    ours["time_saving"], ours["memory_saving"] = render.number(time), render.number(memory)
    ours["time_over_limit"] = render.number(ours["token_limit"] / time)
    ours["memory_over_limit"] = render.number(ours["token_limit"] / memory)


def _mean(pass_name: str, rows: dict[tuple[str, str], Row]) -> Row:
    grid = [rows[Case(pass_name, *group).name, OURS] for group in GRID]
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {"case": f"{GRID_MEAN}, {pass_name}", "contender": OURS, "shape": SHAPE}
    for name in ("time_saving", "memory_saving", "token_limit", "flop_limit"):
        row[name] = render.number(statistics.geometric_mean(r[name] for r in grid))
    for name in ("time_over_limit", "memory_over_limit"):
        row[name] = render.number(statistics.geometric_mean(r[name] for r in grid))
    return row


def results_path(device: str) -> Path:
    """Where the CSV goes."""
    return render.HERE / "results" / f"prefix_{render.file_name(render.machine(device))}.csv"
