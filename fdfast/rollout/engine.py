"""What every rollout engine does."""

from collections.abc import Sequence
from typing import Any, Protocol

from fdfast.rollout.trajectory import SamplingOptions, Trajectory
from fdfast.rollout.turns import MakeTools, OnEnd


class Engine(Protocol):
    """Samples trajectories from a policy, whose weights follow the trained model's.

    Attributes:
        tokenizer: of the model.
        idle_s: seconds of the latest `generate` in which nothing was sampled, since all
            trajectories waited for tools.
    """

    tokenizer: Any
    idle_s: float

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        seed: int,
        first: int = 0,
        tools: MakeTools | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Trajectory]:
        """One trajectory a prompt, in order.

        Args:
            prompts: token ids, none empty.
            options: how to sample.
            seed: of the whole step; the caller's random state is left as it was.
            first: prompt number n draws as number first + n of the step, so that a step may be
                made in parts, in any order and on any machine.
            tools: makes the tools of prompt number n; None: there are none.
            on_end: told of each trajectory as it ends, with its prompt's number, in this thread.

        Raises:
            InputError: the model or the chat template does not do.
            MachineError: a tool or the engine met a fault of the machine.
        """

    def update_weights(self, model: Any) -> None:
        """Sample from these weights from now on.

        Args:
            model: a causal LM of transformers, of the same shape.
        """

    def sleep(self) -> None:
        """Give the memory of weights and caches back until `update_weights` or `generate`."""

    def close(self) -> None:
        """Give everything back."""
