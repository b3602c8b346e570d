"""Feedback Distillation: the student matches, on its own tokens, what the teacher says with
feedback in its prompt.

Legend: ... any leading shape, D hidden, V vocabulary, K top-k.
"""

from typing import Any

import torch
from torch import Tensor

from fdfast.losses.output import LossOutput, masked_mean, normalizer
from fdfast.policy_head_loss import policy_head_loss
from fdfast.types import DEFAULT_WORKSPACE_MB, TeacherHidden, TeacherTopK


class FeedbackDistillationLoss(torch.nn.Module):
    """sum over trained tokens of divergence(teacher, student), less an entropy bonus, over the
    global token count.

    The paper's loss (arXiv 2605.30861) is divergence="forward_kl" with TeacherTopK of K = 25 and
    tail="truncate". The default takes the whole vocabulary from the teacher's hidden states, which
    costs no more here and is exact. Dividing by the global number of trained tokens equals the
    paper's sum up to a constant of the batch; a mean by sequence or micro-batch would not, for it
    weighs short attempts up.

    Args:
        divergence: a name in divergences.TABLE.
        alpha: for jsd and skew_kl.
        tail: for TeacherTopK: truncate, bucket, renormalize.
        temperature: of the student's logits (the teacher has its own).
        logit_softcap: as the model's head has it; None for none.
        entropy_coef: >= 0, the weight of the mean entropy that is subtracted.
        grad_filter: see `policy_head`.
        workspace_mb: see `policy_head`.
        backend: see `policy_head`.
        group: see `policy_head`: weight, bias and the teacher's are then this rank's rows, all else
            is the same on every rank, and so are the loss and its metrics.
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        alpha: float = 0.5,
        tail: str = "truncate",
        temperature: float = 1.0,
        logit_softcap: float | None = None,
        entropy_coef: float = 0.0,
        grad_filter: float | None = None,
        workspace_mb: float = DEFAULT_WORKSPACE_MB,
        backend: str = "auto",
        group: Any = None,
    ) -> None:
        super().__init__()
        if entropy_coef < 0:
            raise ValueError(
                f"FeedbackDistillationLoss: entropy_coef must be >= 0; got {entropy_coef}"
            )
        self.entropy_coef = entropy_coef
        self.divergence, self.alpha, self.tail = divergence, alpha, tail
        self.temperature, self.logit_softcap = temperature, logit_softcap
        self.grad_filter, self.workspace_mb, self.backend = grad_filter, workspace_mb, backend
        self.group = group

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: TeacherHidden | TeacherTopK,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        num_tokens: Tensor | float | None = None,
    ) -> LossOutput:
        """The loss of one micro-batch.

        Args:
            hidden: (..., D) floating, the student's; differentiable.
            weight: (V, D) floating, its LM head; differentiable.
            targets: (...) int64, the student's own tokens.
            teacher: over the same tokens; a constant.
            mask: (...) bool, True where the model itself wrote the token; None for everywhere.
            bias: (V,) or None; differentiable.
            num_tokens: trained tokens of the whole batch, over micro-batches and ranks; None: of
                this call.

        Returns:
            LossOutput with the metrics loss, kl (mean divergence), entropy, mean_token_accuracy,
            teacher_mass, num_tokens.

        Raises:
            ValueError: as `policy_head`, or num_tokens is not positive.
            TypeError: as `policy_head`, or there is no teacher.
        """
        if not isinstance(teacher, (TeacherHidden, TeacherTopK)):
            raise TypeError(
                f"FeedbackDistillationLoss: teacher must be TeacherHidden or TeacherTopK; got "
                f"{type(teacher).__name__}"
            )
        trained = (
            torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        )
        count = normalizer(num_tokens, trained.sum(), "num_tokens")

        def token_loss(_: Tensor, entropy: Tensor, divergence: Tensor, __: Tensor) -> Tensor:
            return (divergence - self.entropy_coef * entropy) / count

        loss, head = policy_head_loss(
            hidden,
            weight,
            targets,
            token_loss,
            bias=bias,
            temperature=self.temperature,
            logit_softcap=self.logit_softcap,
            mask=mask,
            teacher=teacher,
            divergence=self.divergence,
            alpha=self.alpha,
            tail=self.tail,
            grad_filter=self.grad_filter,
            workspace_mb=self.workspace_mb,
            backend=self.backend,
            group=self.group,
        )
        metrics = {
            "loss": loss.detach(),
            "kl": masked_mean(head.divergence, trained),
            "entropy": masked_mean(head.entropy, trained),
            "mean_token_accuracy": masked_mean((head.argmax == targets).to(loss.dtype), trained),
            "teacher_mass": masked_mean(head.teacher_mass, trained),
            "num_tokens": trained.sum(),
        }
        return LossOutput(loss, metrics, head)
