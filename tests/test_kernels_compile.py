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

from fdfast.kernels import prefix_attention_tiles, tiles

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


def assert_fit(capability: int, *cases: str, tensor_cores: tuple[str, ...] = ()) -> None:
    """No spills, within shared memory, no atomics; GEMMs by copies ahead and on tensor cores.

    Args:
        capability: of the machine.
        cases: as in fdfast.kernels.report.
        tensor_cores: kinds of instructions, of which one will do; the machine's own if empty.
    """
    rows = report(capability, *cases)
    assert len(rows) > 2
    own = {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
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
            assert any(row[name] > 0 for name in tensor_cores or (own,)), row


def test_every_kernel_fits_an_h100() -> None:
    assert_fit(90, "policy_head", "bfloat16", "plain")
    assert len(report(90, "policy_head", "bfloat16", "plain")) > 10


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_fits_its_machine(capability: int) -> None:
    # Qwen3's head size; then one that is no power of two, with a window.
    assert_fit(capability, "prefix_attention", "bfloat16", "D=128", "D=96")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_specialisation_with_every_tile_fits_its_machine(capability: int, dtype: str) -> None:
    assert_fit(capability, "policy_head", dtype)
    size = 4 if dtype == "float32" else 2
    wanted = {
        f"{tile.block_n}x{tile.block_v}x{tile.block_d}"
        for (_, of), tile in tiles.TABLES[f"sm_{capability}"].items()
        if of == size
    }
    rows = report(capability, "policy_head", dtype)
    assert wanted == {row["tile"] for row in rows if row["gemm"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_every_tile_fits_its_machine(capability: int, dtype: str) -> None:
    # The tiles of the largest heads have too few rows for the newer machines' own instructions.
    assert_fit(capability, "prefix_attention", dtype, tensor_cores=("mma", "wgmma", "tcgen05"))
    size = 4 if dtype == "float32" else 2
    wanted = {
        f"{tile.block_q}x{tile.block_k}x{key.block_d}"
        for key, tile in prefix_attention_tiles.TABLES[f"sm_{capability}"].items()
        if key.size == size
    }
    assert wanted == {row["tile"] for row in report(capability, "prefix_attention", dtype)}


def test_a_split_is_made_of_whole_tiles() -> None:
    for table in tiles.TABLES.values():
        for tile in table.values():
            assert tile.split_v % tile.block_v == 0
            assert tile.block_v % tile.parts == 0
