"""One small batch for every loss, its logits stored, and what `the same` means of two losses.

Legend: B sequences, L positions, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from fdfast import TeacherHidden, TeacherTopK
from fdfast.losses import GRPOLoss, LossOutput
from tests.helpers import F64, generator

B, L, D, V = 4, 6, 5, 23
EXACT = {"rtol": 1e-11, "atol": 1e-13}
NAN = float("nan")


class Batch:
    """A batch with NaN and impossible tokens wherever nothing is trained; float64."""

    def __init__(self, seed: int = 0, *, junk: bool = True) -> None:
        g = generator(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=F64) * scale

        self.hidden, self.weight, self.bias = normal(B, L, D), normal(V, D), normal(V)
        self.targets = torch.randint(V, (B, L), generator=g)
        # Unequal lengths, holes where a tool spoke, one sequence with a single token.
        self.mask = torch.tensor(
            [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
        ).bool()
        self.advantages = torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=F64)
        logprobs = stored_logprobs(self)
        self.old = (logprobs + normal(B, L, scale=0.4)).detach()
        self.ref = (logprobs + normal(B, L, scale=0.4)).detach()
        self.sampling = (self.old + normal(B, L, scale=0.5)).detach()
        self.teacher = TeacherHidden(
            self.hidden + normal(B, L, D, scale=0.3), self.weight, self.bias
        )
        z = self.teacher.hidden @ self.weight.T + self.bias
        top = z.log_softmax(-1).topk(5, -1)
        ids, kept = top.indices, top.values
        if junk:
            hole = ~self.mask
            for x in (self.hidden, self.old, self.ref, self.sampling, self.teacher.hidden, kept):
                x[hole] = NAN
            self.targets[hole] = -100
            ids[hole] = -1
        self.topk = TeacherTopK(ids, kept)
        for leaf in self.leaves():
            leaf.requires_grad_()

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    def grpo(self, loss: GRPOLoss, rows: slice = slice(None), **more: Any) -> LossOutput:
        return loss(
            self.hidden[rows],
            self.weight,
            self.targets[rows],
            self.advantages[rows],
            mask=self.mask[rows],
            bias=self.bias,
            **more,
        )


def stored_logits(batch: Batch, temperature: float = 1.0) -> Tensor:
    """Logits of every position, those of junk positions at a hidden state of 0."""
    hidden = torch.where(batch.mask[..., None], batch.hidden, 0.0)
    return (hidden @ batch.weight.T + batch.bias) / temperature


def stored_logprobs(batch: Batch, temperature: float = 1.0) -> Tensor:
    targets = batch.targets.clamp(min=0)[..., None]
    return stored_logits(batch, temperature).log_softmax(-1).gather(-1, targets)[..., 0]


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(loss, batch.leaves(), retain_graph=True))


def assert_same(ours: Tensor, plain: Tensor, batch: Batch) -> None:
    """The same value and the same gradient of every leaf, which is not zero."""
    torch.testing.assert_close(ours, plain, **EXACT)
    for one, other in zip(gradients(ours, batch), gradients(plain, batch), strict=True):
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(one, other, **EXACT)


def mean_over(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].sum() / mask.sum()
