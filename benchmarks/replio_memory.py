"""What the parent's memory does while a pool answers: `python -m benchmarks.replio_memory COUNT`.

A fresh process; it prints one JSON object.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.replio_cases import MEMORY_WORKERS, small
from benchmarks.replio_drivers import HEADER
from fdfast import _replio
from tests.fake_repl import fake_repl

SLICE = 1000  # so many commands are given at once, and one slice ahead
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def slices(num_commands: int) -> Iterator[list[bytes]]:
    """All commands, none like another."""
    for start in range(0, num_commands, SLICE):
        marks = [f"{text}\n-- slice {start}" for text in small(SLICE)]
        yield [json.dumps({"cmd": text}).encode() for text in marks]


def measure(num_commands: int) -> dict[str, float]:
    """Growth from a tenth of the way on, and what the pass took."""
    sizes: list[int] = []
    wall, cpu = time.perf_counter(), time.process_time()
    with _replio.Pool([str(fake_repl())], workers=MEMORY_WORKERS) as pool:
        waiting = slices(num_commands)
        pool.submit(next(waiting), header=HEADER.encode())
        for done in range(num_commands):
            if done % SLICE == 0:
                sizes.append(resident_bytes())
                if (more := next(waiting, None)) is not None:
                    pool.submit(more, header=HEADER.encode())
            answer = pool.next()
            if answer is None or answer.end != "answer" or not answer.raw:
                raise RuntimeError(f"replio_memory: no answer but {answer and answer.end}")
        sizes.append(resident_bytes())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    grown = max(sizes) - sizes[len(sizes) // 10]
    return {"grown_mib": grown / 2**20, "wall_s": wall, "cpu_s": cpu}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
