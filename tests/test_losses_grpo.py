"""The GRPO family against plain PyTorch with stored logits: values, gradients, metrics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fdfast.losses import FeedbackDistillationLoss, GRPOLoss, group_advantages, verl_names
from fdfast.losses.policy import IS_MODES, LOSS_TYPES
from tests.helpers import F64, FLOAT64_BACKENDS
from tests.loss_batch import (
    EXACT,
    NAN,
    B,
    Batch,
    L,
    assert_same,
    gradients,
    mean_over,
    stored_logits,
    stored_logprobs,
)


def plain_grpo(
    batch: Batch,
    loss_type: str,
    *,
    level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float = 0.3,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    on_policy: bool = False,
    correction: Tensor | None = None,
    max_completion_length: int = 8,
) -> Tensor:
    """The loss as TRL writes it, sequence by sequence and token by token in Python."""
    logprobs = stored_logprobs(batch, temperature)
    entropy = torch.distributions.Categorical(logits=stored_logits(batch, temperature)).entropy()
    old = logprobs.detach() if on_policy else batch.old
    sums, tokens, entropies = [], [], []
    for b in range(B):
        positions = [i for i in range(L) if batch.mask[b, i]]
        ratios = [logprobs[b, i] - old[b, i] for i in positions]
        if level == "sequence":
            ratios = [torch.stack(ratios).mean()] * len(positions)
        each = []
        for i, log_ratio in zip(positions, ratios, strict=True):
            A, r = batch.advantages[b], log_ratio.exp()
            if loss_type == "cispo":
                term = -torch.clamp(r, max=epsilon_high).detach() * A * logprobs[b, i]
            elif loss_type == "sapo":
                tau = 1.0 if A > 0 else 1.05
                term = -A * torch.sigmoid(tau * (r - 1)) * 4 / tau
            else:
                term = -torch.min(r * A, torch.clamp(r, 1 - epsilon, 1 + epsilon_high) * A)
            if correction is not None:
                term = term * correction[b, i]
            if beta:
                x = batch.ref[b, i] - logprobs[b, i]
                term = term + beta * (x.exp() - x - 1)
            each.append(term)
            entropies.append(entropy[b, i])
        sums.append(torch.stack(each).sum())
        tokens.append(len(positions))
    total = torch.stack(sums).sum()
    if loss_type in ("grpo", "sapo"):
        policy = torch.stack([s / n for s, n in zip(sums, tokens, strict=True)]).mean()
    elif loss_type == "dr_grpo":
        policy = total / (B * max_completion_length)
    else:
        policy = total / sum(tokens)
    return policy - entropy_coef * torch.stack(entropies).mean()


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize(("beta", "entropy_coef"), [(0.0, 0.0), (0.04, 0.01)])
def test_every_loss_of_the_family_is_trls(
    backend: str, loss_type: str, level: str, on_policy: bool, beta: float, entropy_coef: float
) -> None:
    batch = Batch()
    loss = GRPOLoss(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=0.2,
        epsilon_high=0.3,
        beta=beta,
        entropy_coef=entropy_coef,
        temperature=0.9,
        max_completion_length=8,
        backend=backend,
    )
    ours = batch.grpo(
        loss,
        old_logprobs=None if on_policy else batch.old,
        ref_logprobs=batch.ref if beta else None,
    )
    plain = plain_grpo(
        batch,
        loss_type,
        level=level,
        beta=beta,
        entropy_coef=entropy_coef,
        temperature=0.9,
        on_policy=on_policy,
    )
    assert_same(ours.loss, plain, batch)


@pytest.mark.parametrize("mode", IS_MODES)
@pytest.mark.parametrize("bounds", [(None, 1.3), (0.8, 1.3), (0.8, None), (None, None)])
@pytest.mark.parametrize("missing", [False, True])
def test_the_samplers_correction_is_trls(
    mode: str, bounds: tuple[float | None, float | None], missing: bool
) -> None:
    batch, (low, high) = Batch(), bounds
    if missing:  # a trained token that the sampler reported nothing for: its ratio is 1
        batch.sampling[0, 2] = NAN
    loss = GRPOLoss(
        epsilon_high=0.3,
        beta=0.1,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=high,
        vllm_importance_sampling_clip_min=low,
    )
    ours = batch.grpo(
        loss, old_logprobs=batch.old, ref_logprobs=batch.ref, sampling_logprobs=batch.sampling
    )
    known = batch.mask & ~batch.sampling.isnan()
    difference = torch.where(known, batch.old - batch.sampling, 0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True).expand(B, L)
    ratio = difference.exp()
    floor, cap = -math.inf if low is None else low, math.inf if high is None else high
    if mode.endswith("truncate"):
        ratio = ratio.clamp(floor, cap)
    else:
        ratio = torch.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)
    plain = plain_grpo(batch, "dapo", beta=0.1, correction=ratio)
    assert_same(ours.loss, plain, batch)
    seen = ours.metrics["sampling/importance_sampling_ratio/mean"]
    torch.testing.assert_close(seen, mean_over(ratio, batch.mask), **EXACT)
    apart = torch.where(known, (batch.old - batch.sampling).abs(), 0.0)
    seen = ours.metrics["sampling/sampling_logp_difference/mean"]
    torch.testing.assert_close(seen, mean_over(apart, batch.mask), **EXACT)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("parts", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_micro_batches_sum_to_the_whole(loss_type: str, level: str, parts: list[int]) -> None:
    batch = Batch()
    loss = GRPOLoss(
        loss_type=loss_type,
        epsilon_high=0.3,
        beta=0.04,
        entropy_coef=0.01,
        max_completion_length=8,
        importance_sampling_level=level,
    )

    def of(rows: slice, **counts: Any) -> Tensor:
        return batch.grpo(
            loss,
            rows,
            old_logprobs=batch.old[rows],
            ref_logprobs=batch.ref[rows],
            sampling_logprobs=batch.sampling[rows],
            **counts,
        ).loss

    starts = [sum(parts[:i]) for i in range(len(parts))]
    pieces = [slice(a, a + n) for a, n in zip(starts, parts, strict=True)]
    counts = {"num_tokens": batch.mask.sum(), "num_sequences": B}
    together = torch.stack([of(rows, **counts) for rows in pieces]).sum()
    assert_same(together, of(slice(None)), batch)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_may_be_one_a_token_with_junk_where_masked(loss_type: str, level: str) -> None:
    batch = Batch()
    loss = GRPOLoss(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=0.3,
        max_completion_length=8,
    )
    plain = batch.grpo(loss, old_logprobs=batch.old).loss
    batch.advantages = batch.advantages[:, None].expand(B, L).masked_fill(~batch.mask, NAN)
    assert_same(batch.grpo(loss, old_logprobs=batch.old).loss, plain, batch)


def test_on_policy_gradient_is_the_plain_policy_gradient() -> None:
    batch = Batch()
    ours = batch.grpo(GRPOLoss(loss_type="bnpo")).loss
    plain = -mean_over(stored_logprobs(batch) * batch.advantages[:, None], batch.mask)
    for one, other in zip(gradients(ours, batch), gradients(plain, batch), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_metrics_are_named_as_trls_and_right() -> None:
    batch = Batch()
    out = batch.grpo(
        GRPOLoss(epsilon_high=0.3, beta=0.1), old_logprobs=batch.old, ref_logprobs=batch.ref
    )
    assert set(out.metrics) == {
        "loss",
        "policy_loss",
        "entropy",
        "ppo_kl",
        "kl",
        "num_tokens",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
    }
    assert not any(value.requires_grad for value in out.metrics.values())
    logprobs, A, mask = stored_logprobs(batch).detach(), batch.advantages[:, None], batch.mask
    ratio = (logprobs - batch.old).exp()
    low, high = (ratio < 0.8) & (A < 0), (ratio > 1.3) & (A > 0)
    x = batch.ref - logprobs
    for name, each in (
        ("ppo_kl", batch.old - logprobs),
        ("kl", x.exp() - x - 1),
        ("clip_ratio/low_mean", low.double()),
        ("clip_ratio/high_mean", high.double()),
        ("clip_ratio/region_mean", (low | high).double()),
    ):
        assert mean_over(each, mask) > 0 or name == "ppo_kl"
        torch.testing.assert_close(out.metrics[name], mean_over(each, mask), **EXACT)
    assert {"actor/pg_loss", "actor/kl_loss", "actor/pg_clipfrac"} <= set(verl_names(out.metrics))
    cispo = batch.grpo(GRPOLoss(loss_type="cispo", epsilon_high=1.2), old_logprobs=batch.old)
    clipped = ((ratio > 1.2) & (A > 0)).double()
    torch.testing.assert_close(cispo.metrics["cispo_clip_ratio"], mean_over(clipped, mask), **EXACT)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_by_hand(scale: str) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=F64)
    ours = group_advantages(rewards, 3, scale_rewards=scale)
    centred = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0], dtype=F64)
    # Sample standard deviations: of (1, 0, 0), and of all six (mean 2/3).
    std = {"group": math.sqrt(1 / 3), "batch": math.sqrt(4 / 15), "none": 0.0}[scale]
    plain = centred if scale == "none" else centred / (std + 1e-4)
    torch.testing.assert_close(ours, plain, **EXACT)


def test_group_advantages_of_single_generations_are_zero_and_finite() -> None:
    for scale in ("group", "batch", "none"):
        for rewards in (torch.tensor([1.0, 0.5]), torch.tensor([1.0])):
            assert (group_advantages(rewards, 1, scale_rewards=scale) == 0).all()


def test_group_advantages_refuse_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"group_advantages: rewards must have shape \(B,\)"):
        group_advantages(torch.zeros(5), 2)
    with pytest.raises(ValueError, match=r"scale_rewards must be group, batch or none; got 'std'"):
        group_advantages(torch.zeros(4), 2, scale_rewards="std")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token"),
        ({"vllm_importance_sampling_mode": "clip"}, "vllm_importance_sampling_mode must be one of"),
        ({"loss_type": "cispo"}, "cispo wants epsilon_high"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"beta": -0.1}, "must be >= 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as seen:
        GRPOLoss(**options)
    assert str(seen.value).startswith("GRPOLoss: ")


def test_wrong_arguments_are_named() -> None:
    batch, loss = Batch(), GRPOLoss()
    call = (batch.hidden, batch.weight, batch.targets)
    with pytest.raises(ValueError, match=r"GRPOLoss: targets must have shape \(B, L\); got \(6,\)"):
        loss(batch.hidden[0], batch.weight, batch.targets[0], batch.advantages)
    with pytest.raises(
        ValueError, match=r"advantages must have shape \(4,\) or \(4, 6\); got \(3,"
    ):
        loss(*call, batch.advantages[1:], mask=batch.mask)
    with pytest.raises(ValueError, match=r"old_logprobs must have the shape of targets"):
        loss(*call, batch.advantages, mask=batch.mask, old_logprobs=batch.old[1:])
    with pytest.raises(ValueError, match=r"beta=0.1 wants ref_logprobs"):
        GRPOLoss(beta=0.1)(*call, batch.advantages, mask=batch.mask)
    with pytest.raises(ValueError, match=r"num_sequences must be positive"):
        loss(*call, batch.advantages, mask=batch.mask, num_sequences=-1)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("evidence", ["hidden", "topk"])
def test_a_mix_with_distillation_is_the_convex_sum_of_both_losses(backend, weight, level, evidence):
    """Value and every gradient, in one call."""
    batch = Batch()
    teacher = batch.teacher if evidence == "hidden" else batch.topk
    common = {"backend": backend, "entropy_coef": 0.0}
    grpo = {"loss_type": "grpo" if level == "sequence" else "dapo", "beta": 0.1}
    grpo |= {"importance_sampling_level": level, "epsilon_high": 0.3}
    given = {"mask": batch.mask, "bias": batch.bias}
    about = {"old_logprobs": batch.old, "ref_logprobs": batch.ref}
    x = (batch.hidden, batch.weight, batch.targets)
    mixed = GRPOLoss(**grpo, distillation_weight=weight, **common | {"entropy_coef": 0.05})
    output = mixed(*x, batch.advantages, teacher, **given, **about)
    seen = [output.loss, *torch.autograd.grad(output.loss, batch.leaves())]
    alone = GRPOLoss(**grpo, **common)(*x, batch.advantages, **given, **about)
    distilled = FeedbackDistillationLoss(**common)(*x, teacher, **given)
    bonus = FeedbackDistillationLoss(**common | {"entropy_coef": 0.05})(*x, teacher, **given)
    expected = (1 - weight) * alone.loss + weight * distilled.loss + (bonus.loss - distilled.loss)
    right = [expected, *torch.autograd.grad(expected, batch.leaves())]
    for ours, theirs in zip(seen, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    kl = distilled.metrics["kl"]
    torch.testing.assert_close(output.metrics["distillation_kl"], kl, check_dtype=False)
    torch.testing.assert_close(
        output.metrics["policy_loss"], (1 - weight) * alone.loss.detach(), rtol=1e-6, atol=1e-9
    )


def test_a_mix_wants_a_teacher_and_a_weight_that_is_a_share():
    batch = Batch()
    with pytest.raises(ValueError, match="wants a teacher"):
        batch.grpo(GRPOLoss(distillation_weight=0.5))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; got 1.5"):
        GRPOLoss(distillation_weight=1.5)
