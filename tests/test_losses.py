"""Feedback Distillation against plain PyTorch with stored logits: values, gradients, metrics."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fdfast import TeacherTopK, reference
from fdfast.divergences import TABLE, TAILS
from fdfast.losses import FeedbackDistillationLoss, GRPOLoss, verl_names
from fdfast.losses.policy import LOSS_TYPES
from tests.helpers import FLOAT64_BACKENDS
from tests.loss_batch import (
    EXACT,
    B,
    Batch,
    L,
    assert_same,
    gradients,
    stored_logits,
)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("teacher", ["hidden", *TAILS])
def test_distillation_is_the_mean_divergence_less_the_entropy_bonus(
    backend: str, divergence: str, teacher: str
) -> None:
    batch = Batch()
    loss = FeedbackDistillationLoss(
        divergence=divergence,
        alpha=0.3,
        tail="truncate" if teacher == "hidden" else teacher,
        temperature=0.8,
        entropy_coef=0.01,
        backend=backend,
    )
    theirs = batch.teacher if teacher == "hidden" else batch.topk
    ours = loss(batch.hidden, batch.weight, batch.targets, theirs, mask=batch.mask, bias=batch.bias)
    z = stored_logits(batch, 0.8)[batch.mask]
    s = z.log_softmax(-1)
    if teacher == "hidden":
        t = (batch.teacher.hidden[batch.mask] @ batch.weight.T + batch.bias).log_softmax(-1)
        each = reference.divergence(divergence, t.detach(), s, alpha=0.3)
    else:
        kept = TeacherTopK(batch.topk.ids[batch.mask], batch.topk.logprobs[batch.mask])
        each = reference.divergence_topk(divergence, kept, s, alpha=0.3, tail=teacher)
    entropy = -(s.exp() * s).sum(-1)
    assert_same(ours.loss, each.mean() - 0.01 * entropy.mean(), batch)
    hits = (z.argmax(-1) == batch.targets[batch.mask]).double().mean()
    torch.testing.assert_close(ours.metrics["kl"], each.mean().detach(), **EXACT)
    torch.testing.assert_close(ours.metrics["entropy"], entropy.mean().detach(), **EXACT)
    torch.testing.assert_close(ours.metrics["mean_token_accuracy"], hits, **EXACT)
    assert ours.metrics["num_tokens"] == batch.mask.sum()


def test_the_papers_loss_is_soft_target_cross_entropy_over_the_top_k_up_to_a_constant() -> None:
    # -sum_t sum_{a in K} p_T(a) log p_S(a), summed over tokens: the same gradient times the number
    # of tokens, and a value that differs by the teacher's own (truncated) negative entropy.
    batch = Batch()
    loss = FeedbackDistillationLoss()
    ours = loss(
        batch.hidden, batch.weight, batch.targets, batch.topk, mask=batch.mask, bias=batch.bias
    )
    s = stored_logits(batch)[batch.mask].log_softmax(-1)
    kept, ids = batch.topk.logprobs[batch.mask].detach(), batch.topk.ids[batch.mask]
    paper = -(kept.exp() * s.gather(-1, ids)).sum()
    count = batch.mask.sum()
    constant = (kept.exp() * kept).sum()
    torch.testing.assert_close(ours.loss * count, paper + constant, **EXACT)
    for one, other in zip(
        gradients(ours.loss * count, batch), gradients(paper, batch), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_distillation_metrics_are_named_and_carry_no_gradient() -> None:
    batch = Batch()
    out = FeedbackDistillationLoss()(
        batch.hidden, batch.weight, batch.targets, batch.topk, mask=batch.mask, bias=batch.bias
    )
    names = {"loss", "kl", "entropy", "mean_token_accuracy", "teacher_mass", "num_tokens"}
    assert set(out.metrics) == names
    assert not any(value.requires_grad for value in out.metrics.values())
    assert all(value.dim() == 0 for value in out.metrics.values())
    mass = batch.topk.logprobs[batch.mask].exp().sum(-1).mean()
    torch.testing.assert_close(out.metrics["teacher_mass"], mass.detach(), **EXACT)
    assert out.head.divergence.shape == (B, L)
    renamed = verl_names(out.metrics)
    assert {"actor/loss", "actor/kl_loss", "actor/entropy", "teacher_mass"} <= set(renamed)


@pytest.mark.parametrize("parts", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_distillation_over_micro_batches_sums_to_the_whole(parts: list[int]) -> None:
    batch = Batch()
    loss = FeedbackDistillationLoss(entropy_coef=0.02)
    total = batch.mask.sum()

    def of(rows: slice, count: Any) -> Tensor:
        teacher = TeacherTopK(batch.topk.ids[rows], batch.topk.logprobs[rows])
        return loss(
            batch.hidden[rows],
            batch.weight,
            batch.targets[rows],
            teacher,
            mask=batch.mask[rows],
            bias=batch.bias,
            num_tokens=count,
        ).loss

    starts = [sum(parts[:i]) for i in range(len(parts))]
    pieces = [slice(a, a + n) for a, n in zip(starts, parts, strict=True)]
    for count in (total, float(total)):
        whole = of(slice(None), None)
        assert_same(torch.stack([of(rows, count) for rows in pieces]).sum(), whole, batch)


def test_distillation_refuses_what_it_cannot_use() -> None:
    batch = Batch()
    call = (batch.hidden, batch.weight, batch.targets)
    with pytest.raises(ValueError, match=r"entropy_coef must be >= 0; got -1"):
        FeedbackDistillationLoss(entropy_coef=-1)
    with pytest.raises(TypeError, match=r"teacher must be TeacherHidden or TeacherTopK; got None"):
        FeedbackDistillationLoss()(*call, None, mask=batch.mask)
    with pytest.raises(ValueError, match=r"num_tokens must be positive.*got 0"):
        FeedbackDistillationLoss()(*call, batch.topk, mask=batch.mask, num_tokens=0)
    with pytest.raises(ValueError, match=r"divergence must be one of"):
        FeedbackDistillationLoss(divergence="kl")(*call, batch.topk, mask=batch.mask)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_a_batch_without_trained_tokens_is_zero_with_zero_gradients(entropy_coef: float) -> None:
    batch = Batch()
    nothing = torch.zeros_like(batch.mask)
    batch.mask = nothing
    ours = FeedbackDistillationLoss(entropy_coef=entropy_coef)(
        batch.hidden, batch.weight, batch.targets, batch.topk, mask=nothing, bias=batch.bias
    )
    for loss_type in LOSS_TYPES:
        grpo = GRPOLoss(
            loss_type=loss_type,
            epsilon_high=0.3,
            max_completion_length=8,
            beta=0.1,
            entropy_coef=entropy_coef,
        )
        others = batch.grpo(
            grpo,
            old_logprobs=batch.old,
            ref_logprobs=batch.ref,
            sampling_logprobs=batch.sampling,
        )
        for out in (ours, others):
            assert out.loss.item() == 0.0
            assert all((g == 0).all() for g in gradients(out.loss, batch))
            assert all(value.isfinite() for value in out.metrics.values())
