"""What a step with a loss or gradient that is not finite was trained on, kept for looking at.

`bad-step-<n>` in the run's folder holds attempts.jsonl, which `fdfast show` prints, and step.json.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfast.files import atomic_dir
from fdfast.trainer.batch import Attempt
from fdfast.trainer.sharding import whole

_NAME = re.compile(r"bad-step-(\d+)")


def dump_bad_step(
    folder: Path,
    step: int,
    *,
    rows: Sequence[Mapping[str, Any]],
    attempts: Sequence[Attempt],
    metrics: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    keep: int,
    writes: bool = True,
) -> str:
    """Write `folder/bad-step-<step>` and drop the oldest over `keep`, and those of later steps,
    which a resumed run does again.

    Args:
        folder: of the run.
        step: finished steps, this one included.
        rows: of attempts.jsonl.
        attempts: the same ones, for what the rows have not: advantages and the teacher's prompts.
        metrics: of the step.
        weights: what the optimizer would have stepped, by name, its gradients before clipping.
        keep: such folders; 0 writes none.
        writes: whether this rank does; all of them look at their shards of the weights together.

    Returns:
        What was not finite and where the batch lies, for a line.
    """
    groups = parameter_groups(weights)
    odd_metrics = [n for n, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
    odd = [
        f"{what} of {name}"
        for what in ("weight", "gradient")
        for name, p in weights.items()
        if not _finite(p if what == "weight" else p.grad)
    ]
    said = _said(odd_metrics, odd)
    if not keep or not writes:
        return said
    path = folder / f"bad-step-{step}"
    report = {
        "step": step,
        "not_finite": {"metrics": odd_metrics, "tensors": odd},
        "metrics": {name: _json(value) for name, value in metrics.items()},
        "attempts": [
            {
                "problem": attempt.problem.name,
                "advantage": _json(attempt.advantage),
                "teacher_prompt_ids": list(attempt.teacher_prompt_ids),
                "trained": attempt.feedback is not None,
            }
            for attempt in attempts
        ],
        "norms": groups,
    }
    with atomic_dir(path) as temporary:
        with (temporary / "attempts.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (temporary / "step.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    every = bad_steps(folder)
    later = every.index(path) + 1
    for old in [*every[later:], *every[:later][:-keep]]:
        shutil.rmtree(old)
    return f"{said}; its batch is in {path}: fdfast show {path}"


def bad_steps(folder: Path) -> list[Path]:
    """The dumps of a run, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("bad-step-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def parameter_groups(weights: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Norms of weights and gradients for each part of a model: layers.0.self_attn, say.

    Args:
        weights: name -> a tensor with its gradient.

    Returns:
        group -> norms; None where a norm is not finite, which JSON has not.
    """
    squares: dict[str, list[float]] = {}
    for name, weight in weights.items():
        sums = squares.setdefault(_group(name), [0.0, 0.0])
        sums[0] += _square(weight)
        sums[1] += 0.0 if weight.grad is None else _square(weight.grad)
    return {
        group: {"weight_norm": _json(math.sqrt(w)), "grad_norm": _json(math.sqrt(g))}
        for group, (w, g) in squares.items()
    }


def _group(name: str) -> str:
    """The module that a parameter's layer belongs to: a block's attention, its MLP, its norms."""
    parts = name.split(".")[:-1]
    if any(part.isdigit() for part in parts):
        number = next(i for i, part in enumerate(parts) if part.isdigit())
        parts = parts[: number + 2]
    return ".".join(parts) or name


def _square(tensor: Tensor) -> float:
    """The sum of squares, in float64: what is large in float32 is not yet infinite."""
    return float(whole(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))) ** 2


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(whole(torch.isfinite(tensor.detach()).all()))


def _said(metrics: Sequence[str], tensors: Sequence[str]) -> str:
    """What was not finite, the first few of it."""
    parts = [*metrics, *tensors]
    if not parts:
        return "the gradient's norm is not finite though each of its tensors is"
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return f"not finite: {', '.join(parts[:3])}{more}"


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
