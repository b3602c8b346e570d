"""The student of a run: loaded, with adapters or without, saved, and kept as a stage found it."""

import json
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fdfast.errors import InputError
from fdfast.files import atomic_dir, damage, write_manifest
from fdfast.lora import add_adapters, import_peft, load_adapters, save_adapters
from fdfast.models import has_adapters, load_model, save_model
from fdfast.teacher import EMATeacher

_BASE = "base.json"


@dataclass(frozen=True)
class Adapters:
    """Of `lora.add_adapters`.

    Attributes:
        rank: of an adapter.
        alpha: an adapter is alpha / rank * B A.
        dropout: of its input.
        target_modules: last parts of layers' names; () for every linear layer but the head.
        seed: of the initial values.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    seed: int


def load_student(
    name_or_path: str, *, dtype: str, adapters: Adapters | None = None, saved: Path | None = None
) -> tuple[Any, Any]:
    """The model that is trained and its tokenizer.

    Args:
        name_or_path: where a run begins; of one with adapters, the base at every start.
        dtype: of the weights.
        adapters: None to train every weight.
        saved: the folder that `save_student` wrote, to go on from.

    Raises:
        InputError: no such model, or the base is another than when the adapters were saved.
    """
    if adapters is None:
        return load_model(name_or_path if saved is None else saved / "model", dtype=dtype)
    model, tokenizer = load_model(name_or_path, dtype=dtype)
    if saved is None:
        return add_adapters(
            model,
            rank=adapters.rank,
            alpha=adapters.alpha,
            dropout=adapters.dropout,
            target_modules=adapters.target_modules,
            seed=adapters.seed,
        ), tokenizer
    model = load_adapters(model, saved / "adapter")
    wanted, found = json.loads((saved / _BASE).read_text(encoding="utf-8"))["crc32"], _crc32(model)
    if found != wanted:
        raise InputError(
            f"{saved}: its adapters belong to other base weights than those of {name_or_path} "
            f"(CRC-32 {wanted:08x}, here {found:08x}); give model_name_or_path as the run began"
        )
    return model, tokenizer


def save_student(model: Any, tokenizer: Any, folder: Path) -> None:
    """All that `load_student` needs: the model, or of one with adapters these alone."""
    if not has_adapters(model):
        save_model(model, tokenizer, folder / "model")
        return
    save_adapters(model, tokenizer, folder / "adapter")
    text = json.dumps({"crc32": _crc32(model)})
    (folder / _BASE).write_text(text, encoding="utf-8")


def _crc32(model: Any) -> int:
    """Of all that is not trained."""
    found = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            found = zlib.crc32(memoryview(flat.numpy()), found)
    return found


def keep_reference(model: Any, tokenizer: Any, path: Path) -> None:
    """Keep the student as it is now in `path`, for `load_reference`; one that is there goes."""
    if path.exists():  # of a run that was resumed from before this stage
        shutil.rmtree(path)
    with atomic_dir(path) as temporary:
        save_student(model, tokenizer, temporary)
        write_manifest(temporary)


def load_reference(student: Any, path: Path, *, dtype: str) -> Any:
    """What `keep_reference` kept, without gradients; of a student with adapters it shares the base.

    Raises:
        InputError: it is damaged.
    """
    if why := damage(path):
        raise InputError(
            f"{path}: the reference of beta is damaged ({why}); go on from a checkpoint before its "
            "stage: move the later ones away"
        )
    device = next(student.parameters()).device
    if not has_adapters(student):
        return load_model(path / "model", dtype=dtype)[0].requires_grad_(False).to(device)
    reference, peft = EMATeacher(student, kind="frozen").model, import_peft()
    weights = peft.load_peft_weights(str(path / "adapter"), device=str(device))
    peft.set_peft_model_state_dict(reference, weights)
    return reference
