"""What training steps are timed on: 8 sequences of SmolLM2-135M from the theorem set, without
generation, by our trainer and by TRL's.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import peers
from benchmarks.targets import Target

FD, GRPO = "Feedback Distillation step", "GRPO step"
OURS, TRL = "ours", "TRL"
# float32_matmul_precision: torch's and TrainConfig's own default, and what the demo's presets take.
HIGHEST, MEDIUM = "highest", "medium"
CONTENDERS = tuple(f"{who}, {how}" for how in (HIGHEST, MEDIUM) for who in (OURS, TRL))
SEQUENCES = 8
TURNS = 3
# Where the time goes, in the order of a step.
PHASES = {
    "student_s": "student",
    "teacher_s": "teacher",
    "loss_s": "head, loss",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
    "other_s": "other",
}
# Of the first losses and gradients' norms: float32 sums in another order.
TOLERANCE = 2e-3
FEEDBACK = "The proof above is not accepted: Lean says that a goal is left open at its last line."
# TRL's own, with nothing around them, so that the teacher reads the prompt and then the feedback.
REPROMPT_TEMPLATE, FEEDBACK_TEMPLATE = "{prompt}{solution}{feedback}", "\n\n{feedback_raw}\n\n"


@dataclass(frozen=True)
class Case:
    """One optimizer step.

    Attributes:
        name: of the case.
        shape: what it is, for people.
        num_prompts: prompts that differ.
        prompt_length: tokens of each.
        completion_length: tokens of each of the 8 completions.
        distills: whether the loss is Feedback Distillation's, else GRPO's.
    """

    name: str
    shape: str
    num_prompts: int
    prompt_length: int
    completion_length: int
    distills: bool

    @property
    def num_generations(self) -> int:
        """Attempts at a prompt."""
        return SEQUENCES // self.num_prompts


_MODEL = "SmolLM2-135M, float32"


def all_cases(*, quick: bool) -> list[Case]:
    """The cases; a quick run has few tokens."""
    prompt, completion = (32, 16) if quick else (128, 128)
    said = f"{prompt} + {completion} tokens, one batch{' (quick)' if quick else ''}"
    return [
        Case(
            FD,
            f"{_MODEL}, 8 prompts x {said}; forward KL over the whole vocabulary, a teacher that "
            "reads the feedback too and follows",
            *(8, prompt, completion, True),
        ),
        Case(
            GRPO,
            f"{_MODEL}, 2 prompts x 4 generations x {said}; dapo, no reference, on-policy",
            *(2, prompt, completion, False),
        ),
    ]


def _targets(case: str, time: float, memory: float) -> list[Target]:
    """Like against like: both at the same precision of matrix products."""
    return [
        Target(case, f"{OURS}, {how}", measure, at_most, f"{TRL}, {how}")
        for how in (HIGHEST, MEDIUM)
        for measure, at_most in (("time", time), ("memory", memory), ("whole memory", memory))
    ]


TARGETS = (*_targets(FD, 0.5, 0.6), *_targets(GRPO, 0.7, 0.7))


@dataclass(frozen=True)
class Batch:
    """What both trainers are given, a list entry a sequence.

    Attributes:
        prompts: texts, which the tokenizer makes prompt_ids of.
        prompt_ids: of the student.
        teacher_prompt_ids: with the feedback after the prompt.
        completion_ids: what was sampled, say.
        rewards: of the completions.
    """

    prompts: Sequence[str]
    prompt_ids: Sequence[list[int]]
    teacher_prompt_ids: Sequence[list[int]]
    completion_ids: Sequence[list[int]]
    rewards: Sequence[float]


def make_batch(case: Case, tokenizer: Any, turn: int) -> Batch:
    """Stretches of the theorem set, the same for every contender; another place each turn."""
    from fdfast.data import base_theorems_path
    from fdfast.data.jsonl import read_theorems

    theorems = read_theorems(base_theorems_path())
    text = "\n\n".join(f"{t.formal_statement} {t.proof}" for t in theorems)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    place = 4096 * turn
    prompts: list[str] = []
    while len(prompts) < case.num_prompts:
        window, place = ids[place : place + case.prompt_length], place + case.prompt_length
        said = tokenizer.decode(window)
        # TRL tokenizes texts: they have to come out at this length.
        if len(tokenizer(said).input_ids) == case.prompt_length:
            prompts.append(said)
    completions = [
        ids[begin : begin + case.completion_length]
        for begin in range(
            place, place + SEQUENCES * case.completion_length, case.completion_length
        )
    ]
    prompts = [said for said in prompts for _ in range(case.num_generations)]
    feedback = FEEDBACK_TEMPLATE.format(feedback_raw=FEEDBACK)
    return Batch(
        prompts,
        tokenizer(prompts).input_ids,
        tokenizer([said + feedback for said in prompts]).input_ids,
        completions,
        [float(number % 3 == 0) for number in range(SEQUENCES)],
    )


def disagreement(found: Mapping[str, float], other: Mapping[str, float]) -> float:
    """How far apart the first steps of two contenders are, from the same weights: the larger of
    the relative differences of loss and gradient's norm. On-policy GRPO's loss is 0: what is less
    than a hundredth counts as one.
    """
    return max(
        abs(found[name] - other[name]) / max(0.01, abs(other[name]))
        for name in ("loss_1", "grad_norm_1")
    )


def versions() -> str:
    """Of the libraries."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    found["trl"] = peers.versions()["trl"]
    return ", ".join(f"{name} {number}" for name, number in found.items())
