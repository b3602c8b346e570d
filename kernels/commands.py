"""`fdfast kernels report` and `fdfast kernels model`.

Nothing here imports Triton: the report compiles in a process of its own, where TRITON_INTERPRET is
not set, and the model is arithmetic.
"""

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fdfast.errors import InputError, MachineError
from fdfast.kernels import cost

ARCHITECTURES = ("80", "90", "100")
DTYPES = ("bfloat16", "float16", "float32")
# Column of the table -> width; the file has every column.
_SHOWN = {
    "kernel": 34,
    "tile": 12,
    "registers": 9,
    "spill_instructions": 6,
    "shared_kib": 10,
    "programs_per_sm": 11,
    "occupancy": 9,
    "tensor_core": 11,
    "exp2": 5,
    "instructions": 12,
}
_HEADINGS = {"spill_instructions": "spills", "programs_per_sm": "programs/SM"}

_REPORT = """Compile every kernel ahead of time, without a GPU, and print what each costs.

registers are a thread's, spills the instructions that move registers to local memory, programs/SM
and occupancy what fits a multiprocessor, tensor_core the tensor-core instructions in the program's
text. Takes minutes the first time; Triton keeps what it compiled."""

_MODEL = """Operations, bytes, workspace and time of a student-teacher loss, forward and backward
with a trained head in bfloat16, for fdfast and its peers. Arithmetic from counts explained in
kernels/cost.py: every number is modelled, none measured."""


def register(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add `kernels report` and `kernels model`; each sets `run`, which returns the exit status."""
    kernels = subparsers.add_parser("kernels", help="what the GPU kernels cost, without a GPU")
    commands = kernels.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="registers, spills, shared memory and instructions of every kernel",
        description=_REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("--arch", choices=ARCHITECTURES, default="90", help="sm_ARCH (90)")
    report.add_argument("--dtype", choices=DTYPES, help="of the inputs (all three)")
    report.add_argument(
        "--output",
        type=Path,
        nargs="?",
        const=Path("benchmarks/results"),
        metavar="FOLDER",
        help="write kernels_<arch>.csv there (benchmarks/results)",
    )
    report.set_defaults(run=_report)
    model = commands.add_parser(
        "model",
        help="modelled time and workspace on a GPU, beside the peers",
        description=_MODEL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model.add_argument("--gpu", choices=sorted(cost.TFLOPS), required=True)
    model.add_argument("--tokens", type=int, required=True, metavar="N")
    model.add_argument("--hidden", type=int, required=True, metavar="D")
    model.add_argument("--vocab", type=int, required=True, metavar="V")
    model.add_argument("--way", choices=cost.WAYS, help="of fdfast's two (both)")
    model.set_defaults(run=_model)


def _report(arguments: argparse.Namespace) -> int:
    """Print the table and its summary; exit status 1 when a kernel does not fit."""
    if importlib.util.find_spec("triton") is None:
        raise MachineError("kernels report: triton is not installed; run `pip install triton`")
    if arguments.output is not None and not arguments.output.is_dir():
        raise InputError(f"kernels report: --output: no folder {arguments.output}")
    wanted = [arguments.arch, *([arguments.dtype] if arguments.dtype else [])]
    print(" ".join(f"{_HEADINGS.get(name, name):<{w}}" for name, w in _SHOWN.items()).rstrip())
    rows = []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fdfast.kernels.report", *wanted]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                print(_line(rows[-1]), flush=True)
    if process.returncode != 0:
        raise MachineError(f"kernels report: compiling failed (status {process.returncode})")
    if arguments.output is not None:
        path = arguments.output / f"kernels_{arguments.arch}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {path}")
    print(summary(rows))
    return 0 if all(fits(row) for row in rows) else 1


def fits(row: dict[str, Any]) -> bool:
    """No spills, no local memory, shared memory within the chip's limit."""
    local = row["spill_instructions"] + row["stack_bytes"] + row["local_bytes"]
    shared_fits = bool(row["shared_bytes"] <= row["shared_limit_bytes"])
    return local == 0 and shared_fits and bool(row["programs_per_sm"] >= 1)


def summary(rows: list[dict[str, Any]]) -> str:
    """One line over the table."""
    spilling = sum(row["spill_instructions"] > 0 for row in rows)
    return (
        f"{rows[0]['arch']}: {len(rows)} kernels, {sum(map(fits, rows))} fit, {spilling} spill, at "
        f"most {max(row['registers'] for row in rows)} registers and "
        f"{max(row['shared_bytes'] for row in rows) / 1024:.0f} KiB of "
        f"{rows[0]['shared_limit_bytes'] / 1024:.0f} KiB shared memory"
    )


def _line(row: dict[str, Any]) -> str:
    shown = row | {
        "shared_kib": f"{row['shared_bytes'] / 1024:.1f}",
        "occupancy": f"{row['occupancy']:.2f}",
        "tensor_core": row["mma"] + row["wgmma"] + row["tcgen05"],
    }
    return " ".join(f"{shown[name]!s:<{width}}" for name, width in _SHOWN.items()).rstrip()


def _model(arguments: argparse.Namespace) -> int:
    """Print the model's table, each line marked."""
    shape = (arguments.tokens, arguments.hidden, arguments.vocab)
    for name, value in zip(("--tokens", "--hidden", "--vocab"), shape, strict=True):
        if value < 1:
            raise InputError(f"kernels model: {name} must be 1 or more; got {value}")
    gpu = arguments.gpu
    print(
        f"{gpu}: {cost.TFLOPS[gpu]:.0f} TFLOP/s bfloat16, of which library GEMMs are assumed to "
        f"hold {cost.LIBRARY_SHARE:.0%}\nand ours {cost.TRITON_SHARE:.0%} of that; "
        f"{cost.BANDWIDTH_TB[gpu]:g} TB/s. N={shape[0]}, D={shape[1]}, V={shape[2]}"
    )
    print(f"{'':<36}{'TFLOP':>8}{'GB moved':>10}{'workspace GiB':>15}{'ms':>9}")
    for row in cost.table(*shape, way=arguments.way):
        print(
            f"{row.way:<36}{row.flops / 1e12:>8.1f}{row.traffic_bytes / 1e9:>10.1f}"
            f"{row.workspace_bytes / 2**30:>15.2f}{row.time_ms(gpu):>9.1f}  modelled"
            + (f"; {row.note}" if row.note else "")
        )
    return 0
