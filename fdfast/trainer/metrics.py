"""Metrics: a JSON line a step in the output folder, a line or a bar on the screen."""

import json
import math
import os
import re
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fdfast.errors import InputError
from fdfast.files import atomic_file
from fdfast.rollout.records import make_record, to_dict
from fdfast.trainer.batch import Attempt
from fdfast.trainer.sinks import Sink


class MetricsLog:
    """`metrics.jsonl` and `attempts.jsonl` of a run, cut back to `step` when it is resumed there.

    Attributes:
        evaluated: steps at which there was an evaluation.
        history: what alarms look at, of each training step.

    Args:
        folder: of the run.
        step: finished steps; lines beyond are of steps that will be done again.
        writes: whether the files are this process's: else they are read at the beginning alone.
        sinks: get every row, too.
    """

    def __init__(
        self, folder: Path, *, step: int, writes: bool = True, sinks: Sequence[Sink] = ()
    ) -> None:
        self.sinks = sinks
        self.metrics, self.attempts = folder / "metrics.jsonl", folder / "attempts.jsonl"
        self.writes = writes
        if writes:
            _cut_back(self.metrics, step)
        kept = [r for r in read_jsonl(self.metrics) if r["step"] <= step]
        self.evaluated = {r["step"] for r in kept if "eval_loss" in r}
        if writes:
            _cut_back(self.attempts, step, self.evaluated)
        self.history = [_watched(r) for r in kept if "eval_loss" not in r]

    def write_evaluation(
        self, step: int, metrics: dict[str, Any], attempts: list[dict[str, Any]]
    ) -> None:
        """Add an evaluation: a line of its own, as TRL logs it; its attempts are marked."""
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.write({"step": step} | named, [row | {"evaluation": True} for row in attempts])
        self.evaluated.add(step)

    def write(self, metrics: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
        """Add one step's metrics and attempts; each line is on disk when this returns, the
        attempts first: a line of metrics says that all of them are. A number that is not finite,
        which JSON has not, is null.
        """
        metrics = {name: _json_number(value) for name, value in metrics.items()}
        if "eval_loss" not in metrics:
            self.history.append(_watched(metrics))
        if not self.writes:
            return
        for path, rows in ((self.attempts, attempts), (self.metrics, [metrics])):
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(row) for row in rows))
                file.flush()
                os.fsync(file.fileno())
        for sink in self.sinks:
            sink.write(metrics["step"], metrics)


# How a line begins that `rollout.records` wrote: the step without the long lists behind it.
_BEGINNING = re.compile(rb'\{"format": \d+, "problem": "(?:[^"\\]|\\.)*", "step": (\d+),')


# How an evaluation's attempt ends (`write_evaluation`).
_ENDING = b'"evaluation": true}\n'


def _cut_back(path: Path, step: int, evaluated: Container[int] | None = None) -> None:
    """Drop the lines beyond a step, and a last one that a crash tore; one line in memory at once.
    With `evaluated`, the attempts of evaluations at other steps go too: their metrics were never
    written, so they are made again.

    Raises:
        InputError: a line in the middle is torn.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as kept:
        if not path.exists():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    continue
                of = _step_of(line, f"{path}:{number}")
                lost = evaluated is not None and line.endswith(_ENDING) and of not in evaluated
                if of <= step and not lost:
                    kept.write(line)


def _step_of(line: bytes, place: str) -> int:
    if (found := _BEGINNING.match(line)) is not None:
        return int(found[1])
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{place}: is not JSON ({error}); remove the line") from error


# What alarms look at.
_WATCHED = ("stage", "kl", "entropy", "reward", "alarms", "skipped")


def _watched(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _WATCHED if name in row}


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a file that `MetricsLog` wrote; a last line cut off by a crash is left out.

    Raises:
        InputError: a line in the middle is torn.
    """
    if not path.exists():
        return []
    rows = []
    # Not splitlines(): a model may write U+2028, which it takes for the end of a line.
    *lines, _cut = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}:{number}: is not JSON ({error}); remove the line") from error
    return rows


def step_line(step: int, metrics: dict[str, Any], max_steps: int) -> str:
    """One step on the screen."""
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    if metrics.get("skipped"):
        return f"{parts[0]}  skipped: the loss or the gradient is not finite"
    if "kl" in metrics:
        parts.append(f"kl {metrics['kl']:.4f}")
    parts += [f"length {metrics['completions/mean_length']:.1f}"]
    if "reward" in metrics:
        parts.append(f"proved {metrics['reward']:.0%}")
    parts.append(f"entropy {metrics['entropy']:.2f}")
    if "time/step" in metrics:
        parts.append(f"{metrics['time/step']:.1f} s")
    return "  ".join(parts)


def summary(attempts: list[Attempt], num_generations: int) -> dict[str, float]:
    """What a step's attempts came to: lengths, tools, and where Lean was asked, rewards and
    verdicts.
    """
    lengths = [a.completion.num_sampled for a in attempts]
    seen = {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(a.completion.truncated for a in attempts) / len(attempts),
        "feedback/clipped_ratio": sum(a.feedback_clipped for a in attempts) / len(attempts),
        "feedback/skipped_ratio": sum(a.feedback is None for a in attempts) / len(attempts),
    }
    calls = [call for a in attempts for call in a.completion.tool_calls]
    if calls:  # TRL's names
        seen["tools/call_frequency"] = len(calls) / len(attempts)
        seen["tools/failure_frequency"] = sum(not call.ok for call in calls) / len(calls)
        seen["tools/mean_wait_s"] = sum(a.completion.waited_s for a in attempts) / len(attempts)
    known = [a.completion.verdict for a in attempts if a.completion.verdict is not None]
    if known:
        rewards = torch.tensor([float(v.proved) for v in known])
        groups = rewards.view(-1, num_generations)
        seen["reward"] = float(rewards.mean())
        seen["reward_std"] = float(rewards.std(correction=0))
        flat = (groups == groups[:, :1]).all(1).float()
        seen["frac_reward_zero_std"] = float(flat.mean())
        for kind in sorted({v.kind for v in known}):
            seen[f"verdicts/{kind}"] = sum(v.kind == kind for v in known) / len(known)
    return seen


def records(
    attempts: list[Attempt], tokenizer: Any, *, model: str, seed: int, step: int
) -> list[dict[str, Any]]:
    """A line of attempts.jsonl for each attempt, which `fdfast show` prints.

    Args:
        attempts: of one step.
        tokenizer: of the model.
        model: its name.
        seed: of the rollout.
        step: finished steps when the line is written.
    """
    return [
        to_dict(
            make_record(
                attempt.problem,
                attempt.completion,
                tokenizer,
                feedback=attempt.feedback,
                model=model,
                seed=seed,
                step=step,
            )
        )
        for attempt in attempts
    ]


class Clock:
    """Seconds of each stage of a step, added up."""

    def __init__(self) -> None:
        self.start, self.spent = time.perf_counter(), dict[str, float]()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what runs within, on top of what the stage took before."""
        start, name = time.perf_counter(), f"time/{stage}"
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds by stage, and of all since the clock was made."""
        return {**self.spent, "time/step": time.perf_counter() - self.start}


def stage_times(batch: Clock, scorer: Clock, learner: Clock) -> dict[str, float]:
    """Seconds of each stage of a step, and as time/idle/<stage> the share of time/step in which it
    was idle.

    Args:
        batch: of the stages that made the batch, maybe while an earlier one was trained on.
        scorer: of the teacher's passes, a part of the update.
        learner: from its asking for the batch on.
    """
    times = batch.spent | scorer.spent | learner.metrics()
    parts = {
        "rollout": ("weight_sync", "rollout", "verify"),
        "feedback": ("feedback",),
        "update": ("update",),
    }
    for stage, names in parts.items():
        busy = sum(times.get(f"time/{name}", 0.0) for name in names)
        times[f"time/idle/{stage}"] = max(0.0, 1.0 - busy / times["time/step"])
    return times
