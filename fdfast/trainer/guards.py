"""Alarms: what in a run's metrics says that it is going wrong, and what to do about it.

They follow from the rows of metrics.jsonl alone, so a resumed run raises those that it would have
raised. That entropy falls just before GRPO collapses is the paper's own finding (Feedback
Distillation, 2026, arXiv 2605.30861, its figures of entropy and accuracy).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdfast.errors import MachineError
from fdfast.trainer.bad_steps import bad_steps
from fdfast.trainer.config import TrainConfig

Row = Mapping[str, Any]
# An alarm needs to know what is usual.
MIN_HISTORY = 5


@dataclass(frozen=True)
class Alarm:
    """Something that is going wrong.

    Attributes:
        name: entropy, kl, reward or lean.
        text: what happened and what to do, one line.
    """

    name: str
    text: str


def alarms(history: Sequence[Row], row: Row, config: TrainConfig) -> list[Alarm]:
    """What a step's metrics give cause for.

    Args:
        history: rows of the training steps before, oldest first.
        row: of the step.
        config: of the run.
    """
    # What is usual in one stage says nothing of another: kl is to the teacher, then to a reference.
    same = [seen for seen in history if seen.get("stage") == row.get("stage")]
    window = same[-config.guards.alarm_window :]
    found = [_entropy(window, row, config), _kl(window, row, config), _reward(window, row, config)]
    return [alarm for alarm in [*found, _lean(row)] if alarm is not None]


def num_skipped(history: Sequence[Row]) -> int:
    """How many steps in a row were skipped, up to the latest."""
    count = 0
    for seen in reversed(history):
        if not seen.get("skipped"):
            break
        count += 1
    return count


def stop_if_asked(
    history: Sequence[Row], heard: Sequence[Alarm], config: TrainConfig, step: int
) -> None:
    """After too many skipped steps, or an alarm that the settings stop for.

    Args:
        history: rows of the training steps, this one's the last.
        heard: alarms of the step.
        config: of the run.
        step: finished steps.

    Raises:
        MachineError: stop.
    """
    skipped, folder = num_skipped(history), Path(config.output_dir)
    if skipped > config.guards.max_skipped_steps:
        batch = (bad_steps(folder) or [folder])[-1]
        raise MachineError(
            f"step {step}: the loss or the gradient was not finite in {skipped} steps in a row; "
            f"lower learning_rate, or look at what they were trained on: fdfast show {batch}"
        )
    if config.guards.entropy_alarm_action == "stop":
        for alarm in heard:
            if alarm.name == "entropy":
                raise MachineError(f"step {step}: {alarm.text}")


def rate_factor(history: Sequence[Row], config: TrainConfig) -> float:
    """What the learning rate is multiplied by after the entropy alarms so far."""
    if config.guards.entropy_alarm_action != "lower_rate":
        return 1.0
    return 0.5 ** sum("entropy" in seen.get("alarms", ()) for seen in history)


def _entropy(window: Sequence[Row], row: Row, config: TrainConfig) -> Alarm | None:
    usual, share = _median(window, "entropy"), config.guards.entropy_alarm_ratio
    if not share or usual is None or not _finite(row.get("entropy")):
        return None
    # One alarm for one fall: it is heard again when the median has come down after it.
    if any("entropy" in seen.get("alarms", ()) for seen in window):
        return None
    if row["entropy"] >= share * usual:
        return None
    advice = {
        "warn": "lower learning_rate, raise entropy_coef, or go back to an earlier checkpoint",
        "stop": "the run stops: lower learning_rate or raise entropy_coef, and go on from an "
        "earlier checkpoint's model",
        "lower_rate": "learning_rate is halved from here on",
    }[config.guards.entropy_alarm_action]
    return Alarm(
        "entropy",
        f"entropy {row['entropy']:.3f} is below {share:g} of its median "
        f"{usual:.3f} over {len(window)} steps, which precedes a collapse; {advice}",
    )


def _kl(window: Sequence[Row], row: Row, config: TrainConfig) -> Alarm | None:
    usual, ratio = _median(window, "kl"), config.guards.kl_alarm_ratio
    if not ratio or usual is None or usual <= 0 or not _finite(row.get("kl")):
        return None
    if row["kl"] <= ratio * usual:
        return None
    return Alarm(
        "kl",
        f"kl {row['kl']:.4g} is more than {ratio:g} times its median {usual:.4g} "
        f"over {len(window)} steps; look at the step's attempts (fdfast show), lower "
        "learning_rate or max_grad_norm",
    )


def _reward(window: Sequence[Row], row: Row, config: TrainConfig) -> Alarm | None:
    count = config.guards.zero_reward_alarm_steps
    recent = [*window, row][-count:] if count else []
    if len(recent) < count or not count or any(seen.get("reward") != 0 for seen in recent):
        return None
    if any("reward" in seen.get("alarms", ()) for seen in recent):
        return None
    return Alarm(
        "reward",
        f"no attempt was proved in {count} steps; take easier problems, raise "
        "max_completion_length, or see by fdfast show what goes wrong",
    )


def _lean(row: Row) -> Alarm | None:
    broken = row.get("verdicts/crashed", 0) + row.get("verdicts/timeout", 0)
    if broken < 1:
        return None
    return Alarm(
        "lean",
        "every check of the step crashed or ran out of time; raise lean.timeout_s, and see "
        "`fdfast lean doctor`",
    )


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _median(window: Sequence[Row], name: str) -> float | None:
    values = [seen[name] for seen in window if seen.get(name) is not None]
    return statistics.median(values) if len(values) >= MIN_HISTORY else None
