"""`make bench`: runs the suites of this folder, prints tables for people and last one line of JSON.

Nothing is printed of a suite in which the small cases of the tests, or of the contenders, are
wrong.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    prefix_cases,
    prefix_report,
    render,
    replio_cases,
    replio_report,
    rollout_cases,
    rollout_report,
    trainer_cases,
    trainer_report,
)
from benchmarks.cases import DEVICES
from benchmarks.data import make_inputs
from benchmarks.shapes import SMOLLM2_135M
from benchmarks.targets import TARGETS, Row, Target, Verdict, evaluate
from fdfast.errors import MachineError

ROOT = Path(__file__).parent.parent
# The small cases that decide whether there is anything to measure: seconds.
TESTS = {"cpu": "tests/test_policy_head.py", "cuda": "tests/test_kernels_policy_head.py"}
Measured = Sequence[dict[str, Any]]  # pytest-benchmark's records
Result = tuple[list[Row], list[Verdict], Mapping[str, str]]  # the last: headings of the rows


@dataclass(frozen=True)
class Suite:
    """One bench_*.py.

    Attributes:
        file: its path.
        devices: where it runs.
        check_machine: raises MachineError where the device lacks something.
        tests: device -> the tests that have to pass first; its own small cases come after them.
        summarize: its records and the device -> rows.
        targets: what the rows on the CPU are held against.
        headings: column -> heading, "" for those that are not shown.
        results_path: the CSV of a device.
    """

    file: str
    devices: Sequence[str]
    check_machine: Callable[[str], None]
    tests: Mapping[str, str]
    summarize: Callable[[Measured, str], list[Row]]
    targets: Sequence[Target]
    headings: Mapping[str, str]
    results_path: Callable[[str], Path]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, render, save the CSVs (not of a quick run).

    Returns:
        0; 1 where a case is wrong; 2 where the machine lacks something.
    """
    args = _parser().parse_args(argv)
    wanted = [args.only] if args.only else list(SUITES)
    chosen = [SUITES[name] for name in wanted if args.device in SUITES[name].devices]
    if not chosen:
        print(f"bench: {args.only} has nothing to run on {args.device}", file=sys.stderr)
        return 2
    results: list[Result] = []
    status = 0
    for suite in chosen:
        failed, rows, verdicts = _run(suite, args.device, quick=args.quick)
        status = status or failed
        if rows:
            results.append((rows, verdicts, suite.headings))
    if results:
        report(results)
    return status


def _run(suite: Suite, device: str, *, quick: bool) -> tuple[int, list[Row], list[Verdict]]:
    """The exit status of one suite, and what it found out if that is 0."""
    try:
        suite.check_machine(device)
    except MachineError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2, [], []
    if device in suite.tests:
        small = [sys.executable, "-m", "pytest", suite.tests[device], "-q", "-x", "-k", "right"]
        if subprocess.run(small, check=False, stdout=sys.stderr, cwd=ROOT).returncode:
            print("bench: small cases are wrong (above), so nothing was measured", file=sys.stderr)
            return 1, [], []
    measured = _measure(suite.file, device, quick=quick)
    if measured is None:
        print("bench: a case failed (above), so no number is shown", file=sys.stderr)
        return 1, [], []
    rows = suite.summarize(measured, device)
    verdicts = evaluate(rows, suite.targets) if device == "cpu" else []
    render.add_targets(rows, verdicts)
    if not quick:
        save(rows, suite.results_path(device))
    return 0, rows, verdicts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--only", choices=list(SUITES), help="one suite; without it, all")
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


def _measure(file: str, device: str, *, quick: bool) -> Measured | None:
    """The records of a whole run; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", file, "-q", "-x", f"--device={device}"]
        command += ["-p", "no:xdist", "--benchmark-disable-gc", "--benchmark-columns=median"]
        command += [f"--benchmark-json={data}", *(["--quick"] if quick else [])]
        if subprocess.run(command, check=False, stdout=sys.stderr, cwd=ROOT).returncode:
            return None
        found: Measured = json.loads(data.read_text())["benchmarks"]
        return found


def save(rows: Sequence[Row], path: Path) -> None:
    """The rows, all of the same columns, as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def report(results: Sequence[Result]) -> None:
    """Tables, and last the JSON document."""
    for rows, verdicts, headings in results:
        print(render.table(rows, headings))
        if verdicts:
            print(render.target_table(verdicts))
    targets = [
        asdict(v.target) | {"measured": v.measured, "outcome": v.outcome}
        for _, verdicts, _ in results
        for v in verdicts
    ]
    print(json.dumps({"rows": [row for rows, _, _ in results for row in rows], "targets": targets}))


SUITES = {
    "policy_head": Suite(
        file="benchmarks/bench_policy_head.py",
        devices=DEVICES,
        check_machine=_check_machine,
        tests=TESTS,
        summarize=render.summarize,
        targets=TARGETS,
        headings=render.COLUMNS,
        results_path=render.results_path,
    ),
    "prefix_attention": Suite(
        file="benchmarks/bench_prefix_attention.py",
        devices=("cpu",),
        check_machine=lambda device: None,
        tests={},
        summarize=prefix_report.summarize,
        targets=prefix_cases.TARGETS,
        headings=prefix_report.COLUMNS,
        results_path=prefix_report.results_path,
    ),
    "rollout": Suite(
        file="benchmarks/bench_rollout.py",
        devices=("cpu",),
        check_machine=lambda device: None,
        tests={},
        summarize=rollout_report.summarize,
        targets=rollout_cases.TARGETS,
        headings=rollout_report.COLUMNS,
        results_path=rollout_report.results_path,
    ),
    "trainer": Suite(
        file="benchmarks/bench_trainer.py",
        devices=("cpu",),
        check_machine=lambda device: None,
        tests={"cpu": "tests/test_benchmarks_trainer.py"},
        summarize=trainer_report.summarize,
        targets=trainer_cases.TARGETS,
        headings=trainer_report.COLUMNS,
        results_path=trainer_report.results_path,
    ),
    "replio": Suite(
        file="benchmarks/bench_replio.py",
        devices=("cpu",),
        check_machine=lambda device: None,
        tests={},
        summarize=replio_report.summarize,
        targets=replio_cases.TARGETS,
        headings=replio_report.COLUMNS,
        results_path=replio_report.results_path,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
