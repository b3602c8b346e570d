"""Who multiplies matrices on the CPU, float32 sums or wider.

- bfloat16 by bfloat16, where the CPU has AVX512-BF16: csrc/gemm_bf16.hpp. PyTorch's own product of
  them is rounded to bfloat16, which logits must not be.
- float32: PyTorch asks oneDNN where float32 GEMMs may be done in bfloat16, MKL elsewhere. On a CPU
  without bfloat16 matrix units (AMD's EPYC, say) oneDNN then still computes in float32, as exactly
  as MKL and faster. Whether it does is found out once, by a small product.
- All else: PyTorch's default.

Legend: M rows and N columns of a product, K its depth.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdfast import _cpu
from fdfast.types import Head

# bfloat16 products would be off by 2e-3, float32 ones by 4e-7.
FLOAT32_ERROR = 1e-5
# The most that was seen of oneDNN's for one thread is 1.1 MiB.
ONEDNN_SCRATCH_BYTES = 2 << 20


@dataclass(frozen=True)
class Gemms:
    """The products of one op.

    Attributes:
        operands: the dtype that hidden, weight and dlogits have in them.
        scratch_bytes: what packed blocks take of the workspace.
        onednn: whether float32 ones are oneDNN's.
    """

    operands: torch.dtype
    scratch_bytes: int = 0
    onednn: bool = False

    @classmethod
    def choose(cls, heads: Sequence[Head], dtype: torch.dtype, workspace_bytes: int) -> "Gemms":
        """The fastest that are exact enough and leave most of the workspace.

        Args:
            heads: of student and teacher.
            dtype: of the logits.
            workspace_bytes: of the op.
        """
        threads, room = torch.get_num_threads(), workspace_bytes // 8
        scratch = _cpu.gemm_bf16_scratch_bytes() * threads
        if scratch <= room and bfloat16_runs() and all(_is_bfloat16(head) for head in heads):
            return cls(torch.bfloat16, scratch)
        scratch = ONEDNN_SCRATCH_BYTES * threads
        if scratch <= room and dtype == torch.float32:
            # A product of bfloat16 values in bfloat16 is exact, and one with float32 dlogits as
            # exact as the gradient that leaves.
            narrow = all(h.hidden_ND.dtype == h.weight_VD.dtype == torch.bfloat16 for h in heads)
            if narrow or onednn_keeps_float32():
                return cls(dtype, scratch, onednn=True)
        return cls(dtype)


@functools.cache
def bfloat16_runs() -> bool:
    """Whether this CPU multiplies bfloat16 by csrc."""
    return _cpu.gemm_bf16_runs()


def _is_bfloat16(head: Head) -> bool:
    hidden_ND, weight_VD = head.hidden_ND, head.weight_VD
    return hidden_ND.dtype == weight_VD.dtype == torch.bfloat16 and 1 in weight_VD.stride()


@dataclass(frozen=True)
class SplitSum:
    """A float32 sum in two halves: the upper 16 bits lie in the bfloat16 tensor that it becomes at
    last, and only the lower ones take memory of their own.

    Attributes:
        upper_MN: bfloat16, contiguous rows.
        lower_MN: int16, likewise.
    """

    upper_MN: Tensor
    lower_MN: Tensor

    def __getitem__(self, rows: slice) -> "SplitSum":
        """Some of its rows."""
        return SplitSum(self.upper_MN[rows], self.lower_MN[rows])

    def round_(self) -> None:
        """Make the upper halves the nearest bfloat16; the sum ends here."""
        upper_MN, lower_MN = self.upper_MN, self.lower_MN
        assert upper_MN.is_contiguous()
        assert lower_MN.is_contiguous()
        addresses = (upper_MN.data_ptr(), lower_MN.data_ptr())
        _cpu.round_halves(*addresses, upper_MN.numel(), torch.get_num_threads())


def write_product(out_MN: Tensor | SplitSum, left_MK: Tensor, right_KN: Tensor) -> None:
    """out = left @ right, in out's dtype; bfloat16 factors only where `Gemms` chose them."""
    if isinstance(out_MN, SplitSum) or left_MK.dtype == torch.bfloat16:
        _bfloat16_product(out_MN, left_MK, right_KN, add=False)
    else:
        torch.mm(left_MK, right_KN, out=out_MN)


def add_product(out_MN: Tensor | SplitSum, left_MK: Tensor, right_KN: Tensor) -> None:
    """out += left @ right, likewise."""
    if isinstance(out_MN, SplitSum) or left_MK.dtype == torch.bfloat16:
        _bfloat16_product(out_MN, left_MK, right_KN, add=True)
    else:
        out_MN.addmm_(left_MK, right_KN)


def _bfloat16_product(
    out_MN: Tensor | SplitSum, left_MK: Tensor, right_KN: Tensor, *, add: bool
) -> None:
    assert left_MK.dtype == right_KN.dtype == torch.bfloat16, "csrc multiplies bfloat16"
    left_MK, right_NK = _packable(left_MK), _packable(right_KN.T)
    (M, K), N = left_MK.shape, len(right_NK)
    factors: list[int] = []
    for factor in (left_MK, right_NK):
        factors += [factor.data_ptr(), *_strides(factor)]
    _cpu.gemm_bf16(*factors, M, N, K, *_places(out_MN), add, torch.get_num_threads())


def _places(out_MN: Tensor | SplitSum) -> tuple[int, int, int, int]:
    """Where csrc writes: float32, or upper and lower halves; and how far rows are apart."""
    halves = out_MN if isinstance(out_MN, SplitSum) else None
    written = out_MN.upper_MN if isinstance(out_MN, SplitSum) else out_MN
    assert written.stride(1) == 1 or written.shape[1] == 1, "csrc wants contiguous rows"
    if halves is not None:
        assert halves.lower_MN.stride() == written.stride(), "csrc knows one stride"
        return 0, written.data_ptr(), halves.lower_MN.data_ptr(), written.stride(0)
    assert written.dtype == torch.float32, "csrc sums in float32"
    return written.data_ptr(), 0, 0, written.stride(0)


def _packable(factor: Tensor) -> Tensor:
    return factor if 1 in _strides(factor) else factor.contiguous()


def _strides(factor: Tensor) -> tuple[int, int]:
    """Of lanes and depth; torch's is arbitrary, and without meaning, where the size is 1."""
    lane, depth = factor.stride()
    return (1 if len(factor) == 1 and depth != 1 else lane), (1 if factor.shape[1] == 1 else depth)


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


@contextlib.contextmanager
def fast_gemms(onednn: bool) -> Iterator[None]:
    """Within, float32 GEMMs are oneDNN's if so said; the process's own setting is put back."""
    if onednn:
        with _onednn():
            yield
    else:
        yield
