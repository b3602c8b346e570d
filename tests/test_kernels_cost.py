"""The cost model against the numbers it was designed by, and the two commands of the kernels."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import GPU_SHAPES, QWEN3_8B
from fdfast.errors import InputError
from fdfast.kernels import commands, cost

SHAPE = (QWEN3_8B.N, QWEN3_8B.D, QWEN3_8B.V)
GIB = 2**30


@pytest.mark.parametrize(
    ("row", "time_ms"),
    [
        (cost.floor(*SHAPE), 51.0),
        (cost.naive(*SHAPE), 83.0),
        (cost.liger(*SHAPE), 113.0),
        (cost.trl(*SHAPE), 99.0),
        (cost.trl(*SHAPE, jsd=True), 131.0),
        (cost.recompute(*SHAPE), 98.0),
        (cost.chunk(*SHAPE), 73.0),  # 65 to 73, and one more reading of the pair for its divergence
    ],
    ids=lambda value: value.way if isinstance(value, cost.Cost) else None,
)
def test_the_times_on_an_h100_are_those_of_the_design(row: cost.Cost, time_ms: float) -> None:
    assert row.time_ms("h100") == pytest.approx(time_ms, rel=0.05)


def test_the_workspaces_are_those_of_the_design() -> None:
    assert cost.naive(*SHAPE).workspace_bytes / GIB == pytest.approx(21, rel=0.05)
    assert cost.recompute(*SHAPE).workspace_bytes / GIB == pytest.approx(0.43, rel=0.1)
    assert cost.chunk(*SHAPE).workspace_bytes / GIB == pytest.approx(3.5, rel=0.05)


@pytest.mark.parametrize("gpu", cost.TFLOPS)
def test_nothing_beats_the_floor(gpu: str) -> None:
    for shape in GPU_SHAPES:
        least, *others = cost.table(shape.N, shape.D, shape.V)
        assert all(row.time_ms(gpu) > least.time_ms(gpu) for row in others), shape


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    arguments = parser.parse_args(["kernels", *words])
    return int(arguments.run(arguments))


def test_every_line_of_the_model_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--tokens", "8192", "--hidden", "4096", "--vocab", "151936")
    assert run("model", "--gpu", "h100", *size) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len(lines) == 9
    assert all("  modelled" in line for line in lines)
    assert run("model", "--gpu", "b200", *size, "--way", "chunk") == 0
    assert "recompute" not in capsys.readouterr().out
    with pytest.raises(InputError, match="--vocab must be 1 or more; got 0"):
        run("model", "--gpu", "h100", *size[:-1], "0")


ROW: dict[str, Any] = {
    "kernel": "sweep",
    "arch": "sm_90",
    "registers": 168,
    "stack_bytes": 0,
    "local_bytes": 0,
    "spill_instructions": 0,
    "shared_bytes": 128 << 10,
    "shared_limit_bytes": 227 << 10,
    "programs_per_sm": 1,
}


def test_the_summary_counts_what_does_not_fit() -> None:
    rows = [ROW, ROW | {"spill_instructions": 3, "registers": 255}]
    assert commands.summary(rows) == (
        "sm_90: 2 kernels, 1 fit, 1 spill, at most 255 registers and 128 KiB of 227 KiB shared "
        "memory"
    )


def test_a_folder_that_is_not_there_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with pytest.raises(InputError, match="no folder"):
        run("report", "--output", str(tmp_path / "missing"))
