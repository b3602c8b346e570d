"""Which library multiplies float32 matrices on the CPU.

PyTorch asks oneDNN where float32 GEMMs may be done in bfloat16, MKL elsewhere. On a CPU without
bfloat16 matrix units (AMD's EPYC, say) oneDNN then still computes in float32, as exactly as MKL and
twice as fast. Whether it does is found out once, by a small product.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

# bfloat16 products would be off by 2e-3, float32 ones by 4e-7.
FLOAT32_ERROR = 1e-5
# The most that was seen of it for one thread is 1.1 MiB.
SCRATCH_BYTES = 2 << 20


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def onednn_keeps_float32() -> bool:
    """Whether oneDNN's products that may be bfloat16 are float32 on this machine."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    truth = a @ b.T
    with _onednn():
        product = a.float() @ b.float().T
    return bool((product.double() - truth).norm() / truth.norm() < FLOAT32_ERROR)


def onednn_scratch_bytes(*, bfloat16_inputs: bool, workspace_bytes: int) -> int:
    """What oneDNN's packed blocks take of a workspace; 0 says that MKL is the better choice.

    With bfloat16 inputs a product of them in bfloat16 is exact, and one with float32 dlogits as
    exact as the gradient that leaves.

    Args:
        bfloat16_inputs: whether hidden and weight were bfloat16 before they were widened.
        workspace_bytes: of the op; a small one has no room.
    """
    scratch = SCRATCH_BYTES * torch.get_num_threads()
    if workspace_bytes < 8 * scratch:
        return 0
    return scratch if bfloat16_inputs or onednn_keeps_float32() else 0


@contextlib.contextmanager
def fast_gemms(scratch_bytes: int) -> Iterator[None]:
    """Within, float32 GEMMs are oneDNN's if it was given scratch; the process's own setting is put
    back.
    """
    if scratch_bytes:
        with _onednn():
            yield
    else:
        yield
