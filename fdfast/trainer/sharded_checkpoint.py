"""Teacher, masters and optimizer of a run on several ranks, each of which writes what it holds
(torch.distributed.checkpoint). Any number of ranks reads them again, one included.

The student is not among them: its weights lie beside them as a model folder, exactly.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.tensor import DTensor, distribute_tensor

from fdfast.teacher import EMATeacher
from fdfast.trainer.master import MasterWeights

SHARDS = "shards"
_OPTIMIZER = "optimizer."


def sharded_tensors(
    teacher: EMATeacher, master: MasterWeights, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All tensors by a name of their own, shards where they are sharded; not copies."""
    tensors = {f"teacher.{n}": t for n, t in teacher.state_dict()["weights"].items()}
    tensors |= {f"master.{n}": t for n, t in master.state_dict().items()}
    for name, weight in master.master.items():
        for key, value in optimizer.state.get(weight, {}).items():
            tensors[f"{_OPTIMIZER}{key}.{name}"] = value
    return tensors


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write each rank's shards into `folder`. A collective."""
    state_dict_saver.save(
        dict(tensors), checkpoint_id=str(folder), no_dist=not dist.is_initialized()
    )


@torch.no_grad()
def load_sharded(
    folder: Path, teacher: EMATeacher, master: MasterWeights, optimizer: torch.optim.Optimizer
) -> None:
    """Put what `save_sharded` wrote, on any number of ranks, into these. A collective.

    Raises:
        OSError: a file is missing.
        LookupError: the tensors are of another model.
        RuntimeError: likewise; torch's CheckpointException is one.
    """
    held = filesystem.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    optimizer.state.clear()
    for name in held:
        if name.startswith(_OPTIMIZER):
            key, _, weight_name = name.removeprefix(_OPTIMIZER).partition(".")
            weight = master.master[weight_name]
            empty = torch.zeros(()) if key == "step" else torch.zeros_like(weight)
            optimizer.state[weight][key] = empty
    tensors = sharded_tensors(teacher, master, optimizer)
    if missing := tensors.keys() ^ held.keys():
        raise LookupError(f"{sorted(missing)[0]} is in one of the two alone")
    loaded = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    state_dict_loader.load(loaded, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])
    weights = {n: loaded[f"teacher.{n}"] for n in teacher.state_dict()["weights"]}
    teacher.load_state_dict(teacher.state_dict() | {"weights": weights})


def cut_like(saved: dict[str, Any], teacher: EMATeacher, master: MasterWeights) -> dict[str, Any]:
    """A checkpoint of one process for ranks: this rank's shards of each whole tensor."""
    weights = teacher.state_dict()["weights"]
    states = {
        number: {
            key: value if key == "step" else _cut(value, weight)
            for key, value in saved["optimizer"]["state"][number].items()
        }
        for number, weight in enumerate(master.master.values())
        if number in saved["optimizer"]["state"]
    }
    return saved | {
        "optimizer": saved["optimizer"] | {"state": states},
        "teacher": saved["teacher"]
        | {"weights": {n: _cut(t, weights[n]) for n, t in saved["teacher"]["weights"].items()}},
        "master": {n: _cut(t, master.master[n]) for n, t in saved["master"].items()},
    }


def _cut(value: Tensor, like: Tensor) -> Tensor:
    assert isinstance(like, DTensor)
    place = value.to(like.device)
    # From this rank's own copy: nothing is sent.
    return distribute_tensor(place, like.device_mesh, like.placements, src_data_rank=None)
