"""`make bench`: runs the cases of this folder, prints tables for people and last one line of JSON.

Nothing is printed of a run in which the small cases of the tests, or of the contenders, are wrong.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import render
from benchmarks.cases import DEVICES
from benchmarks.data import make_inputs
from benchmarks.shapes import SMOLLM2_135M
from benchmarks.targets import Row, Verdict, evaluate
from fdfast.errors import MachineError

ROOT = Path(__file__).parent.parent
# The small cases that decide whether there is anything to measure: seconds.
TESTS = {"cpu": "tests/test_policy_head.py", "cuda": "tests/test_kernels_policy_head.py"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, render, save the CSV (not of a quick run).

    Returns:
        0; 1 where a case is wrong; 2 where the machine lacks something.
    """
    args = _parser().parse_args(argv)
    try:
        _check_machine(args.device)
    except MachineError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    small = [sys.executable, "-m", "pytest", TESTS[args.device], "-q", "-x", "-k", "right"]
    if subprocess.run(small, check=False, stdout=sys.stderr, cwd=ROOT).returncode:
        print("bench: small cases are wrong (above), so nothing was measured", file=sys.stderr)
        return 1
    rows = _measure(args.device, quick=args.quick)
    if rows is None:
        print("bench: a case failed (above), so no number is shown", file=sys.stderr)
        return 1
    verdicts = evaluate(rows) if args.device == "cpu" else []
    render.add_targets(rows, verdicts)
    if not args.quick:
        save(rows, render.results_path(args.device))
    report(rows, verdicts)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="few tokens, one turn, no CSV: to try the benchmark"
    )
    return parser


def _check_machine(device: str) -> None:
    """The GPU, or the model whose hidden states the CPU's cases take (made on first use).

    Raises:
        MachineError: it is not there.
    """
    if device == "cpu":
        make_inputs(SMOLLM2_135M)
    elif not torch.cuda.is_available():
        raise MachineError("--device cuda wants a CUDA GPU, and torch sees none; take cpu")


def _measure(device: str, *, quick: bool) -> list[Row] | None:
    """Rows of a whole run; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-x", f"--device={device}"]
        command += ["-p", "no:xdist", "--benchmark-disable-gc", "--benchmark-columns=median"]
        command += [f"--benchmark-json={data}", *(["--quick"] if quick else [])]
        if subprocess.run(command, check=False, stdout=sys.stderr, cwd=ROOT).returncode:
            return None
        return render.summarize(json.loads(data.read_text())["benchmarks"], device)


def save(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(render.COLUMNS))
        writer.writeheader()
        writer.writerows(rows)


def report(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Tables, and last the JSON document."""
    print(render.table(rows))
    if verdicts:
        print(render.target_table(verdicts))
    targets = [asdict(v.target) | {"measured": v.measured, "outcome": v.outcome} for v in verdicts]
    print(json.dumps({"rows": rows, "targets": targets}))


if __name__ == "__main__":
    sys.exit(main())
