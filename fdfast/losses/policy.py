"""The GRPO family over one `policy_head` call; TRL's option names and conventions.

Legend: B sequences, L positions, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from fdfast.losses.output import LossOutput, masked_mean, masked_sum, normalizer
from fdfast.policy_head import DEFAULT_WORKSPACE_MB, policy_head
from fdfast.reference import k3, token_objective

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale_rewards: str = "group"
) -> Tensor:
    """Rewards minus their group's mean, scaled: (B,) with the generations of a prompt side by side
    -> (B,).

    Args:
        rewards: (B,) floating, B a multiple of num_generations.
        num_generations: generations a prompt.
        scale_rewards: group: divide by the group's standard deviation (Shao et al. 2024, arXiv
            2402.03300); batch: by
            the whole batch's (arXiv 2508.08221); none: not at all (Dr. GRPO, Liu et al. 2025, arXiv
            2503.20783).

    Raises:
        ValueError: sizes do not fit or no such scale.
    """
    if rewards.dim() != 1 or num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(
            "group_advantages: rewards must have shape (B,), B a multiple of num_generations; "
            f"got {tuple(rewards.shape)} and {num_generations}"
        )
    grouped = rewards.view(-1, num_generations)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale_rewards == "none":
        return centred.flatten()
    if scale_rewards == "group":
        std = grouped.std(1, keepdim=True) if num_generations > 1 else torch.zeros_like(centred)
    elif scale_rewards == "batch":
        std = rewards.std() if len(rewards) > 1 else rewards.new_zeros(())
    else:
        raise ValueError(
            f"group_advantages: scale_rewards must be group, batch or none; got {scale_rewards!r}"
        )
    return (centred / (std + 1e-4)).flatten()


class GRPOLoss(torch.nn.Module):
    """Clipped policy gradient over whole sequences, with its normalisation counted over the whole
    batch.

    Normalisation: dapo, cispo and bnpo by trained tokens; grpo and sapo by trained tokens of each
    sequence, then by
    sequences; dr_grpo by sequences * max_completion_length. Each count is the global one that the
    caller gives, so micro-
    batches and ranks simply add up. GSPO (arXiv 2507.18071) is loss_type="grpo",
    importance_sampling_level="sequence".

    Args:
        loss_type: grpo, bnpo, dr_grpo, dapo, cispo, sapo.
        epsilon: lower clip range.
        epsilon_high: upper clip range; None: epsilon. For cispo it is the cap of the ratio itself,
            and wanted.
        beta: weight of the k3 estimate of KL(policy || reference).
        entropy_coef: weight of the mean entropy that is subtracted.
        importance_sampling_level: token or sequence.
        temperature: of sampling; the logits are divided by it.
        logit_softcap: as the model's head has it; None for none.
        max_completion_length: for dr_grpo.
        sapo_temperature_pos: for sapo, where the advantage is positive.
        sapo_temperature_neg: for sapo, elsewhere.
        vllm_importance_sampling_mode: what is done with p_train / p_sampler when sampling log-probs
            are given:
            token or sequence, truncate (clamped into [clip_min, clip_max]) or mask (0 outside).
        vllm_importance_sampling_clip_max: upper bound, or None.
        vllm_importance_sampling_clip_min: lower bound, or None.
        grad_filter: see `policy_head`.
        workspace_mb: see `policy_head`.
        backend: see `policy_head`.
    """

    def __init__(
        self,
        *,
        loss_type: str = "dapo",
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        beta: float = 0.0,
        entropy_coef: float = 0.0,
        importance_sampling_level: str = "token",
        temperature: float = 1.0,
        logit_softcap: float | None = None,
        max_completion_length: int | None = None,
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        vllm_importance_sampling_mode: str = "sequence_mask",
        vllm_importance_sampling_clip_max: float | None = 3.0,
        vllm_importance_sampling_clip_min: float | None = None,
        grad_filter: float | None = None,
        workspace_mb: float = DEFAULT_WORKSPACE_MB,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("loss_type", loss_type, LOSS_TYPES),
            ("importance_sampling_level", importance_sampling_level, ("token", "sequence")),
            ("vllm_importance_sampling_mode", vllm_importance_sampling_mode, IS_MODES),
        ):
            if value not in known:
                raise ValueError(
                    f"GRPOLoss: {name} must be one of {', '.join(known)}; got {value!r}"
                )
        if loss_type == "cispo" and epsilon_high is None:
            raise ValueError(
                "GRPOLoss: cispo wants epsilon_high, the cap of the ratio itself (5.0, say)"
            )
        if loss_type == "dr_grpo" and not max_completion_length:
            raise ValueError("GRPOLoss: dr_grpo divides by max_completion_length; give it")
        if min(epsilon, beta, entropy_coef) < 0:
            raise ValueError(
                "GRPOLoss: epsilon, beta and entropy_coef must be >= 0; "
                f"got {epsilon}, {beta}, {entropy_coef}"
            )
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.epsilon = epsilon
        self.epsilon_high = epsilon if epsilon_high is None else epsilon_high
        self.beta, self.entropy_coef = beta, entropy_coef
        self.max_completion_length = max_completion_length
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.is_mode = vllm_importance_sampling_mode
        self.is_clip_max = vllm_importance_sampling_clip_max
        self.is_clip_min = vllm_importance_sampling_clip_min
        self.temperature, self.logit_softcap = temperature, logit_softcap
        self.grad_filter, self.workspace_mb, self.backend = grad_filter, workspace_mb, backend

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        advantages: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        sampling_logprobs: Tensor | None = None,
        num_tokens: Tensor | float | None = None,
        num_sequences: Tensor | float | None = None,
    ) -> LossOutput:
        """The loss of one micro-batch.

        Args:
            hidden: (B, L, D) floating; differentiable.
            weight: (V, D) floating; differentiable.
            targets: (B, L) int64.
            advantages: (B,), or (B, L) for one a token.
            mask: (B, L) bool, True where the model itself wrote the token; None for everywhere.
            bias: (V,) or None; differentiable.
            old_logprobs: (B, L), of the policy that the clip is around; None: of this very policy
                (on-policy).
            ref_logprobs: (B, L), of the reference; wanted when beta > 0.
            sampling_logprobs: (B, L), as the sampler reported them, NaN where it did not; None: no
                correction.
            num_tokens: trained tokens of the whole batch, over micro-batches and ranks; None: of
                this call.
            num_sequences: sequences of the whole batch; None: of this call.

        Returns:
            LossOutput with the metrics loss, policy_loss, entropy, ppo_kl, clip_ratio/*, kl (if
            beta > 0),
            sampling/* (if sampling_logprobs), num_tokens.

        Raises:
            ValueError: a shape or a value is off, or ref_logprobs is missing.
            TypeError: as `policy_head`.
        """
        if targets.dim() != 2:
            raise ValueError(
                f"GRPOLoss: targets must have shape (B, L); got {tuple(targets.shape)}"
            )
        if self.beta and ref_logprobs is None:
            raise ValueError(f"GRPOLoss: beta={self.beta} wants ref_logprobs; give them, or beta=0")
        self._check(targets, advantages, old_logprobs, ref_logprobs, sampling_logprobs)
        head = policy_head(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=self.temperature,
            logit_softcap=self.logit_softcap,
            mask=mask,
            grad_filter=self.grad_filter,
            workspace_mb=self.workspace_mb,
            backend=self.backend,
        )
        trained = (
            torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        )
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        logprobs = head.logprobs
        # Masked positions must not carry NaN into a sum over the sequence, nor into its gradient.
        advantages = torch.where(trained, advantages, 0.0)
        old = logprobs.detach() if old_logprobs is None else torch.where(trained, old_logprobs, 0.0)
        log_ratio = logprobs - old
        weights = log_ratio
        if self.importance_sampling_level == "sequence":
            weights = (log_ratio * trained).sum(1, keepdim=True) / trained.sum(
                1, keepdim=True
            ).clamp(min=1)
        per_token = token_objective(
            self.loss_type,
            weights,
            advantages,
            logprobs,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
        )
        metrics = self._clip_metrics(weights.detach().exp(), advantages, trained)
        if sampling_logprobs is not None:
            correction = self._sampling_correction(old, sampling_logprobs, trained, metrics)
            per_token = per_token * correction
        if self.beta and ref_logprobs is not None:
            per_token_kl = k3(logprobs, torch.where(trained, ref_logprobs, 0.0))
            per_token = per_token + self.beta * per_token_kl
            metrics["kl"] = masked_mean(per_token_kl, trained)
        policy_loss = self._normalized(per_token, trained, num_tokens, num_sequences)
        loss = policy_loss
        if self.entropy_coef:
            bonus = masked_sum(head.entropy, trained)
            loss = loss - self.entropy_coef * bonus / normalizer(
                num_tokens, trained.sum(), "num_tokens"
            )
        metrics |= {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "entropy": masked_mean(head.entropy, trained),
            "ppo_kl": masked_mean(-log_ratio, trained),
            "num_tokens": trained.sum(),
        }
        return LossOutput(loss, metrics, head)

    def _check(self, targets: Tensor, advantages: Tensor, *logprobs: Tensor | None) -> None:
        if advantages.shape not in (targets.shape[:1], targets.shape):
            raise ValueError(
                f"GRPOLoss: advantages must have shape {tuple(targets.shape[:1])} or "
                f"{tuple(targets.shape)}; "
                f"got {tuple(advantages.shape)}"
            )
        names = ("old_logprobs", "ref_logprobs", "sampling_logprobs")
        for name, tensor in zip(names, logprobs, strict=True):
            if tensor is not None and tensor.shape != targets.shape:
                raise ValueError(
                    f"GRPOLoss: {name} must have the shape of targets, {tuple(targets.shape)}; got "
                    f"{tuple(tensor.shape)}"
                )

    def _normalized(
        self,
        per_token: Tensor,
        trained: Tensor,
        num_tokens: Tensor | float | None,
        num_sequences: Tensor | float | None,
    ) -> Tensor:
        sequences = normalizer(
            num_sequences, trained.new_tensor(len(trained), dtype=torch.int64), "num_sequences"
        )
        if self.loss_type in ("grpo", "sapo"):
            lengths = trained.sum(1).clamp(min=1)
            return (torch.where(trained, per_token, 0.0).sum(1) / lengths).sum() / sequences
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length
            return masked_sum(per_token, trained) / (sequences * self.max_completion_length)
        return masked_sum(per_token, trained) / normalizer(num_tokens, trained.sum(), "num_tokens")

    def _clip_metrics(
        self, ratio: Tensor, advantages: Tensor, trained: Tensor
    ) -> dict[str, Tensor]:
        counted = trained
        if ratio.shape[1] == 1 and advantages.shape[1] == 1:  # one value a sequence, as TRL counts
            counted = trained.any(1, keepdim=True)

        def share(clipped: Tensor) -> Tensor:
            return masked_mean(clipped.expand_as(counted).to(ratio.dtype), counted)

        if self.loss_type == "sapo":
            return {}
        if self.loss_type == "cispo":
            return {"cispo_clip_ratio": share((ratio > self.epsilon_high) & (advantages > 0))}
        low = (ratio < 1 - self.epsilon) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        return {
            "clip_ratio/low_mean": share(low),
            "clip_ratio/high_mean": share(high),
            "clip_ratio/region_mean": share(low | high),
        }

    def _sampling_correction(
        self, old: Tensor, sampling: Tensor, trained: Tensor, metrics: dict[str, Tensor]
    ) -> Tensor:
        """p_train / p_sampler, bounded; a token without a sampling log-probability counts as 1."""
        known = trained & ~sampling.isnan()
        difference = torch.where(known, old.detach() - sampling, 0.0)
        level, action = self.is_mode.split("_")
        ratio = (difference.sum(1, keepdim=True) if level == "sequence" else difference).exp()
        if action == "truncate":
            if self.is_clip_min is not None or self.is_clip_max is not None:
                ratio = ratio.clamp(min=self.is_clip_min, max=self.is_clip_max)
        else:
            outside = torch.zeros_like(ratio, dtype=torch.bool)
            if self.is_clip_min is not None:
                outside |= ratio < self.is_clip_min
            if self.is_clip_max is not None:
                outside |= ratio > self.is_clip_max
            ratio = ratio.masked_fill(outside, 0.0)
        metrics["sampling/sampling_logp_difference/mean"] = masked_mean(difference.abs(), trained)
        metrics["sampling/importance_sampling_ratio/mean"] = masked_mean(
            ratio.expand_as(old), trained
        )
        return ratio
