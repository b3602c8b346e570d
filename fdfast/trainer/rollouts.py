"""The stages that make a step's attempts: rollout, Lean's verdicts, feedback, teacher's prompts."""

import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from fdfast.data import base_theorems_path
from fdfast.data.problems import Problem, questions_path, read_problems
from fdfast.errors import InputError, MachineError
from fdfast.feedback import FeedbackItem, FeedbackProvider
from fdfast.lean import LeanPool
from fdfast.lean.statement import complete_header
from fdfast.lean.tools import Limits, tool_schemas
from fdfast.losses import group_advantages
from fdfast.rollout import Engine, SamplingOptions, Toolboxes, Trajectory, generate
from fdfast.rollout.ray_fleet import RayFleet
from fdfast.trainer.batch import Attempt, Prompts
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.metrics import Clock
from fdfast.trainer.ranks import Ranks


class Weights(Protocol):
    """What is sampled from: `TrainState`."""

    def model_to_sample(self) -> object:
        """The student with all of its weights, or a copy brought up to date; a collective of the
        ranks.
        """

    @property
    def step(self) -> int:
        """How often it was changed."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held, nobody changes it."""


@dataclasses.dataclass
class Rollouts:
    """Makes attempts.

    Attributes:
        config: of the run.
        engine: samples; a fleet has Lean and tools of its own.
        lean: checks; None for chat questions.
        prompts: of student and teacher.
        provider: of feedback; None gives none, and teacher's prompts are the student's.
        synced_step: the step whose weights the engine has.
        may_fail: whether feedback may fail for all attempts of a step.
        ranks: that share each step's problems; a problem's attempts stay on one.
        sampling: held while the engine is at work, for it can do one thing at a time.
        telling: the same, of the provider.
    """

    config: TrainConfig
    engine: Engine | RayFleet
    lean: LeanPool | None
    prompts: Prompts
    provider: FeedbackProvider | None
    synced_step: int | None = None
    may_fail: bool = False
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    sampling: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    telling: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def attempts(
        self,
        problems: Sequence[Problem],
        num_generations: int,
        seed: int,
        weights: Weights,
        clock: Clock,
        *,
        feedback: bool = True,
    ) -> tuple[list[Attempt], dict[str, float]]:
        """Both stages, one after the other; see `sampled` and `with_feedback`."""
        plain, step = self.sampled(problems, num_generations, seed, weights, clock)
        return self.with_feedback(plain, clock, step=step + 1) if feedback else (plain, {})

    def sampled(
        self,
        problems: Sequence[Problem],
        num_generations: int,
        seed: int,
        weights: Weights,
        clock: Clock,
    ) -> tuple[list[Attempt], int]:
        """This rank's attempts with verdict and advantage, those at one problem together.

        Args:
            problems: of all ranks, each attempted num_generations times.
            num_generations: attempts at each.
            seed: of the sampling.
            weights: what is sampled from.
            clock: of the stages.

        Returns:
            The attempts, their feedback empty, and the step of the weights that they are from.

        Raises:
            MachineError: a stage met a fault of the machine.
        """
        with self.sampling:
            with weights.lock:
                step = weights.step
                if self.synced_step != step:
                    with clock("weight_sync"):
                        self.engine.update_weights(weights.model_to_sample())
                    self.synced_step = step
            first, own = self.ranks.share(problems)
            every = [problem for problem in own for _ in range(num_generations)]
            with self.ranks.together():
                trajectories = self._trajectories(every, seed, first * num_generations, clock)
            self.engine.sleep()
        return self._plain(every, trajectories, num_generations), step

    def with_feedback(
        self, plain: list[Attempt], clock: Clock, *, step: int
    ) -> tuple[list[Attempt], dict[str, float]]:
        """Attempts with feedback and the teacher's prompts.

        Args:
            plain: as `sampled` makes them.
            clock: of the stages.
            step: that they are for, for a message.

        Returns:
            The attempts, feedback None where it failed, and what the provider counted.

        Raises:
            MachineError: feedback failed for all.
        """
        with self.telling, clock("feedback"):
            if self.provider is None:
                return plain, {}
            return self._with_feedback(plain, self.provider, step=step)

    def _trajectories(
        self, problems: Sequence[Problem], seed: int, first: int, clock: Clock
    ) -> list[Trajectory]:
        options = sampling_options(self.config)
        if isinstance(self.engine, RayFleet):
            return self.engine.attempt(
                problems, options, prompt=self.prompts.student, seed=seed, timed=clock
            )
        with self._toolboxes() as toolboxes:
            return generate(
                problems,
                self.engine,
                options,
                toolboxes,
                prompt=self.prompts.student,
                lean=self.lean,
                seed=seed,
                first=first,
                timed=clock,
            )

    def _toolboxes(self) -> AbstractContextManager[Toolboxes | None]:
        if not self.config.rollout.tools:
            return contextlib.nullcontext()
        assert self.lean is not None
        return Toolboxes(
            self.lean,
            libraries=tool_libraries(self.config),
            limits=Limits(check_seconds=self.config.lean.timeout_s),
        )

    def _plain(
        self, problems: Sequence[Problem], trajectories: Sequence[Trajectory], num_generations: int
    ) -> list[Attempt]:
        """Attempts before feedback; a proof is worth 1, all else 0."""
        rewards = [float(t.verdict is not None and t.verdict.proved) for t in trajectories]
        shares = self.ranks.every(rewards)
        scale, rank = self.config.loss.scale_rewards, self.ranks.rank
        start = sum(map(len, shares[:rank]))
        whole = torch.tensor([reward for share in shares for reward in share])
        every: list[float] = group_advantages(whole, num_generations, scale_rewards=scale).tolist()
        advantages = every[start : start + len(rewards)]
        return [
            Attempt(problem, trajectory, trajectory.prompt_ids, advantage=advantage)
            for problem, trajectory, advantage in zip(
                problems, trajectories, advantages, strict=True
            )
        ]

    def _with_feedback(
        self, plain: list[Attempt], provider: FeedbackProvider, *, step: int
    ) -> tuple[list[Attempt], dict[str, float]]:
        counters = provider.counters
        before = None if counters is None else dataclasses.replace(counters)
        with self.ranks.together():
            texts = provider.feedback_many([_item(a, self._tool_names()) for a in plain])
            attempts = [self._told(a, text) for a, text in zip(plain, texts, strict=True)]
        given = self.ranks.sums({"all": len(texts), "told": len(told(attempts))})
        with self.ranks.together():
            if not given["told"] and not self.may_fail:
                raise MachineError(
                    f"step {step}: feedback {self.config.feedback.source!r} failed for all "
                    f"{given['all']:.0f} attempts; the latest: {provider.last_failure}; mend that, "
                    "or let another source step in (feedback.on_failure), and --resume"
                )
        if counters is None or before is None:
            return attempts, {}
        return attempts, self.ranks.sums(counters.metrics_since(before))

    def _told(self, attempt: Attempt, text: str | None) -> Attempt:
        """With the teacher's prompt for this feedback."""
        if text is None:
            return dataclasses.replace(attempt, feedback=None)
        ids, clipped = self.prompts.teacher(attempt.problem, text)
        return dataclasses.replace(
            attempt, teacher_prompt_ids=ids, feedback=text, feedback_clipped=clipped
        )

    def _tool_names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.prompts.tools)


def check_for_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """What several ranks do not do.

    Raises:
        InputError: the settings want it.
    """
    if ranks.size == 1:
        return
    if config.rollout.use_vllm and config.vllm.mode == "server":
        raise InputError(
            f"vllm.mode 'server' with {ranks.size} ranks: each would send it its weights; take "
            "vllm.mode 'colocate', or one rank"
        )
    alone = {
        "rollout.max_staleness": config.rollout.max_staleness > 0,
        "ray.address": bool(config.ray.address),
        "lora.use_peft": config.lora.use_peft,
        "teacher.kind live": config.teacher.kind == "live",
        "teacher.scoring_dtype": bool(config.teacher.scoring_dtype),
        "teacher.master_device": bool(config.teacher.master_device),
    }
    if refused := [name for name, asked in alone.items() if asked]:
        raise InputError(f"{refused[0]} is for one rank; got {ranks.size}: drop it, or take one")
    if config.model.vocabulary_parallel and ranks.device != torch.device("cpu"):
        raise InputError(
            f"model.vocabulary_parallel is for ranks on CPUs; got {ranks.size} on {ranks.device}: "
            "take false"
        )
    own = "self" in (config.feedback.source, config.feedback.on_failure)
    if own and config.feedback.self_model == "teacher":
        raise InputError(
            f"feedback.self_model 'teacher' with {ranks.size} ranks: none has the whole teacher; "
            "take feedback.self_model 'initial', or one rank"
        )


def told(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Those that are trained on: their feedback did not fail."""
    return [a for a in attempts if a.feedback is not None]


def check_problems(problems: Sequence[Problem], prompts: Prompts, lean: LeanPool | None) -> None:
    """What is wrong with a problem is an error now, not hours later.

    Raises:
        InputError: a prompt is too long, or a header imports what this Lean has not.
    """
    for problem in problems:
        prompts.student(problem)
        if lean is not None and problem.theorem is not None:
            complete_header(lean.toolchain, problem.theorem.header)


def step_seed(config: TrainConfig, step: int) -> int:
    """All randomness of a step follows from this, so a resumed run needs no random state."""
    return config.seed * 1_000_003 + step


def sampling_options(config: TrainConfig) -> SamplingOptions:
    """How the settings sample."""
    return SamplingOptions(
        max_completion_length=config.rollout.max_completion_length,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        stop_strings=config.rollout.stop_strings,
        max_tool_calling_iterations=config.rollout.max_tool_calling_iterations,
        max_tool_tokens=config.rollout.max_tool_tokens,
    )


def tool_libraries(config: TrainConfig) -> dict[str, Path]:
    """The folders that the model may search, by name.

    Raises:
        InputError: one is no folder, or two have one name.
    """
    folders: dict[str, Path] = {}
    for text in config.rollout.tool_libraries:
        path = Path(text).expanduser().resolve()
        if not path.is_dir():
            raise InputError(f"config: rollout.tool_libraries must be folders; {text!r} is none")
        if path.name in folders:
            raise InputError(
                f"config: rollout.tool_libraries {folders[path.name]} and {path} have the same "
                "last name, by which the model knows them; rename one, or link to it"
            )
        folders[path.name] = path
    return folders


def schemas(config: TrainConfig) -> list[dict[str, object]]:
    """The tools that the chat template shows."""
    return tool_schemas(search=bool(config.rollout.tool_libraries)) if config.rollout.tools else []


def read_split(config: TrainConfig, split: str) -> list[Problem]:
    """The problems of a split, "" for all.

    Raises:
        InputError: no such data set, a malformed record, or none left.
    """
    packaged = {"base_theorems": base_theorems_path, "questions": questions_path}
    data = config.data
    path = packaged[data.dataset]() if data.dataset in packaged else Path(data.dataset)
    return read_problems(path, task=data.task, split=split or None, names=data.problem_names)


def lean_pool(config: TrainConfig) -> AbstractContextManager[LeanPool | None]:
    """One pool of Lean processes for the whole run; None for chat questions."""
    if config.data.task != "lean":
        return contextlib.nullcontext()
    return LeanPool(workers=config.lean.workers, timeout_s=config.lean.timeout_s)


def _item(attempt: Attempt, tools: tuple[str, ...]) -> FeedbackItem:
    return FeedbackItem(
        attempt.problem,
        attempt.completion.text,
        attempt.completion.verdict,
        proof=attempt.completion.proof,
        truncated=attempt.completion.truncated,
        tools=tools,
        tool_calls=tuple(attempt.completion.tool_calls),
    )
