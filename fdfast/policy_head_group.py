"""`group=` of `policy_head` and `topk_head`: the columns of the vocabulary this rank holds, and
what the ranks say to each other.

Legend: M tokens, N trained tokens, V this rank's columns, W ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularySlice:
    """This rank's part of a head that is cut along the vocabulary, in rank order.

    Every method is a collective: all ranks of the group call them in the same order.

    Attributes:
        group: the ranks.
        first: the global id of this rank's first column.
        vocabulary: the columns of all ranks together.
    """

    group: Any
    first: int
    vocabulary: int

    @classmethod
    def find(cls, operation: str, group: Any, V: int, M: int, N: int) -> "VocabularySlice":
        """Ask all ranks how many columns and tokens they hold.

        Raises:
            ValueError: this process is not in the group, or, on every rank, the tokens differ.
        """
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"{operation}: group must hold this process; it does not")
        sizes_W3 = _gathered(torch.tensor([V, M, N]), group)
        if (sizes_W3[:, 1:] != sizes_W3[0, 1:]).any():
            raise ValueError(
                f"{operation}: group wants the same hidden, targets and mask on every rank; got "
                f"{sizes_W3[:, 1].tolist()} tokens, {sizes_W3[:, 2].tolist()} of them trained"
            )
        columns_W = sizes_W3[:, 0]
        return cls(group, int(columns_W[:rank].sum()), int(columns_W.sum()))

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, (W, ...): merged in rank order, so the same on every rank."""
        return _gathered(tensor, self.group)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        if tensor.numel():
            dist.all_reduce(tensor, group=self.group)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return int(_gathered(torch.tensor([number]), self.group).min())


def check_group(operation: str, hidden: Tensor, backend: str) -> None:
    """The CPU backend alone knows of groups.

    Raises:
        ValueError: another was asked for, or the tensors lie elsewhere.
    """
    if hidden.device.type != "cpu" or backend not in ("auto", "cpu"):
        raise ValueError(
            f"{operation}: group wants backend='cpu' and tensors on the CPU; got {backend!r} on "
            f"{hidden.device}"
        )


def _gathered(tensor: Tensor, group: Any) -> Tensor:
    tensor = tensor.contiguous()
    parts = [torch.zeros_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)
