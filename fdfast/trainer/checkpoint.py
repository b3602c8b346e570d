"""Checkpoints: whole or not there, and complete, so that a resumed run is the run that never
stopped.

No state of a random generator is in them: all that is random follows from the seed and the step
(`rollouts.step_seed`, `loop._order`), as do the data cursor, the stage and the learning rate.
Alarms follow from metrics.jsonl, whose lines are on the disk before the checkpoint of their step.
"""

import contextlib
import dataclasses
import json
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fdfast.errors import InputError, MachineError
from fdfast.feedback.ledger import FeedbackCounters
from fdfast.files import atomic_dir, damage, write_manifest
from fdfast.lora import save_adapters, save_merged
from fdfast.models import free_bytes, has_adapters
from fdfast.teacher import EMATeacher
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.master import MasterWeights
from fdfast.trainer.ranks import Ranks
from fdfast.trainer.settings import plain
from fdfast.trainer.sharded_checkpoint import (
    SHARDS,
    cut_like,
    load_sharded,
    save_sharded,
    sharded_tensors,
)
from fdfast.trainer.sharding import WholeCopy
from fdfast.trainer.student import save_student

NAME = re.compile(r"checkpoint-(\d+)")


@dataclasses.dataclass
class TrainState:
    """All that a run changes.

    Attributes:
        model: the student.
        tokenizer: its tokenizer.
        teacher: the EMA teacher.
        master: what the optimizer steps.
        optimizer: AdamW over `master`.
        step: finished optimizer steps; data and sampling follow from it.
        num_tokens: tokens trained on so far.
        feedback: what feedback took so far: the budget is the run's, not the process's.
        changing: whether a change of the above is under way, so that it can't be saved.
        sampled: a copy of the student that is sampled from, with whole weights; None: the student
            itself is.
        sharded: whether the student's weights lie on several ranks.
        lock: held while the weights change, and while they are copied to what samples.
    """

    model: Any
    tokenizer: Any
    teacher: EMATeacher
    master: MasterWeights
    optimizer: torch.optim.Optimizer
    step: int = 0
    num_tokens: int = 0
    feedback: FeedbackCounters = dataclasses.field(default_factory=FeedbackCounters)
    changing: bool = False
    sampled: WholeCopy | None = None
    sharded: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def model_to_sample(self) -> Any:
        """The student, or its copy brought up to date; of a sharded one a collective."""
        if self.sampled is None:
            return self.model
        self.sampled.follow(self.model)
        return self.sampled.model

    def whole_model(self) -> Any:
        """The student with whole weights, to be saved; of a sharded one a collective."""
        return self.model_to_sample() if self.sharded else self.model


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(
    state: TrainState, config: TrainConfig, folder: Path, ranks: Ranks | None = None
) -> Path:
    """Write `folder/checkpoint-<step>` and drop the oldest over checkpoint.save_total_limit; those
    that have lost a file or a part of one count for nothing and stay. Of several ranks each writes
    its shards, the main one the rest.

    Raises:
        MachineError: the disk is too full; checkpoints that were there stay.
    """
    ranks = ranks or Ranks()
    path = folder / f"checkpoint-{state.step}"
    if ranks.from_main(path.is_dir()):
        return path
    if ranks.size > 1:
        _save_shards(state, config, path, ranks)
    else:
        _save_whole(state, config, path)
    if config.checkpoint.save_total_limit and ranks.main:
        # Sizes alone: the newest is whole, and to read all the others at each save would take long.
        whole = [old for old in checkpoints(folder) if not damage(old, checksums=False)]
        for old in whole[: -config.checkpoint.save_total_limit]:
            shutil.rmtree(old)
    return path


def _save_whole(state: TrainState, config: TrainConfig, path: Path) -> None:
    adapted = has_adapters(state.model)
    saved = _counts(state) | {
        "optimizer": state.optimizer.state_dict(),
        "teacher": state.teacher.state_dict(),
        "master": state.master.state_dict(),
    }
    tensors = list(state.teacher.state_dict()["weights"].values())
    # Adapters are saved without their base.
    tensors += [p for p in state.model.parameters() if p.requires_grad or not adapted]
    tensors += [*state.master.state_dict().values()]
    tensors += [v for s in state.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    with _writing(path, tensors), atomic_dir(path) as temporary:
        save_student(state.model, state.tokenizer, temporary)
        torch.save(saved, temporary / "state.pt")
        _seal(temporary, config)


def _save_shards(state: TrainState, config: TrainConfig, path: Path, ranks: Ranks) -> None:
    model = state.whole_model()
    tensors = sharded_tensors(state.teacher, state.master, state.optimizer)
    with contextlib.ExitStack() as stack:
        temporary = None
        if ranks.main:
            stack.enter_context(_writing(path, [*model.parameters(), *tensors.values()]))
            temporary = stack.enter_context(atomic_dir(path))
        place = ranks.from_main(temporary)
        save_sharded(tensors, place / SHARDS)
        if ranks.main:
            save_student(model, state.tokenizer, place)
            text = json.dumps(_counts(state))
            (place / "counts.json").write_text(text, encoding="utf-8")
            _seal(place, config)
    ranks.every(None)  # it has its name


def _counts(state: TrainState) -> dict[str, Any]:
    """What `restore` reads beside the tensors."""
    return {
        "step": state.step,
        "num_tokens": state.num_tokens,
        "feedback": dataclasses.asdict(state.feedback),
    }


def _seal(folder: Path, config: TrainConfig) -> None:
    """The last files of a checkpoint: its settings, and what all the others must be."""
    text = json.dumps(plain(config), indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    write_manifest(folder)


def save_final_model(state: TrainState, folder: Path, ranks: Ranks | None = None) -> Path:
    """Write the trained model to `folder/model`, whole or not at all: adapters merged, which
    `folder/adapter` has by themselves.

    Raises:
        MachineError: the disk is too full.
    """
    path, model, ranks = folder / "model", state.whole_model(), ranks or Ranks()
    with ranks.together():
        if ranks.main:
            _write_final(model, state.tokenizer, path)
    return path


def _write_final(model: Any, tokenizer: Any, path: Path) -> None:
    with _writing(path, list(model.parameters())), atomic_dir(path) as temporary:
        save_merged(model, tokenizer, temporary)
    if has_adapters(model):
        own, adapter = [p for p in model.parameters() if p.requires_grad], path.parent / "adapter"
        with _writing(adapter, own), atomic_dir(adapter) as temporary:
            save_adapters(model, tokenizer, temporary)


@contextlib.contextmanager
def _writing(path: Path, tensors: list[Tensor]) -> Iterator[None]:
    """Look for room first; what a full disk raises all the same, in three libraries, is one
    line.
    """
    wanted = sum(t.numel() * t.element_size() for t in tensors)
    free = free_bytes(path.parent)
    advice = "make room, or name another output_dir; what was saved before is whole"
    if free < wanted * 1.05:
        raise MachineError(
            f"{path}: needs {wanted / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB free; "
            f"{advice}"
        )
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise MachineError(f"{path}: can't be written ({said}); {advice}") from error


# A resumed run is the run that never stopped only with the same settings; these change no number.
MAY_CHANGE = {
    "checkpoint.save_final_model",
    "checkpoint.save_steps",
    "checkpoint.save_total_limit",
    "feedback.api_key_env",
    "feedback.base_url",
    "feedback.budget_tokens",
    "feedback.budget_usd",
    "feedback.max_concurrency",
    "feedback.max_retries",
    "feedback.prices_usd",
    "feedback.timeout_s",
    "guards.kl_alarm_ratio",
    "guards.max_bad_step_dumps",
    "guards.max_skipped_steps",
    "guards.zero_reward_alarm_steps",
    "lean.workers",
    "logging.logging_dir",
    "logging.metric_names",
    "logging.report_to",
    "logging.run_name",
    "logging.wandb_mode",
    "logging.wandb_project",
    "model.model_name_or_path",
    "optim.max_steps",
    "output_dir",
    "vllm.gpu_memory_utilization",
    "vllm.server_base_url",
    "vllm.weights_dir",
}


# What an alarm's advice is to change: the run goes on, and says so.
MAY_CHANGE_ALOUD = {"loss.entropy_coef", "optim.learning_rate", "optim.max_grad_norm"}


def check_settings(config: TrainConfig, checkpoint: Path) -> list[str]:
    """Refuse to resume a checkpoint under other settings.

    Returns:
        Changes that are allowed and change the run.

    Raises:
        InputError: naming each setting that differs.
    """
    try:
        saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint}/config.json: can't be read ({error})") from error
    now = plain(config)
    if unknown := sorted(saved.keys() - now.keys()):
        # Compared with defaults they would be called changed, or not be missed at all.
        raise InputError(
            f"{checkpoint}: was made by a version of fdfast with settings that this one has not "
            f"({', '.join(unknown[:3])}); resume it with that one, or begin another output_dir "
            "from its model"
        )
    # A setting that is newer than the checkpoint had its default then.
    before = plain(TrainConfig()) | saved
    changes = {
        key: f"{key} {before[key]!r} -> {value!r}"
        for key, value in now.items()
        if key not in MAY_CHANGE and value != before[key]
    }
    if differ := [said for key, said in changes.items() if key not in MAY_CHANGE_ALOUD]:
        raise InputError(
            f"{checkpoint}: was made with other settings ({'; '.join(differ)}); keep them, or "
            "begin another output_dir from its model"
        )
    return list(changes.values())


def restore(state: TrainState, path: Path) -> None:
    """Put a checkpoint's optimizer, teacher and step into `state`, whose model was loaded from
    `path/model`.

    Raises:
        InputError: the checkpoint is damaged or of another model.
    """
    try:
        if (path / SHARDS).is_dir():
            load_sharded(path / SHARDS, state.teacher, state.master, state.optimizer)
            saved = json.loads((path / "counts.json").read_text(encoding="utf-8"))
        else:
            saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            if state.sharded:
                saved = cut_like(saved, state.teacher, state.master)
            state.optimizer.load_state_dict(saved["optimizer"])
            state.teacher.load_state_dict(saved["teacher"])
            state.master.load_state_dict(saved["master"])
        state.step, state.num_tokens = saved["step"], saved["num_tokens"]
        state.feedback = FeedbackCounters(**saved["feedback"])
    except (  # what torch.load and the two load_state_dict raise on bytes that are not theirs
        OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: can't be resumed ({' '.join(str(error).split())[:200]}); it is damaged or of "
            "another model: remove the folder to go on from the one before it"
        ) from error
