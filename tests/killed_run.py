"""A training run in a process of its own that is killed: what it passes is counted, and at one of
these points it dies as by kill -9.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401  (else each child imports it anew)

from fdfast.lean import LeanPool, Verdict
from fdfast.rollout import HFEngine
from fdfast.trainer import TrainConfig, loop, setup, train
from fdfast.trainer.scoring import Scorer


def run(
    config: TrainConfig, resume: bool, die_at: int | None, sync_s: float, count: Path | None
) -> None:
    """Train; the process dies at point `die_at`, counted from 0.

    Args:
        config: of the run; its task is lean, and every third answer counts as a proof.
        resume: go on from a checkpoint.
        die_at: None to live.
        sync_s: seconds by which each sync to the disk is slowed, so that a kill from outside, at a
            random time, falls within a save more often.
        count: file that gets the number of points passed.
    """
    points: list[str] = []

    def at(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def passing(*arguments: Any, **others: Any) -> Any:
            if len(points) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            points.append(name)
            if name == "sync" and sync_s:
                time.sleep(sync_s)
            return function(*arguments, **others)

        return passing

    def check(
        self: Any, statement: str, proof: str, header: str | None = None, context: str = ""
    ) -> Verdict:
        right = sum(proof.encode()) % 3 == 0
        return Verdict("proved", level=1) if right else Verdict("failed", reason="no")

    LeanPool.check = check  # type: ignore[method-assign]
    setup.load_student = at("load", setup.load_student)  # type: ignore[assignment]
    loop.update = at("update", loop.update)
    loop.save_checkpoint = at("save", loop.save_checkpoint)  # type: ignore[assignment]
    HFEngine.generate = at("rollout", HFEngine.generate)  # type: ignore[method-assign]
    Scorer.score = at("score", Scorer.score)  # type: ignore[method-assign]
    os.fsync = at("sync", os.fsync)
    Path.replace = at("rename", Path.replace)  # type: ignore[method-assign]
    Path.rename = at("rename", Path.rename)  # type: ignore[method-assign]
    train(config, resume=resume, quiet=True)
    if count is not None:
        count.write_text(str(len(points)))
