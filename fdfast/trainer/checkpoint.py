"""Checkpoints: whole or not there, and complete, so that a resumed run is the run that never
stopped.
"""

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from fdfast.errors import InputError, MachineError
from fdfast.files import atomic_dir
from fdfast.models import free_bytes, save_model
from fdfast.teacher import EMATeacher
from fdfast.trainer.config import TrainConfig

NAME = re.compile(r"checkpoint-(\d+)")


@dataclasses.dataclass
class TrainState:
    """All that a run changes; `step` counts finished optimizer steps, and data and sampling follow
    from it.
    """

    model: Any
    tokenizer: Any
    teacher: EMATeacher
    optimizer: torch.optim.Optimizer
    step: int = 0


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(state: TrainState, config: TrainConfig, folder: Path) -> Path:
    """Write `folder/checkpoint-<step>` and drop the oldest over config.save_total_limit.

    Raises:
        MachineError: the disk is too full; checkpoints that were there stay.
    """
    path = folder / f"checkpoint-{state.step}"
    if path.is_dir():
        return path
    tensors = [*state.model.parameters(), *state.teacher.state_dict()["weights"].values()]
    tensors += [v for s in state.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    wanted = sum(t.numel() * t.element_size() for t in tensors)
    free = free_bytes(folder)
    if free < wanted * 1.05:
        raise MachineError(
            f"{folder}: a checkpoint needs {wanted / 2**20:.0f} MiB and the disk has "
            f"{free / 2**20:.0f} MiB free; make room, or name another output_dir, and use --resume"
        )
    with atomic_dir(path) as temporary:
        save_model(state.model, state.tokenizer, temporary / "model")
        torch.save(
            {
                "step": state.step,
                "optimizer": state.optimizer.state_dict(),
                "teacher": state.teacher.state_dict(),
            },
            temporary / "state.pt",
        )
        text = json.dumps(dataclasses.asdict(config), indent=2)
        (temporary / "config.json").write_text(text, encoding="utf-8")
    if config.save_total_limit:
        for old in checkpoints(folder)[: -config.save_total_limit]:
            shutil.rmtree(old)
    return path


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
        state.step = saved["step"]
    except (  # what torch.load and the two load_state_dict raise on bytes that are not theirs
        OSError, EOFError, RuntimeError, LookupError, ValueError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: can't be resumed ({' '.join(str(error).split())[:200]}); it is damaged or of "
            "another model: remove the folder to go on from the one before it"
        ) from error
