"""Processes of a test that talk over gloo: `run_ranks` in the test, `start_ranks` in the module
that is their program.
"""

import datetime
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

TIMEOUT_S = 120


@functools.cache
def _run(module: str, num_ranks: int) -> tuple[str, list[Any]]:
    """What went wrong, and what each rank saw; run once, even if it fails."""
    repository = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    with tempfile.TemporaryDirectory() as folder:
        command = ["timeout", "240", sys.executable, "-m", module, folder]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"exit status {done.returncode}: {done.stderr}", []
        return "", [torch.load(Path(folder, f"rank{rank}.pt")) for rank in range(num_ranks)]


def run_ranks(module: str, num_ranks: int) -> list[Any]:
    """What each rank of `python -m module` saw; run once for all tests of a process."""
    wrong, seen = _run(module, num_ranks)
    assert not wrong, wrong
    return seen


def start_ranks(one_rank: Callable[[int], Any], num_ranks: int) -> None:
    """Fork the ranks after torch was imported once, and save what each of them saw."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    given = (num_ranks, Path(sys.argv[1]), one_rank)
    start_processes(_one, given, nprocs=num_ranks, start_method="fork")


def _one(rank: int, num_ranks: int, folder: Path, one_rank: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    torch.save(one_rank(rank), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
