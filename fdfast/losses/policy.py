"""The GRPO family over one `policy_head` call, alone or mixed with Feedback Distillation; TRL's
option names and conventions.

Legend: B sequences, L positions, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from fdfast.losses.output import LossOutput, masked_mean, masked_sum, normalizer
from fdfast.losses.tokens import Tokens, for_each_token
from fdfast.policy_head import policy_head
from fdfast.policy_head_loss import policy_head_loss
from fdfast.reference import k3, statistics_dtype, token_objective
from fdfast.types import DEFAULT_WORKSPACE_MB, PolicyHead, TeacherHidden, TeacherTopK

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


class GRPOLoss(torch.nn.Module):
    """Clipped policy gradient over whole sequences, with its normalisation counted over the whole
    batch.

    Normalisation: dapo, cispo and bnpo by trained tokens; grpo and sapo by trained tokens of each
    sequence, then by sequences; dr_grpo by sequences * max_completion_length. Each count is the
    global one that the caller gives, so micro- batches and ranks simply add up. GSPO (arXiv
    2507.18071) is loss_type="grpo", importance_sampling_level="sequence".

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
            are given: token or sequence, truncate (clamped into [clip_min, clip_max]) or mask (0
            outside).
        vllm_importance_sampling_clip_max: upper bound, or None.
        vllm_importance_sampling_clip_min: lower bound, or None.
        distillation_weight: w in [0, 1]: the loss is w of Feedback Distillation's, with its own
            normalisation by trained tokens, and 1 - w of this one.
        divergence: of the distillation, see `FeedbackDistillationLoss`.
        alpha: likewise.
        tail: likewise.
        grad_filter: see `policy_head`.
        workspace_mb: see `policy_head`.
        backend: see `policy_head`.
        group: see `policy_head`: weight, bias and the teacher's are then this rank's rows, all else
            is the same on every rank, and so are the loss and its metrics.
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
        distillation_weight: float = 0.0,
        divergence: str = "forward_kl",
        alpha: float = 0.5,
        tail: str = "truncate",
        grad_filter: float | None = None,
        workspace_mb: float = DEFAULT_WORKSPACE_MB,
        backend: str = "auto",
        group: Any = None,
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
        if not 0 <= distillation_weight <= 1:
            raise ValueError(
                f"GRPOLoss: distillation_weight must lie in [0, 1]; got {distillation_weight}"
            )
        self.distillation_weight = distillation_weight
        self.divergence, self.alpha, self.tail = divergence, alpha, tail
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
        self.group = group

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        advantages: Tensor,
        teacher: TeacherHidden | TeacherTopK | None = None,
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
            teacher: over the same tokens, with feedback; a constant. Wanted where
                distillation_weight is more than 0.
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
            beta > 0), sampling/* (if sampling_logprobs), distillation_kl (if there is a teacher),
            num_tokens.

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
        if self.distillation_weight and teacher is None:
            raise ValueError(
                f"GRPOLoss: distillation_weight={self.distillation_weight} wants a teacher; give "
                "it, or distillation_weight=0"
            )
        self._check(targets, advantages, old_logprobs, ref_logprobs, sampling_logprobs)
        trained = (
            torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        )
        dtype = statistics_dtype(hidden, weight)
        count = torch.as_tensor(normalizer(num_tokens, trained.sum(), "num_tokens"), dtype=dtype)
        entropy_weight = self.entropy_coef / count
        distilled = self.distillation_weight / count
        own_weights = self._token_weights(trained, num_tokens, num_sequences, dtype)
        tokens = Tokens(
            weights=(1 - self.distillation_weight) * own_weights,
            advantages=for_each_token(advantages, trained),
            old=None if old_logprobs is None else for_each_token(old_logprobs, trained),
            ref=None if ref_logprobs is None else for_each_token(ref_logprobs, trained),
            sampling=None
            if sampling_logprobs is None
            else for_each_token(sampling_logprobs, trained),
            entropy_weight=entropy_weight,
        )
        options = {
            "bias": bias,
            "temperature": self.temperature,
            "logit_softcap": self.logit_softcap,
            "mask": mask,
            "teacher": teacher,
            "divergence": self.divergence,
            "alpha": self.alpha,
            "tail": self.tail,
            "grad_filter": self.grad_filter,
            "workspace_mb": self.workspace_mb,
            "backend": self.backend,
            "group": self.group,
        }
        if self._each_token_alone(tokens):

            def token_loss(
                logprobs: Tensor, entropy: Tensor, divergence: Tensor, positions: Tensor
            ) -> Tensor:
                own = tokens.at(positions)
                per_token = self._per_token_loss(logprobs, own, None)[0]
                rewarded = own.weights * per_token - tokens.entropy_weight * entropy
                return rewarded if teacher is None else rewarded + distilled * divergence

            loss, head = policy_head_loss(hidden, weight, targets, token_loss, **options)
            with torch.no_grad():
                _, metrics = self._per_token_loss(head.logprobs, tokens, trained)
        else:
            head = policy_head(hidden, weight, targets, **options)
            per_token, metrics = self._per_token_loss(head.logprobs, tokens, trained)
            loss = masked_sum(tokens.weights * per_token, trained)
            loss = loss - tokens.entropy_weight * masked_sum(head.entropy, trained)
            if teacher is not None:
                loss = loss + distilled * masked_sum(head.divergence, trained)
            head = PolicyHead(*(field.detach() for field in head))
        beside = -tokens.entropy_weight * masked_sum(head.entropy, trained)
        if teacher is not None:
            metrics["distillation_kl"] = masked_mean(head.divergence, trained)
            beside = beside + distilled * masked_sum(head.divergence, trained)
        metrics |= {
            "loss": loss.detach(),
            "policy_loss": loss.detach() - beside,
            "entropy": masked_mean(head.entropy, trained),
            "num_tokens": trained.sum(),
        }
        return LossOutput(loss, metrics, head)

    def _each_token_alone(self, tokens: "Tokens") -> bool:
        """Whether a token's loss follows from the token alone, so that its gradient can be taken at
        once.
        """
        if self.importance_sampling_level == "sequence":
            return False
        corrected = tokens.sampling is not None and self.is_mode.startswith("sequence")
        return not corrected

    def _per_token_loss(
        self, logprobs: Tensor, tokens: "Tokens", trained: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token without its weight, and the metrics (of whole sequences, where
        `trained` is given).
        """
        old = logprobs.detach() if tokens.old is None else tokens.old
        log_ratio = logprobs - old
        ratio_weights = log_ratio
        if self.importance_sampling_level == "sequence":
            assert trained is not None
            length = trained.sum(1, keepdim=True).clamp(min=1)
            ratio_weights = (log_ratio * trained).sum(1, keepdim=True) / length
        per_token = token_objective(
            self.loss_type,
            ratio_weights,
            tokens.advantages,
            logprobs,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
        )
        metrics: dict[str, Tensor] = {}
        if trained is not None:
            metrics = self._clip_metrics(ratio_weights.detach().exp(), tokens.advantages, trained)
            metrics["ppo_kl"] = masked_mean(-log_ratio, trained)
        if tokens.sampling is not None:
            correction, difference = self._sampling_correction(old, tokens.sampling, trained)
            per_token = per_token * correction
            if trained is not None:
                ratio = correction.expand_as(old)
                metrics["sampling/sampling_logp_difference/mean"] = masked_mean(difference, trained)
                metrics["sampling/importance_sampling_ratio/mean"] = masked_mean(ratio, trained)
        if self.beta and tokens.ref is not None:
            per_token_kl = k3(logprobs, tokens.ref)
            per_token = per_token + self.beta * per_token_kl
            if trained is not None:
                metrics["kl"] = masked_mean(per_token_kl, trained)
        return per_token, metrics

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

    def _token_weights(
        self,
        trained: Tensor,
        num_tokens: Tensor | float | None,
        num_sequences: Tensor | float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """What each token's loss is multiplied by, so that the loss is their sum, (B, L)."""
        B = trained.new_tensor(len(trained), dtype=torch.int64)
        sequences = normalizer(num_sequences, B, "num_sequences")
        ones = trained.to(dtype)
        if self.loss_type in ("grpo", "sapo"):
            return ones / (trained.sum(1, keepdim=True).clamp(min=1) * sequences)
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length
            return ones / (sequences * self.max_completion_length)
        return ones / normalizer(num_tokens, trained.sum(), "num_tokens")

    def _clip_metrics(
        self, ratio: Tensor, advantages: Tensor, trained: Tensor
    ) -> dict[str, Tensor]:
        def share(clipped: Tensor) -> Tensor:
            clipped = clipped.expand_as(trained).to(ratio.dtype)
            if ratio.shape[1] > 1:
                return masked_mean(clipped, trained)
            # One ratio a sequence: TRL counts sequences, not their tokens.
            length = trained.sum(1)
            mean = (clipped * trained).sum(1) / length.clamp(min=1)
            return masked_mean(mean, length > 0)

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
        self, old: Tensor, sampling: Tensor, trained: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """p_train / p_sampler, bounded, and |their log difference|; a token without a sampling
        log-probability counts as 1.
        """
        known = ~sampling.isnan()
        if trained is not None:
            known = known & trained
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
        return ratio, difference.abs()
