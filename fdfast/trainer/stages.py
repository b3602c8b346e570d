"""The stages of a run: Feedback Distillation, then GRPO, say, each with settings of its own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fdfast.errors import InputError
from fdfast.trainer.settings import path_of, replaced

if TYPE_CHECKING:
    from fdfast.trainer.config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One stage; what is None is the run's own setting of that name.

    Attributes:
        max_steps: optimizer steps of the stage.
        optimizer_state: reset begins it with an optimizer that has seen nothing, keep hands the
            state over from the stage before.
        distillation_weight: 1 for Feedback Distillation, 0 for GRPO, a mix between.
        learning_rate: the peak; every stage has a warm-up and a schedule of its own.
        lr_scheduler_type: see the run's.
        warmup_steps: see the run's.
        prompts_per_step: see the run's.
        num_generations: see the run's.
        beta: see the run's; the reference is the student as the stage found it.
        entropy_coef: see the run's.
    """

    max_steps: int
    optimizer_state: Literal["reset", "keep"] = "reset"
    distillation_weight: float | None = None
    learning_rate: float | None = None
    lr_scheduler_type: Literal["constant_with_warmup", "linear"] | None = None
    warmup_steps: int | None = None
    prompts_per_step: int | None = None
    num_generations: int | None = None
    beta: float | None = None
    entropy_coef: float | None = None


@dataclass(frozen=True)
class Place:
    """Where in the stages a step lies.

    Attributes:
        index: of the stage.
        config: the run's settings with the stage's in them.
        step: finished steps of the stage.
        position: problems that the stages before took.
        optimizer_state: of the stage.
    """

    index: int
    config: "TrainConfig"
    step: int
    position: int
    optimizer_state: Literal["reset", "keep"]


def stage_configs(config: "TrainConfig") -> list["TrainConfig"]:
    """The settings of each stage; a run without stages is one.

    Raises:
        InputError: a stage's settings break a rule.
    """
    found = []
    for number, stage in enumerate(config.stages, 1):
        try:
            found.append(replaced(config, {"stages": ()} | _own(stage, config)))
        except InputError as error:
            said = str(error).removeprefix("config: ")
            raise InputError(f"config: stage {number}: {said}") from error
    return found or [config]


def _own(stage: Stage, config: "TrainConfig") -> dict[str, Any]:
    """What a stage sets, by path."""
    return {
        path_of(name, type(config), "stages"): value
        for name, value in vars(stage).items()
        if value is not None and name != "optimizer_state"
    }


def total_steps(config: "TrainConfig") -> int:
    """Optimizer steps of all stages."""
    return sum(stage.max_steps for stage in config.stages) or config.optim.max_steps


def distills(config: "TrainConfig") -> bool:
    """Whether a stage asks the teacher."""
    return any(settings.loss.distillation_weight > 0 for settings in stage_configs(config))


def samples_ahead(config: "TrainConfig") -> bool:
    """Whether the trained model samples while it is trained, for which it needs a copy."""
    elsewhere = config.rollout.use_vllm or config.ray.address
    return config.rollout.max_staleness > 0 and not elsewhere


def place(config: "TrainConfig", step: int) -> Place:
    """Where the step that follows `step` finished ones lies; past the end, in the last stage."""
    position = 0
    every = stage_configs(config)
    for index, settings in enumerate(every):
        last = index == len(every) - 1
        if step < settings.optim.max_steps or last:
            kept = config.stages[index].optimizer_state if config.stages else "keep"
            return Place(index, settings, step, position, kept)
        step -= settings.optim.max_steps
        position += settings.optim.max_steps * settings.rollout.prompts_per_step
    raise AssertionError("there is a stage at least")
