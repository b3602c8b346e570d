"""How one pass is measured: time, CPU seconds, error, and peak memory in a process of its own.

`python -m benchmarks.measure DEVICE QUICK CASE CONTENDER` is that process; it prints MiB.
"""

import ctypes
import functools
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CHECKED, DEVICES, Case, all_cases
from benchmarks.contenders import Contender, Loss, gradients
from benchmarks.data import Inputs, first_tokens, mean_divergence, widened

MIB = 2**20
# A freed block of more than this is gone at once; else glibc learns from large ones to keep what is
# freed, and a peak depends on the order in which blocks of that size came and went.
FREED_AT_ONCE_BYTES = 128 << 10
OUT_OF_MEMORY = 3  # exit status of the fresh process


def timed(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of one pass (a GPU's own clock there), CPU seconds, and the clock after it.

    Returns:
        wall_s, cpu_s and, of a GPU, clock_mhz.
    """
    cpu = time.process_time()
    if device == "cpu":
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
        return {"wall_s": wall, "cpu_s": time.process_time() - cpu}
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    cpu_s = time.process_time() - cpu
    clock = float(nvidia_smi("clocks.sm").split()[0])
    return {"wall_s": first.elapsed_time(last) / 1e3, "cpu_s": cpu_s, "clock_mhz": clock}


def nvidia_smi(field: str) -> str:
    """What the driver says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((ours.double() - truth).norm() / truth.norm())


class Errors:
    """Errors of contenders on the first tokens of a case, each truth computed once."""

    def __init__(self, x: Inputs, tokens: int) -> None:
        self.x = first_tokens(x, tokens)
        self.wide = widened(self.x)
        self.truths: dict[Loss, dict[str, Tensor]] = {}

    @functools.cached_property
    def mean_kl(self) -> float:
        """Of the inputs as they are, rounded."""
        x = self.x
        return mean_divergence(x["hidden"], x["teacher"], x["weight"], x["targets"])

    def of(self, contender: Contender) -> dict[str, float]:
        """dhidden_error and dweight_error, relative."""
        if contender.truth not in self.truths:
            self.truths[contender.truth] = gradients(contender.truth, self.wide)
        ours, truth = contender.run(self.x), self.truths[contender.truth]
        return {f"{name}_error": relative_error(ours[name], truth[name]) for name in truth}


def wrong_contenders(case: Case) -> list[str]:
    """A line for each contender whose gradients are off on a small case."""
    errors = Errors(case.inputs(CHECKED), CHECKED.N)
    lines = []
    for contender in case.contenders():
        if contender.lacks:
            continue
        for name, error in errors.of(contender).items():
            if not error <= contender.tolerance:
                lines.append(
                    f"{case.name}: {contender.name}: {name} is {error:.2g}, at most "
                    f"{contender.tolerance:.2g} is right"
                )
    return lines


def peak_mib_alone(case: Case, contender: Contender, *, quick: bool) -> float:
    """Peak MiB of one pass beyond inputs and gradients, in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.measure", case.device]
    command += [str(int(quick)), case.name, contender.name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(FREED_AT_ONCE_BYTES)}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=root, env=environment
    )
    if done.returncode == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"{case.name}, {contender.name}")
    if done.returncode:
        raise RuntimeError(f"{case.name}, {contender.name}: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def find_case(device: str, name: str, *, quick: bool) -> Case:
    """The case of that name."""
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    cases = all_cases(device, quick=quick, memory_bytes=memory)
    return next(case for case in cases if case.name == name)


def peak_mib(case: Case, contender: Contender) -> float:
    """The same in this process, which must have done nothing before."""
    x = case.inputs()
    # Code is loaded and compiled first, which for torch.compile wants the very shape.
    contender.run(x if contender.compiled else first_tokens(x, len(x["hidden"]) // 8))
    gradient_bytes = sum(x[k].numel() * x[k].element_size() for k in ("hidden", "weight"))
    gc.collect()
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.run(x)
        return (torch.cuda.max_memory_allocated() - before - gradient_bytes) / MIB
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide as much of the pass
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status_bytes("VmRSS")
    contender.run(x)
    return (status_bytes("VmHWM") - before - gradient_bytes) / MIB


def status_bytes(field: str) -> int:
    """A size that the kernel keeps of this process, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main(device: str, quick: str, case_name: str, contender_name: str) -> None:
    """The fresh process."""
    assert device in DEVICES, device
    case = find_case(device, case_name, quick=quick == "1")
    contender = next(c for c in case.contenders() if c.name == contender_name)
    try:
        print(peak_mib(case, contender))
    except torch.OutOfMemoryError:
        sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main(*sys.argv[1:])
