"""Results as rows of a CSV and as tables for people."""

import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.cases import UNITS
from benchmarks.measure import nvidia_smi
from benchmarks.targets import Row, Verdict

HERE = Path(__file__).parent
# column -> its heading for people; the first columns are the same in every row of a table
COLUMNS = {
    "commit": "",
    "machine": "",
    "threads": "",
    "versions": "",
    "driver": "",
    "data": "",
    "case": "",
    "shape": "",
    "backend": "",
    "contender": "",
    "turns": "turns",
    "wall_s": "wall s",
    "wall_p20_s": "p20",
    "wall_p80_s": "p80",
    "cpu_s": "CPU s",
    "gflops": "GFLOP/s",
    "clock_mhz": "MHz",
    "peak_mib": "MiB",
    "dhidden_error": "dhidden",
    "dweight_error": "dweight",
    "targets": "",
    "note": "",
}


def summarize(benchmarks: Sequence[dict[str, Any]], device: str) -> list[Row]:
    """One row a contender of a case: medians over its turns; "" where there is no number."""
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for info in (b["extra_info"] for b in benchmarks):
        turns.setdefault((info["case"], info["contender"]), []).append(info)
    about = provenance(device)
    return [_row(seen) | about for seen in turns.values()]


def provenance(device: str) -> Row:
    """What was measured, where and with what."""
    found = {"torch": version("torch")} | peers.versions()
    return {
        "commit": git_commit(),
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
        "driver": nvidia_smi("driver_version") if device == "cuda" else "",
    }


def _row(seen: Sequence[dict[str, Any]]) -> Row:
    first = seen[0]
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {c: first[c] for c in ("data", "case", "shape", "backend", "contender")}
    row["note"] = first.get("note", "")
    wall = sorted(s["wall_s"] for s in seen if "wall_s" in s)
    if wall:
        fifths = statistics.quantiles(wall, n=5) if len(wall) > 1 else wall * 4
        median = statistics.median(wall)
        row |= {"turns": len(wall), "wall_s": number(median)}
        row |= {"wall_p20_s": number(fifths[0]), "wall_p80_s": number(fifths[3])}
        row["cpu_s"] = number(statistics.median(s["cpu_s"] for s in seen if "cpu_s" in s))
        row["gflops"] = round(needed_flops(first["case"], first["shape"]) / median / 1e9)
    if "clock_mhz" in first:
        row["clock_mhz"] = round(statistics.median(s["clock_mhz"] for s in seen))
    if "peak_mib" in first:
        row["peak_mib"] = round(first["peak_mib"])
    for name in ("dhidden_error", "dweight_error"):
        if name in first:
            row[name] = f"{first[name]:.1e}"
    return row


def median_row(
    seen: Sequence[Mapping[str, Any]],
    columns: Iterable[str],
    own: Sequence[str],
    measured: Sequence[str],
) -> Row:
    """A row of medians over the turns of one contender; "" where there is no number.

    Args:
        seen: the turns.
        columns: of the row.
        own: those that are the same in every turn.
        measured: those with numbers.
    """
    row: Row = dict.fromkeys(columns, "")
    row |= {name: seen[0][name] for name in own}
    row["turns"] = sum("wall_s" in turn for turn in seen) or ""
    for name in measured:
        if numbers := [turn[name] for turn in seen if name in turn]:
            row[name] = number(statistics.median(numbers))
    return row


def number(measured: float) -> float:
    """Four digits of it."""
    return float(f"{measured:.4g}")


def needed_flops(case: str, shape: str) -> float:
    """Operations of the GEMMs that any exact loss needs, 2NDV a unit: what it gets done a second
    is counted in these, whatever it computes on the way.
    """
    N, D, V = (int(size) for size in shape.rsplit(": ", 1)[1].split(" x "))
    return UNITS[case.split(",", maxsplit=1)[0]] * 2.0 * N * D * V


def add_targets(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Write the column `targets` of the rows they are about."""
    for row in rows:
        row["targets"] = "; ".join(
            str(v)
            for v in verdicts
            if (v.target.case, v.target.contender) == (row["case"], row["contender"])
        )


def table(rows: Sequence[Row], headings: Mapping[str, str] = COLUMNS) -> str:
    """The rows as text, a block for each case without the columns that are empty there.

    Args:
        rows: all of the same columns.
        headings: column -> what is above it, "" for those that are not shown.
    """
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        some = [row for row in rows if row["case"] == case]
        columns = [c for c, said in headings.items() if said and any(row[c] != "" for row in some)]
        data = f", {some[0]['data']} data" if "data" in some[0] else ""
        lines += ["", f"{case}: {some[0]['shape']}{data}"]
        lines.append(" " * 40 + "".join(f"{headings[c]:>10}" for c in columns))
        for row in some:
            cells = "".join(f"{row[c]:>10}" for c in columns)
            lines.append(f"{row['contender']:40}{cells}  {row['note']}".rstrip())
    return "\n".join(lines)


def target_table(verdicts: Sequence[Verdict]) -> str:
    """The targets as text, a line each."""
    lines = ["", "targets"]
    for verdict in verdicts:
        target = verdict.target
        lines.append(f"{target.case + ': ' + target.contender:64} {verdict}")
    return "\n".join(lines)


def results_path(device: str) -> Path:
    """Where the CSV goes: a GPU has a file of its own name."""
    name = file_name(machine(device))
    return HERE / "results" / (f"{name}.csv" if device == "cuda" else f"policy_head_{name}.csv")


def file_name(machine_name: str) -> str:
    """The machine's name as a part of a file's."""
    return machine_name.replace(" ", "_").lower()


def machine(device: str) -> str:
    """The processor's or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def git_commit() -> str:
    """The commit that was measured; `+changes` where files differ from it."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+changes"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=HERE)
    return done.stdout.strip() or "unknown"
