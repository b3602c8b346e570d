"""`fdfast rollout`: the trainer's attempts without its updates, kept in files."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdfast.data.problems import Problem
from fdfast.errors import InputError
from fdfast.interrupts import sigterm_as_interrupt
from fdfast.models import find_device, load_model
from fdfast.rollout.records import Record, RecordWriter, make_record
from fdfast.trainer.batch import Attempt, Prompts
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.engines import make_engine
from fdfast.trainer.feedback import check_key, make_provider
from fdfast.trainer.metrics import Clock
from fdfast.trainer.rollouts import (
    Rollouts,
    check_problems,
    lean_pool,
    read_split,
    schemas,
    step_seed,
)
from fdfast.trainer.scoring import token_logprobs
from fdfast.trainer.screen import Screen


@dataclass(frozen=True)
class Student:
    """What attempts: a model that nobody trains.

    Attributes:
        model: a causal LM.
        step: steps that it was trained here.
    """

    model: Any
    step: int = 0

    def model_to_sample(self) -> Any:
        """The model."""
        return self.model

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Nobody changes it."""
        return nullcontext()


def collect(
    config: TrainConfig,
    folder: Path,
    *,
    limit: int | None = None,
    feedback: bool = True,
    quiet: bool = False,
) -> None:
    """Attempt problems and keep the attempts in `folder`, as they come.

    The teacher is the student itself with the feedback in its prompt.

    Args:
        config: every setting; of the trainer's stages it takes those before the update.
        folder: gets trajectories.jsonl, and at the end trajectories.parquet.
        limit: the first problems alone; None for all.
        feedback: whether feedback is asked for, and both views of the tokens are computed.
        quiet: print nothing.

    Raises:
        InputError: a setting, data set or model is off, or the folder has attempts already.
        MachineError: the machine lacks something: Lean, disk, a package.
    """
    lines, table = folder / "trajectories.jsonl", folder / "trajectories.parquet"
    if lines.exists() and lines.stat().st_size:
        raise InputError(f"{lines}: holds attempts already; name another --output, or remove it")
    if feedback:
        check_key(config)
    device = find_device(config.model.device)
    problems = read_split(config, config.data.dataset_split)[:limit]
    with ExitStack() as stack:
        stack.enter_context(sigterm_as_interrupt())
        screen = stack.enter_context(Screen("rollout", total=len(problems), quiet=quiet))
        stack.callback(_say_where, screen, lines)
        # First: a package that it lacks is an error now, not hours later.
        writer = stack.enter_context(RecordWriter(lines, parquet=table))
        lean = stack.enter_context(lean_pool(config))
        screen.say(f"loading {config.model.model_name_or_path}")
        model, tokenizer = load_model(config.model.model_name_or_path, dtype=config.model.dtype)
        model.to(device)
        prompts = Prompts(tokenizer, config, schemas(config))
        check_problems(problems, prompts, lean)
        provider = make_provider(config, model, tokenizer, is_initial=True) if feedback else None
        engine = stack.enter_context(
            closing(make_engine(config, model, tokenizer, lean, screen.say))
        )
        # An engine in this process has these weights; a server may have any, an actor none.
        there = 0 if config.vllm.mode == "colocate" and not config.ray.address else None
        rollouts = Rollouts(config, engine, lean, prompts, provider, there, may_fail=True)
        _collect(rollouts, Student(model), problems, tokenizer, writer, screen)


def _say_where(screen: Screen, lines: Path) -> None:
    """Whatever ended it: what was written stays."""
    if lines.exists() and lines.stat().st_size:
        screen.say(f"attempts are in {lines.parent}; to read them: fdfast show {lines.parent}")


def _collect(
    rollouts: Rollouts,
    student: Student,
    problems: Sequence[Problem],
    tokenizer: Any,
    writer: RecordWriter,
    screen: Screen,
) -> None:
    config, sampled = rollouts.config, rollouts.config.rollout
    size = sampled.prompts_per_step
    for start in range(0, len(problems), size):
        clock, begun = Clock(), time.perf_counter()
        seed = step_seed(config, start // size)
        chosen = problems[start : start + size]
        attempts, _ = rollouts.attempts(chosen, sampled.num_generations, seed, student, clock)
        tokens = sum(a.completion.num_sampled for a in attempts)
        rate = tokens / clock.metrics()["time/rollout"]
        for record in _records(attempts, student, rollouts, tokenizer, seed):
            writer.write(record)
        done = min(start + size, len(problems))
        parts = [f"{done}/{len(problems)} problems", f"{tokens} tokens", f"{rate:.0f} tokens/s"]
        if verdicts := [a.completion.verdict for a in attempts if a.completion.verdict]:
            proved = sum(verdict.proved for verdict in verdicts)
            parts.insert(1, f"{proved} of {len(verdicts)} attempts proved")
        if failed := sum(a.feedback is None for a in attempts):
            assert rollouts.provider is not None
            reason = rollouts.provider.last_failure
            parts.append(f"no feedback on {failed}: {reason}")
        screen.say(", ".join([*parts, f"{time.perf_counter() - begun:.1f} s"]))
        screen.at(done)


def _records(
    attempts: Sequence[Attempt], student: Student, rollouts: Rollouts, tokenizer: Any, seed: int
) -> Iterator[Record]:
    """With both views of the tokens, where there is feedback."""
    told = [a for a in attempts if a.feedback is not None and rollouts.provider is not None]
    views = token_logprobs(student.model, student.model, told, rollouts.config)
    seen = {id(attempt): view for attempt, view in zip(told, views, strict=True)}
    for attempt in attempts:
        own, teachers = seen.get(id(attempt), (None, None))
        yield make_record(
            attempt.problem,
            attempt.completion,
            tokenizer,
            feedback=attempt.feedback if id(attempt) in seen else None,
            student_logprobs=own,
            teacher_logprobs=teachers,
            model=rollouts.config.model.model_name_or_path,
            seed=seed,
        )
