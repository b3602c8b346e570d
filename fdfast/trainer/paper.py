"""What the paper leaves open, with our default and the reason, and what it states, as data.

Source: Feedback Distillation (2026), arXiv 2605.30861.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OpenChoice:
    """Something that the paper does not say.

    Attributes:
        question: what is open.
        settings: ours that decide it, by name.
        default: what they are, for people.
        reason: why.
    """

    question: str
    settings: tuple[str, ...]
    default: str
    reason: str


OPEN_CHOICES = (
    OpenChoice(
        "where F(y) stands in the teacher's prompt",
        ("feedback.position", "feedback.template"),
        "at the end of the user's message",
        "the prompt before it is shared with the student, so it passes through the layers once",
    ),
    OpenChoice(
        "sampling temperature",
        ("rollout.temperature", "rollout.top_p", "rollout.top_k"),
        "1, the whole distribution",
        "attempts are then samples of the very policy that the loss is about",
    ),
    OpenChoice(
        "loss normalisation",
        ("loss.loss_type",),
        "by the step's number of trained tokens (GRPO: dapo)",
        "equals the paper's sum up to a constant of the batch; a mean for each attempt would weigh "
        "short ones more",
    ),
    OpenChoice(
        "tool limits",
        (
            "rollout.tools",
            "rollout.max_tool_calling_iterations",
            "rollout.max_tool_tokens",
            "lean.timeout_s",
        ),
        "no tools unless asked for; 8 turns of calls, 1,024 tokens of answers to one, 30 s a check",
        "8 turns with their answers fill a response of 8,192 tokens",
    ),
    OpenChoice(
        "optimizer",
        (
            "optim.adam_beta1",
            "optim.adam_beta2",
            "optim.adam_epsilon",
            "optim.weight_decay",
            "optim.max_grad_norm",
        ),
        "AdamW, betas 0.9 and 0.999, epsilon 1e-8, no weight decay, gradient clipped at norm 1",
        "torch's defaults; decay would pull the student from the teacher that it is to match",
    ),
    OpenChoice(
        "importance sampling",
        ("vllm.importance_sampling_correction", "vllm.importance_sampling_mode"),
        "none for distillation; for GRPO with vLLM sequence_mask at 3, TRL's default",
        "the paper's loss takes the attempts as they are; GRPO's ratio is to what really sampled",
    ),
    OpenChoice(
        "thinking mode",
        ("prompt.system_prompt", "prompt.prompt_template", "prompt.completion_prefix"),
        "as the model's chat template has it",
        "what is trained is what the template lets the model write",
    ),
    OpenChoice(
        "samples per problem at evaluation",
        ("evaluation.num_generations_eval",),
        "1",
        "pass@1 is what its curves show; pass@k wants k or more",
    ),
)


# What the paper states, as the presets have it: preset -> setting -> number.
STATED: dict[str, dict[str, Any]] = {
    "fd_paper": {
        "prompt.max_prompt_length": 2048,
        "rollout.max_completion_length": 8192,
        "optim.warmup_steps": 50,
        "optim.learning_rate": 1e-5,
        "rollout.prompts_per_step": 128,
        "rollout.num_generations": 1,
        "loss.divergence": "forward_kl",
        "loss.teacher_top_k": 25,
        "loss.tail": "truncate",
        "teacher.alpha": 0.9,
        "teacher.every": 5,
    },
    "grpo_paper": {
        "prompt.max_prompt_length": 2048,
        "rollout.max_completion_length": 8192,
        "optim.warmup_steps": 50,
        "optim.learning_rate": 1e-7,
        "rollout.prompts_per_step": 128,
        "rollout.num_generations": 5,
        "loss.beta": 0.001,
    },
}

PAPER_PRESETS = (*STATED, "fd_then_grpo")


def open_choices_as_comments() -> str:
    """A YAML comment for each, which `fdfast config show` prints of the paper's presets."""
    lines = ["# What the paper leaves open, our default and why:"]
    for choice in OPEN_CHOICES:
        lines += [
            f"#   {choice.question} ({', '.join(choice.settings)}):",
            f"#     {choice.default}; {choice.reason}",
        ]
    return "\n".join(lines) + "\n"
