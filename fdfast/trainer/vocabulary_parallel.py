"""Whose rows meet which head in a loss: a rank's own the whole head, or those of all ranks this
rank's rows of it.

The second is for a head that is cut along the vocabulary (`sharding.shard`, keeps_head_cut). All
ranks' hidden states, with what the loss wants beside them, come together before a call; each rank
computes the whole loss with its columns, `policy_head` adds up what the hidden states get from all
of them, and each rank takes the gradient of its own rows. So a rank stores and moves hidden states
of all tokens, N x D numbers, in place of the head's V x D.
Legend: N rows of this rank, M of all ranks, W ranks, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfast.models import HeadWeights, lm_head
from fdfast.trainer.sharding import head_shard

_NONE_LEFT = -1


class Meeting:
    """The rows of one call of the loss: this rank's own, and every method is the identity.

    Attributes:
        tells: whether this rank's metrics of the call count.
    """

    tells = True

    def all(self, rows: Tensor) -> Tensor:
        """This rank's rows (N, ...) -> those of all ranks in rank order (M, ...); differentiable,
        if every rank's gradient is that of the whole loss.
        """
        return rows

    def own(self, rows: Tensor) -> Tensor:
        """The other way round."""
        return rows


class Heads:
    """A head that a pass has whole, for its own rows.

    Attributes:
        group: what `policy_head` and the losses are told; None: the head is whole.
    """

    group: Any = None

    def weights(self, model: Any) -> HeadWeights:
        """Of the model, as far as this rank has them; to be asked inside of it."""
        return lm_head(model)

    def meet(self, num_rows: int) -> Meeting:
        """Begin a call of the loss with so many rows of this rank. A collective of the group."""
        return Meeting()

    def left(self) -> Iterator[Meeting]:
        """Meetings to take part in without rows, after this rank's last one in a pack, until all
        ranks have had theirs.
        """
        yield from ()


class CutHeads(Heads):
    """A head of which each rank has some rows, for the rows of all ranks.

    Args:
        model: that `shard` cut, keeping its head so; others are cut alike.
    """

    def __init__(self, model: Any) -> None:
        self.group = model.head_shard.weight.device_mesh.get_group()

    def weights(self, model: Any) -> HeadWeights:
        """See `Heads`."""
        return head_shard(model)

    def meet(self, num_rows: int) -> "RanksMeeting":
        """See `Heads`."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(sizes, torch.tensor([num_rows]), group=self.group)
        return RanksMeeting(self.group, [int(size) for size in sizes])

    def left(self) -> Iterator[Meeting]:
        """See `Heads`."""
        while (meeting := self.meet(_NONE_LEFT)).goes_on:
            yield meeting


def heads_of(model: Any) -> Heads:
    """As `shard` left the model; of one that is not sharded they are whole."""
    return CutHeads(model) if hasattr(model, "head_shard") else Heads()


class RanksMeeting(Meeting):
    """The rows of all ranks. The main one's metrics count: all have the same.

    Args:
        group: the ranks.
        said: rows of each; of one that is through, less than none.
    """

    def __init__(self, group: Any, said: Sequence[int]) -> None:
        self.group, self.counts = group, [max(0, count) for count in said]
        self.goes_on = any(count != _NONE_LEFT for count in said)
        self.rank = dist.get_rank(group)
        self.tells = self.rank == 0

    def all(self, rows: Tensor) -> Tensor:
        """See `Meeting`."""
        assert len(rows) == self.counts[self.rank]
        gathered: Tensor = _AllRows.apply(rows, self)  # type: ignore[no-untyped-call]
        return gathered

    def own(self, rows: Tensor) -> Tensor:
        """See `Meeting`."""
        start = sum(self.counts[: self.rank])
        return rows[start : start + self.counts[self.rank]]


class _AllRows(torch.autograd.Function):
    """The rows of all ranks; a rank's gradient of them is already the whole loss's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, meeting: RanksMeeting) -> Tensor:
        ctx.meeting = meeting
        longest = max(meeting.counts)
        # Sizes must be alike, and gloo wants at least one element.
        padded = rows.new_zeros(max(1, longest), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in meeting.counts]
        dist.all_gather(parts, padded, group=meeting.group)
        return torch.cat([part[:n] for part, n in zip(parts, meeting.counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.meeting.own(gradient), None
