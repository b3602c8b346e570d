"""Peak memory of the passes of the prefix benchmark, each beyond what was there before it.

`python -m benchmarks.prefix_memory QUICK` is a process of its own; it prints a JSON line for each.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

from benchmarks.measure import MIB, status_bytes
from benchmarks.prefix_cases import APART, OURS, PADDED, all_cases


def main(quick: str) -> None:
    """Every case and contender, each once before, so that what is loaded lazily is there."""
    for case in all_cases(quick=quick == "1"):
        for contender in (OURS, APART, PADDED):
            run = case.run(contender)
            run()  # code and scratch that is made once; gradients, which stay
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = status_bytes("VmRSS")
            run()
            peak = (status_bytes("VmHWM") - before) / MIB
            print(json.dumps({"case": case.name, "contender": contender, "peak_mib": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
