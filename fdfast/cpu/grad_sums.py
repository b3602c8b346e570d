"""The gradients of policy_head on the CPU while they are added up, chunk by chunk of tokens.

Legend: M tokens, D hidden, V vocabulary, R tokens of a chunk, B vocabulary columns of a block.
"""

import torch
from torch import Tensor

from fdfast.cpu.blocks import call
from fdfast.cpu.gemm import SplitSum, add_product, write_product
from fdfast.reference import statistics_dtype
from fdfast.types import Head

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class GradSums:
    """The gradients while they are added up, in the statistics dtype: in place where that is the
    input's own.
    """

    def __init__(
        self, student: Head, needs: tuple[bool, bool, bool], rows_N: Tensor | None
    ) -> None:
        self.student, self.rows_N = student, rows_N
        hidden_MD, weight_VD, bias_V = student
        self.dtype = statistics_dtype(hidden_MD, weight_VD)
        self.hidden_MD = torch.zeros_like(hidden_MD, dtype=self.dtype) if needs[0] else None
        # A block's first chunk of tokens writes it; nothing does where no token is trained.
        self.written = len(hidden_MD if rows_N is None else rows_N) > 0
        self.weight_VD = None
        if needs[1]:
            make = torch.empty_like if self.written else torch.zeros_like
            self.weight_VD = make(weight_VD, memory_format=torch.contiguous_format)
        self.bias_V = None
        if needs[2] and bias_V is not None:
            self.bias_V = torch.zeros_like(bias_V, dtype=self.dtype)

    def weight_block(self, block: slice, *, split: bool = False) -> Tensor | SplitSum | None:
        """Memory for the sum of a vocabulary block, (B, D): the gradient itself where its dtype
        allows, else a float32 tensor, or if `split` a SplitSum.
        """
        if self.weight_VD is None:
            return None
        gradient_BD = self.weight_VD[block]
        if gradient_BD.dtype == self.dtype:
            return gradient_BD
        if split:
            return SplitSum(gradient_BD, torch.empty_like(gradient_BD, dtype=torch.int16))
        return torch.empty(gradient_BD.shape, dtype=self.dtype)

    def finish(self, block: slice, sum_BD: Tensor | SplitSum | None) -> None:
        """Round a finished block to the weight's dtype."""
        if self.weight_VD is None or sum_BD is None or not self.written:
            return
        if isinstance(sum_BD, SplitSum):
            sum_BD.round_()
        elif sum_BD.dtype != self.weight_VD.dtype:
            self.weight_VD[block] = sum_BD

    def add(
        self,
        dlogits_RB: Tensor,
        hidden_RD: Tensor,
        weight_BD: Tensor,
        sum_BD: Tensor | SplitSum | None,
        rows: slice,
    ) -> None:
        """dweight += dlogits.T @ hidden and dhidden += dlogits @ weight. The chunk of the first
        token begins the sum of dweight.
        """
        if sum_BD is not None:
            begins = rows.start == 0
            (write_product if begins else add_product)(sum_BD, dlogits_RB.T, hidden_RD)
        if self.hidden_MD is None:
            return
        if self.rows_N is None:
            add_product(self.hidden_MD[rows], dlogits_RB, weight_BD)
        else:
            sum_RD = torch.empty_like(hidden_RD, dtype=self.dtype)
            write_product(sum_RD, dlogits_RB, weight_BD)
            self.hidden_MD.index_add_(0, self.rows_N[rows], sum_RD)

    def add_filtered(
        self,
        dlogits_RB: Tensor,
        threshold_R: Tensor,
        hidden_RD: Tensor,
        weight_BD: Tensor,
        sum_BD: Tensor | SplitSum | None,
        rows: slice,
    ) -> Tensor:
        """`add` without the |dlogits| below the threshold of their row; the sum of the others,
        (R,) float64. dlogits are in the dtype of the sums.
        """
        kept_R = torch.zeros_like(threshold_R)
        assert not isinstance(sum_BD, SplitSum), "csrc's sparse sums are float32"
        if sum_BD is not None and rows.start == 0:
            sum_BD.zero_()
        sum_RD = None
        if self.hidden_MD is not None:
            whole = self.rows_N is None
            sum_RD = (
                self.hidden_MD[rows] if whole else torch.zeros_like(hidden_RD, dtype=self.dtype)
            )
        call(
            "sparse_grads",
            self.dtype,
            dlogits_RB,
            *dlogits_RB.shape,
            threshold_R,
            weight_BD.contiguous(),
            weight_BD.dtype == torch.bfloat16,
            hidden_RD.contiguous(),
            hidden_RD.dtype == torch.bfloat16,
            hidden_RD.shape[1],
            torch.get_num_threads(),
            sum_RD,
            sum_BD,
            kept_R,
        )
        if self.hidden_MD is not None and self.rows_N is not None and sum_RD is not None:
            self.hidden_MD.index_add_(0, self.rows_N[rows], sum_RD)
        return kept_R

    def add_bias(self, dlogits_RB: Tensor, block: slice) -> None:
        """dbias += the columns' sums."""
        if self.bias_V is not None:
            self.bias_V[block] += dlogits_RB.sum(0, dtype=self.dtype)

    def results(self) -> Gradients:
        """hidden, weight, bias, each in its input's dtype."""
        hidden_MD, _, bias_V = self.student
        dhidden_MD = None if self.hidden_MD is None else self.hidden_MD.to(hidden_MD.dtype)
        dbias_V = self.bias_V
        if dbias_V is not None and bias_V is not None:
            dbias_V = dbias_V.to(bias_V.dtype)
        return dhidden_MD, self.weight_VD, dbias_V
