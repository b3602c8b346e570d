"""Every kernel compiled ahead of time for sm_80, sm_90 and sm_100: fit for the machine without one.

The interpreter replaces Triton's compiler in its process, so the compiling is done in another.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fdfast.kernels import tiles

ROOT = Path(__file__).parent.parent
CAPABILITIES = (80, 90, 100)
DTYPES = ("bfloat16", "float16", "float32")


@functools.cache
def report(capability: int, *cases: str) -> list[dict[str, Any]]:
    """Rows of fdfast.kernels.report from a process where TRITON_INTERPRET is not set."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fdfast.kernels.report", str(capability), *cases],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def assert_fit(capability: int, *cases: str) -> None:
    rows = report(capability, *cases)
    assert len(rows) > 10
    for row in rows:
        assert row["spill_instructions"] == 0, row
        assert row["stack_bytes"] == row["local_bytes"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit_bytes"], row
        assert row["programs_per_sm"] >= 1, row
        assert row["atomics"] == 0, row
        if not row["gemm"]:
            continue
        assert row["async_copies_16B"] + row["bulk_copies"] > 0, row
        if "float32" in row["kernel"]:
            assert row["ffma"] > 0, row
            assert row["wgmma"] == row["mma"] == row["tcgen05"] == 0, row
        else:
            assert row[{80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]] > 0, row


def test_every_kernel_fits_an_h100() -> None:
    assert_fit(90, "bfloat16", "plain")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_specialisation_with_every_tile_fits_its_machine(capability: int, dtype: str) -> None:
    assert_fit(capability, dtype)
    size = 4 if dtype == "float32" else 2
    wanted = {
        f"{tile.block_n}x{tile.block_v}x{tile.block_d}"
        for (_, of), tile in tiles.TABLES[f"sm_{capability}"].items()
        if of == size
    }
    assert wanted == {row["tile"] for row in report(capability, dtype) if row["gemm"]}


def test_a_split_is_made_of_whole_tiles() -> None:
    for table in tiles.TABLES.values():
        for tile in table.values():
            assert tile.split_v % tile.block_v == 0
            assert tile.block_v % tile.parts == 0
