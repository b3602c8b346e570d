"""Float32 masters of narrower weights: without them most updates of a bfloat16 model round to
nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class MasterWeights:
    """The float32 weights that the optimizer steps; a float32 model's are its own parameters.

    Args:
        model: whose parameters are trained.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.master: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.parameters.items()
        }

    def take_gradients(self) -> list[Tensor]:
        """Hand the model's gradients to the masters; returns the masters that have one. A narrow
        parameter gives its own away: the optimizer, which knows the masters alone, never clears it,
        and the next step's would be added to it.
        """
        for name, parameter in self.parameters.items():
            master = self.master[name]
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        return [m for m in self.master.values() if m.grad is not None]

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the stepped masters into the model."""
        for name, parameter in self.parameters.items():
            if self.master[name] is not parameter:
                parameter.copy_(self.master[name])
                self.master[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The masters that are not the model's own parameters."""
        return {n: m.detach() for n, m in self.master.items() if m is not self.parameters[n]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        for name, value in state.items():
            self.master[name].copy_(value)
