"""The teacher: a copy of the student that follows it slowly, or not at all."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fdfast.errors import InputError


class EMATeacher:
    """mu <- alpha mu + (1 - alpha) theta every `every` optimizer steps (arXiv 2605.30861).

    The master copy is float32 whatever the model's dtype: an average kept in bfloat16 stalls, since
    most of its updates round to nothing. `alpha=1` is a frozen teacher and keeps no master.

    Args:
        student: the model that is trained; the teacher begins as its copy.
        alpha: in [0, 1]; the paper takes 0.9.
        every: optimizer steps between updates; the paper takes 5.
    """

    def __init__(self, student: torch.nn.Module, *, alpha: float = 0.9, every: int = 5) -> None:
        if not 0 <= alpha <= 1 or every < 1:
            raise InputError(
                f"EMATeacher: alpha must lie in [0, 1] and every be at least 1; got {alpha}, "
                f"{every}"
            )
        self.alpha, self.every = alpha, every
        self.model: Any = copy.deepcopy(student).eval().requires_grad_(False)
        # A float32 parameter is its own master; narrower ones have one beside them.
        self.master: dict[str, Tensor] = {}
        if not self.frozen:
            self.master = {
                name: p.detach() if p.dtype == torch.float32 else p.detach().float()
                for name, p in self.model.named_parameters()
            }

    @property
    def frozen(self) -> bool:
        """Whether the teacher stays what it was."""
        return self.alpha == 1.0

    @torch.no_grad()
    def step(self, student: Mapping[str, Tensor], num_steps: int) -> bool:
        """Follow the student if optimizer step number `num_steps` is due; says whether it did.

        Args:
            student: its weights by name; float32 masters where it has them.
            num_steps: finished optimizer steps, from 1.
        """
        if self.frozen or num_steps % self.every:
            return False
        teacher = dict(self.model.named_parameters())
        masters = [self.master[name] for name in student]
        thetas = [theta.detach().float() for theta in student.values()]
        torch._foreach_lerp_(masters, thetas, 1.0 - self.alpha)
        for name, master in zip(student, masters, strict=True):
            if teacher[name].dtype != torch.float32:
                teacher[name].copy_(master)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The master copy (or, of a frozen teacher, the model itself) with its settings."""
        weights = self.master or dict(self.model.named_parameters())
        return {"alpha": self.alpha, "every": self.every, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; alpha and every stay those of this teacher.

        Raises:
            InputError: the weights are of another model.
        """
        teacher = dict(self.model.named_parameters())
        weights: dict[str, Tensor] = state["weights"]
        if weights.keys() != teacher.keys():
            odd = sorted(weights.keys() ^ teacher.keys())[0]
            raise InputError(f"EMATeacher: the saved teacher is of another model: parameter {odd}")
        for name, value in weights.items():
            teacher[name].copy_(value)
            if name in self.master:
                self.master[name].copy_(value)
