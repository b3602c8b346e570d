"""The loss of a step's attempts: teacher and student pass over packs that share prefixes.

Legend: T trained tokens of a pack, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdfast.losses import FeedbackDistillationLoss
from fdfast.models import HeadWeights, hidden_states, lm_head
from fdfast.packing import PrefixTree, fill_packs
from fdfast.policy_head import policy_head
from fdfast.streaming import backward_in_parts
from fdfast.topk_head import topk_head
from fdfast.trainer.batch import Attempt, completion_tree
from fdfast.trainer.config import TrainConfig
from fdfast.types import TeacherHidden, TeacherTopK


@dataclass(frozen=True)
class Scorer:
    """Student, teacher and the loss between them."""

    config: TrainConfig
    model: Any
    teacher: Any
    loss_fn: FeedbackDistillationLoss

    def score(self, attempts: Sequence[Attempt], *, backward: bool) -> dict[str, float]:
        """Go through the packs; the loss is normalised by the trained tokens of all of them.

        Args:
            attempts: all of a step; those at one problem stand together.
            backward: whether the gradient is added to the student's parameters.

        Returns:
            Sums of `loss` and `num_tokens`, means of the loss's other metrics over the tokens.
        """
        num_tokens = sum(a.completion.num_sampled for a in attempts)
        totals: dict[str, float] = {}
        device = next(self.model.parameters()).device
        for pack in packs(attempts, self.config.max_pass_tokens):
            student, teacher = (tree.to(device) for tree in trees(pack))
            part = _Part(self, student, self._evidence(teacher), num_tokens, totals)
            if backward and student.num_tokens > self.config.max_pass_tokens:
                budget = self.config.max_pass_tokens
                backward_in_parts(self.model, student, part, max_tokens=budget)
                continue
            every = torch.arange(len(student.target_ids), device=student.target_ids.device)
            loss = part(hidden_states(self.model, student), every)
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
        return totals

    @torch.no_grad()
    def _evidence(self, tree: PrefixTree) -> TeacherHidden | TeacherTopK:
        """What the loss is told of the teacher, for every target."""
        hidden_TD, head, config = (
            hidden_states(self.teacher, tree),
            lm_head(self.teacher),
            self.config,
        )
        if not config.teacher_top_k:
            return TeacherHidden(hidden_TD, head.weight, head.bias, config.loss_temperature)
        top = topk_head(
            hidden_TD,
            head.weight,
            config.teacher_top_k,
            bias=head.bias,
            temperature=config.loss_temperature,
            logit_softcap=head.logit_softcap,
            workspace_mb=config.workspace_mb,
            backend=config.backend,
        )
        return TeacherTopK(top.ids, top.logprobs)


@dataclass(frozen=True)
class _Part:
    """The loss of some of a pack's targets; its metrics are added to `totals`."""

    scorer: Scorer
    tree: PrefixTree
    evidence: TeacherHidden | TeacherTopK
    num_tokens: int
    totals: dict[str, float]

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        head: HeadWeights = lm_head(self.scorer.model)
        output = self.scorer.loss_fn(
            hidden,
            head.weight,
            self.tree.target_ids[rows],
            self.evidence.rows(rows),
            bias=head.bias,
            num_tokens=self.num_tokens,
        )
        for name, value in output.metrics.items():
            share = 1.0 if name in ("loss", "num_tokens") else len(rows) / self.num_tokens
            self.totals[name] = self.totals.get(name, 0.0) + share * float(value)
        loss: Tensor = output.loss
        return loss


def trees(attempts: Sequence[Attempt]) -> tuple[PrefixTree, PrefixTree]:
    """The student's and the teacher's, of the same attempts in the same order."""
    completions = [a.completion.ids for a in attempts]
    wrote = [a.completion.wrote for a in attempts]
    return (
        completion_tree([a.completion.prompt_ids for a in attempts], completions, wrote),
        completion_tree([a.teacher_prompt_ids for a in attempts], completions, wrote),
    )


def packs(attempts: Sequence[Attempt], max_tokens: int) -> list[list[Attempt]]:
    """The attempts of each pass; those at one problem stay together."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(attempt.problem.name, []).append(attempt)
    members = list(groups.values())
    sizes = [max(tree.num_tokens for tree in trees(group)) for group in members]
    return [[a for group in pack for a in members[group]] for pack in fill_packs(sizes, max_tokens)]


@torch.no_grad()
def token_logprobs(
    student: Any, teacher: Any, attempts: Sequence[Attempt], config: TrainConfig
) -> list[tuple[list[float], list[float]]]:
    """What student and teacher think of each token that the student wrote.

    Args:
        student: a causal LM.
        teacher: likewise; it reads the teacher's prompts.
        attempts: those at one problem stand together.
        config: for the loss's temperature, the backend, and the tokens of a pass.

    Returns:
        For each attempt the natural log-probabilities of its ids, 0 where the model did not write.
    """
    found: dict[int, tuple[list[float], list[float]]] = {}
    for pack in packs(attempts, config.max_pass_tokens):
        pairs = zip((student, teacher), trees(pack), strict=True)
        every = [_target_logprobs(model, tree, config) for model, tree in pairs]
        start = 0
        for attempt in pack:
            stop = start + attempt.completion.num_sampled
            own = [_spread(values[start:stop], attempt.completion.wrote) for values in every]
            found[id(attempt)], start = (own[0], own[1]), stop
    return [found[id(attempt)] for attempt in attempts]


def _target_logprobs(model: Any, tree: PrefixTree, config: TrainConfig) -> list[float]:
    tree, head = tree.to(next(model.parameters()).device), lm_head(model)
    scored = policy_head(
        hidden_states(model, tree),
        head.weight,
        tree.target_ids,
        bias=head.bias,
        temperature=config.loss_temperature,
        logit_softcap=head.logit_softcap,
        workspace_mb=config.workspace_mb,
        backend=config.backend,
    )
    values: list[float] = scored.logprobs.tolist()
    return values


def _spread(values: list[float], wrote: Sequence[bool]) -> list[float]:
    """A value for each id that was written, 0 for the others."""
    rest = iter(values)
    return [next(rest) if written else 0.0 for written in wrote]
