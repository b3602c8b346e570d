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
from fdfast.models import free_bytes
from fdfast.teacher import EMATeacher
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.master import MasterWeights
from fdfast.trainer.student import has_adapters, save_student

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


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(state: TrainState, config: TrainConfig, folder: Path) -> Path:
    """Write `folder/checkpoint-<step>` and drop the oldest over config.save_total_limit; those that
    have lost a file or a part of one count for nothing and stay.

    Raises:
        MachineError: the disk is too full; checkpoints that were there stay.
    """
    path = folder / f"checkpoint-{state.step}"
    if path.is_dir():
        return path
    adapted = has_adapters(state.model)
    saved = {
        "step": state.step,
        "num_tokens": state.num_tokens,
        "feedback": dataclasses.asdict(state.feedback),
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
        text = json.dumps(dataclasses.asdict(config), indent=2)
        (temporary / "config.json").write_text(text, encoding="utf-8")
        write_manifest(temporary)
    if config.save_total_limit:
        # Sizes alone: the newest is whole, and to read all the others at each save would take long.
        whole = [old for old in checkpoints(folder) if not damage(old, checksums=False)]
        for old in whole[: -config.save_total_limit]:
            shutil.rmtree(old)
    return path


def save_final_model(state: TrainState, folder: Path) -> Path:
    """Write the trained model to `folder/model`, whole or not at all: adapters merged, which
    `folder/adapter` has by themselves.

    Raises:
        MachineError: the disk is too full.
    """
    path = folder / "model"
    with _writing(path, list(state.model.parameters())), atomic_dir(path) as temporary:
        save_merged(state.model, state.tokenizer, temporary)
    if has_adapters(state.model):
        own = [p for p in state.model.parameters() if p.requires_grad]
        with _writing(folder / "adapter", own), atomic_dir(folder / "adapter") as temporary:
            save_adapters(state.model, state.tokenizer, temporary)
    return path


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
    "feedback_api_key_env",
    "feedback_base_url",
    "feedback_budget_tokens",
    "feedback_budget_usd",
    "feedback_max_concurrency",
    "feedback_max_retries",
    "feedback_prices_usd",
    "feedback_timeout_s",
    "kl_alarm_ratio",
    "lean_workers",
    "max_skipped_steps",
    "max_steps",
    "model_name_or_path",
    "output_dir",
    "save_final_model",
    "save_steps",
    "save_total_limit",
    "vllm_gpu_memory_utilization",
    "vllm_server_base_url",
    "vllm_weights_dir",
    "zero_reward_alarm_steps",
}


def check_settings(config: TrainConfig, checkpoint: Path) -> None:
    """Refuse to resume a checkpoint under other settings.

    Raises:
        InputError: naming each setting that differs.
    """
    try:
        saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint}/config.json: can't be read ({error})") from error
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    # A setting that is newer than the checkpoint had its default then.
    before = json.loads(json.dumps(dataclasses.asdict(TrainConfig()))) | saved
    differ = [
        f"{key} {before[key]!r} -> {value!r}"
        for key, value in now.items()
        if key not in MAY_CHANGE and value != before[key]
    ]
    if differ:
        raise InputError(
            f"{checkpoint}: was made with other settings ({'; '.join(differ)}); keep them, or "
            f"begin "
            "another output_dir from its model"
        )


def restore(state: TrainState, path: Path) -> None:
    """Put a checkpoint's optimizer, teacher and step into `state`, whose model was loaded from
    `path/model`.

    Raises:
        InputError: the checkpoint is damaged or of another model.
    """
    try:
        saved = torch.load(path / "state.pt", weights_only=True)
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
