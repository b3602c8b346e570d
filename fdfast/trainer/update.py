"""The end of a step: the gradient, what is done with it, and what is left of one that is no use."""

import math
from pathlib import Path
from typing import Any

import torch

from fdfast.errors import MachineError
from fdfast.trainer.bad_steps import dump_bad_step
from fdfast.trainer.batch import Attempt
from fdfast.trainer.checkpoint import TrainState
from fdfast.trainer.ranks import Ranks
from fdfast.trainer.rollouts import step_seed, told
from fdfast.trainer.scoring import Scorer
from fdfast.trainer.sharding import whole
from fdfast.trainer.stages import Place


def gradients(state: TrainState, scorer: Scorer, attempts: list[Attempt]) -> dict[str, float]:
    """The step's gradient, from zero, and what was seen on the way."""
    torch.manual_seed(step_seed(scorer.config, state.step))  # of dropout, where a model has it
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    return scorer.score(told(attempts), backward=True)


def learning_rate(at: Place) -> float:
    """Of the step there; each stage has a schedule of its own."""
    optim, step = at.config.optim, at.step
    factor = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    if optim.lr_scheduler_type == "linear" and step >= optim.warmup_steps:
        factor = (optim.max_steps - step) / max(1, optim.max_steps - optim.warmup_steps)
    return optim.learning_rate * factor


def update(
    state: TrainState, at: Place, loss: float, *, rate_factor: float = 1.0
) -> dict[str, float]:
    """Clip, step the optimizer, let the teacher follow; where the loss or the gradient is not
    finite, nothing but the count of steps changes, and the gradient stays as it is.

    Args:
        state: with the step's gradient.
        at: the step's place.
        loss: of the step.
        rate_factor: what the learning rate is multiplied by.

    Returns:
        Of metrics.jsonl: grad_norm before clipping, learning_rate, teacher/updated, skipped.
    """
    optim = at.config.optim
    if at.index and not at.step and at.optimizer_state == "reset":
        state.optimizer.state.clear()
    rate = learning_rate(at) * rate_factor
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    masters = state.master.take_gradients()
    norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
    total = whole(norm)
    skipped = not (torch.isfinite(total) and math.isfinite(loss))
    with state.lock:
        state.changing = True
        if not skipped:
            limit = optim.max_grad_norm or float("inf")
            torch.nn.utils.clip_grads_with_norm_(masters, limit, total)
            state.optimizer.step()
            state.master.write_back()
        state.step += 1
        followed = not skipped and state.teacher.step(state.master.master, state.step)
        state.changing = False
    return {
        "grad_norm": float(total),
        "learning_rate": rate,
        "teacher/updated": float(followed),
        "skipped": float(skipped),
    }


def keep_bad_step(
    state: TrainState,
    at: Place,
    ranks: Ranks,
    attempts: list[Attempt],
    rows: list[dict[str, Any]],
    metrics: dict[str, Any],
) -> str:
    """Keep the batch of a skipped step, whose gradient is still there; a line about it.

    Raises:
        MachineError: the disk is full.
    """
    folder = Path(at.config.output_dir)
    try:
        return dump_bad_step(
            folder,
            state.step,
            rows=rows,
            attempts=attempts,
            metrics=metrics,
            weights=state.master.master,
            keep=at.config.guards.max_bad_step_dumps,
            writes=ranks.main,
        )
    except OSError as error:
        raise MachineError(
            f"{folder}: the batch of step {state.step} can't be kept ({error}); make room, or take "
            "guards.max_bad_step_dumps=0"
        ) from error
