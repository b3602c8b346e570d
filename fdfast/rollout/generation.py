"""From problems to trajectories with verdicts: the one way in which attempts are made."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from fdfast.data.problems import Problem
from fdfast.lean import LeanPool
from fdfast.rollout.engine import Engine
from fdfast.rollout.judge import Judge
from fdfast.rollout.trajectory import SamplingOptions, ToolSource, Trajectory


def generate(
    problems: Sequence[Problem],
    policy: Engine,
    sampling: SamplingOptions,
    tools: ToolSource | None = None,
    *,
    prompt: Callable[[Problem], list[int]],
    lean: LeanPool | None = None,
    seed: int = 0,
    first: int = 0,
    timed: Callable[[str], AbstractContextManager[None]] = lambda stage: contextlib.nullcontext(),
) -> list[Trajectory]:
    """An attempt at each problem, checked by Lean.

    A trajectory is checked as soon as it ends, while the others go on.

    Args:
        problems: what is attempted; a problem that stands there twice is attempted twice.
        policy: samples.
        sampling: how.
        tools: what the model may call; None: nothing.
        prompt: a problem's token ids.
        lean: gives the verdicts; None for none. A chat question has none either way.
        seed: of all of them.
        first: the place of the first of them in the step; see `Engine.generate`.
        timed: a context manager for each of the stages `rollout` and `verify`, the wait for the
            last verdicts.

    Returns:
        One trajectory a problem, in order.

    Raises:
        InputError: a prompt, the model or its chat template does not do.
        MachineError: a tool, Lean or the engine met a fault of the machine.
    """
    with Judge(lean, problems, tools) as judge:
        with timed("rollout"):
            ended = policy.generate(
                [prompt(problem) for problem in problems],
                sampling,
                seed=seed,
                first=first,
                tools=tools,
                on_end=judge.submit,
            )
        with timed("verify"):
            return [judge.judged(number, trajectory) for number, trajectory in enumerate(ended)]
