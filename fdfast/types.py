"""What goes into `policy_head` and `topk_head` beside plain tensors, and what comes out.

Legend: ... any leading shape (the same for all), N tokens, D hidden, V vocabulary, K top-k.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fdfast.policy_head_group import VocabularySlice

# On the CPU and a vocabulary of 49,152, logits of 400 tokens, student's and teacher's, or of 260
# beside the sum of a bfloat16 weight's gradient: there a GEMM is near its best.
DEFAULT_WORKSPACE_MB = 160.0


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher as its last hidden states and its head; never differentiated.

    Attributes:
        hidden: (..., D_T) floating; D_T may differ from the student's D.
        weight: (V, D_T) floating; V is the student's.
        bias: (V,) floating, or None.
        temperature: the teacher's logits are divided by it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0

    def rows(self, index: Tensor) -> "TeacherHidden":
        """The teacher of some of the tokens: of hidden[index]."""
        return self.each(lambda tensor: tensor[index])

    def each(self, change: Callable[[Tensor], Tensor]) -> "TeacherHidden":
        """The teacher of change(hidden): of other tokens, or of the same in another shape."""
        return dataclasses.replace(self, hidden=change(self.hidden))


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher as the K tokens it finds most likely; never differentiated.

    Attributes:
        ids: (..., K) int64, distinct within a token.
        logprobs: (..., K) floating, log-probabilities over the whole vocabulary (not renormalised).
    """

    ids: Tensor
    logprobs: Tensor

    def rows(self, index: Tensor) -> "TeacherTopK":
        """The teacher of some of the tokens: of ids[index]."""
        return self.each(lambda tensor: tensor[index])

    def each(self, change: Callable[[Tensor], Tensor]) -> "TeacherTopK":
        """The teacher of change(ids) and change(logprobs), as that of `TeacherHidden`."""
        return TeacherTopK(change(self.ids), change(self.logprobs))


class TopK(NamedTuple):
    """What `topk_head` returns; no gradient.

    Attributes:
        ids: (..., K) int64, by falling log-probability.
        logprobs: (..., K) float32 (float64 for float64 inputs), over the whole vocabulary.
        mass: (...) the same dtype, the sum of the K probabilities.
    """

    ids: Tensor
    logprobs: Tensor
    mass: Tensor


class PolicyHead(NamedTuple):
    """What `policy_head` returns, each of shape (...), 0 where masked; float32, float64 for float64
    inputs.

    Attributes:
        logprobs: log p_S(target); differentiable.
        entropy: of p_S, nats; differentiable.
        divergence: to the teacher, nats; differentiable; 0 everywhere without a teacher.
        teacher_mass: the share of the teacher's probability that the divergence saw: sum over K for
            TeacherTopK, else 1.
        dropped_mass: the share of this token's sum |dlogits| that `grad_filter` dropped. It is
            known only once the backward pass has run, which fills it in place; 0 before, and where
            nothing was dropped.
        argmax: int64, the student's most likely token.
    """

    logprobs: Tensor
    entropy: Tensor
    divergence: Tensor
    teacher_mass: Tensor
    dropped_mass: Tensor
    argmax: Tensor


@dataclass(frozen=True)
class HeadOptions:
    """The options of `policy_head` that are not tensors, validated."""

    temperature: float = 1.0
    teacher_temperature: float = 1.0
    logit_softcap: float | None = None
    divergence: str = "forward_kl"
    alpha: float = 0.5
    tail: str = "truncate"
    grad_filter: float | None = None
    workspace_bytes: int = int(DEFAULT_WORKSPACE_MB * 2**20)
    vocabulary_slice: VocabularySlice | None = None


class Head(NamedTuple):
    """The head of one model over flat tokens: hidden (N, D), weight (V, D), bias (V,) or None."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


class Forest(NamedTuple):
    """What a backend of prefix attention needs of a `PrefixTree`, whose attributes these are."""

    cu_seqlens: Tensor
    parent: Tensor
    kv_end: Tensor
    position_ids: Tensor
