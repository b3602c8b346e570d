"""`make gpu`: the tests that compute on a CUDA GPU, then the benchmark into results/<gpu>.csv.

Where there is no GPU it says so in one line, before anything is installed: only the standard
library is imported here.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFUSED = 2
# What the tests and the benchmark import; without these a Python is no use here.
NEEDED: tuple[str, ...] = (
    "torch",
    "triton",
    "pytest",
    "pytest_benchmark",
    "pytest_timeout",
    "hypothesis",
)
NEEDED += ("numpy", "transformers", "safetensors")
USABLE = f"""
import importlib.util, sys
missing = [name for name in {NEEDED} if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("it has no " + ", ".join(missing))
import torch
if not torch.cuda.is_available():
    sys.exit(f"its torch {{torch.__version__}} sees no GPU")
"""


def main() -> int:
    """Refuse, or test and then measure.

    Returns:
        0; 2 where there is no GPU, or no Python that can use it; else what failed returned.
    """
    lacking = driver_lacks()
    if lacking:
        return _refuse(f"{lacking}; run it on a machine with an NVIDIA GPU")
    python, why = find_python()
    if not python:
        return _refuse(f"no Python here can use the GPU: {why}; install a CUDA build of torch")
    for command in commands(python):
        status = subprocess.run(command, check=False, cwd=ROOT).returncode
        if status:
            return status
    return 0


def _refuse(why: str) -> int:
    print(f"gpu: {why}", file=sys.stderr)
    return REFUSED


def driver_lacks(library: str = "libcuda.so.1") -> str:
    """Why no GPU can be used, asked of the driver itself; "" if one can."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no CUDA GPU here: the NVIDIA driver ({library}) is not installed"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value < 1:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        said = f"CUDA error {status}" if status else "it counts 0 GPUs"
        about = f", CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else ""
        return f"no CUDA GPU here: the NVIDIA driver finds none ({said}{about})"
    return ""


def find_python() -> tuple[str, str]:
    """This Python if it can use the GPU as it is, else .venv's, made now; "" and why not."""
    if not unusable(sys.executable):
        return sys.executable, ""
    if subprocess.run(["make", "--no-print-directory", "peers"], check=False, cwd=ROOT).returncode:
        return "", "`make peers` failed (above)"
    python = str(ROOT / ".venv" / "bin" / "python")
    why = unusable(python)
    return ("", f"{python}: {why}") if why else (python, "")


def unusable(python: str) -> str:
    """Why this Python cannot run the tests on the GPU; "" if it can."""
    done = subprocess.run([python, "-c", USABLE], check=False, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it fails"])[-1]


def commands(python: str) -> list[Sequence[str]]:
    """Tests marked gpu, then the benchmark."""
    patterns = ("tests/test_kernels_*.py", "tests/test_*_cuda.py")
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    files = sorted(str(path.relative_to(ROOT)) for path in found)
    return [
        [python, "-m", "pytest", "-m", "gpu", *files],
        [python, "-m", "benchmarks.harness", "--device", "cuda"],
    ]


if __name__ == "__main__":
    sys.exit(main())
