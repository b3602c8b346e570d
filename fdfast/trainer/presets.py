"""Settings by name; what a preset leaves out is TrainConfig's default, the paper's own number."""

from typing import Any

# The paper's column for GRPO. It names no clip range, no normalisation and no scale of advantages:
# those are TRL's defaults.
_GRPO: dict[str, Any] = {
    "loss.distillation_weight": 0.0,
    "optim.learning_rate": 1e-7,
    "rollout.num_generations": 5,
    "loss.beta": 0.001,
}

# What a model of 135M parameters needs to see to write a proof at all.
_EXAMPLES = (
    "theorem e1 (p : Prop) (x : p) : p := x\n"
    "theorem e2 (p q : Prop) (x : p) (y : q) : q := y\n"
    "theorem e3 (p : Prop) : p → p := fun x => x\n"
    "theorem e4 : Eq (Nat.add 3 4) 7 := rfl\n{prompt}"
)

PRESETS: dict[str, dict[str, Any]] = {
    # The paper's table: Qwen3-8B, LeanWorkbook; the model and the data set are yours to name.
    "fd_paper": {},
    "grpo_paper": _GRPO,
    "fd_then_grpo": {"stages": ({"max_steps": 200}, {"max_steps": 200, **_GRPO})},
    # All of it once, in minutes on two cores: both stages, evaluation, checkpoints.
    "lab": {
        "model.float32_matmul_precision": "medium",
        "data.problem_names": ("easy_*", "taut_*", "calc_*"),
        "prompt.system_prompt": "You write Lean.",
        "prompt.prompt_template": "Complete the Lean proofs.",
        "prompt.completion_prefix": _EXAMPLES,
        "feedback.position": "start",
        "rollout.prompts_per_step": 8,
        "rollout.max_completion_length": 16,
        "rollout.stop_strings": ("\n",),
        "rollout.temperature": 0.7,
        "teacher.every": 2,
        "optim.adam_beta2": 0.95,
        "optim.warmup_steps": 2,
        "stages": (
            {"max_steps": 4},
            {
                "max_steps": 4,
                "distillation_weight": 0.0,
                "learning_rate": 2e-6,
                "prompts_per_step": 2,
                "num_generations": 4,
                "beta": 0.001,
            },
        ),
        "evaluation.eval_num_prompts": 8,
        "evaluation.eval_steps": 4,
        "lean.timeout_s": 10.0,
        "checkpoint.save_steps": 4,
        "checkpoint.save_total_limit": 1,
    },
    # The two parts of `fdfast demo`: what 135M parameters show in minutes on two cores.
    "demo_concise": {
        "data.task": "chat",
        "data.dataset": "questions",
        "model.float32_matmul_precision": "medium",
        "prompt.system_prompt": "You are helpful.",
        "feedback.source": "constant",
        "feedback.text": "Be concise: answer in one short sentence.",
        "feedback.position": "start",
        "rollout.prompts_per_step": 8,
        "rollout.max_completion_length": 48,
        "rollout.temperature": 0.7,
        "loss.teacher_top_k": 0,
        "teacher.alpha": 1.0,
        "optim.learning_rate": 5e-5,
        "optim.lr_scheduler_type": "linear",
        "optim.adam_beta2": 0.95,
        "optim.warmup_steps": 2,
        "optim.max_steps": 16,
        "evaluation.eval_num_prompts": 8,
        "evaluation.num_generations_eval": 2,
        "checkpoint.save_steps": 4,
        "checkpoint.save_total_limit": 1,
        "checkpoint.save_final_model": False,
    },
    "demo_lean": {
        "data.task": "lean",
        "model.float32_matmul_precision": "medium",
        "data.problem_names": ("easy_*", "taut_*", "calc_*"),
        "prompt.system_prompt": "You write Lean.",
        "prompt.prompt_template": "Complete the Lean proofs.",
        "prompt.completion_prefix": _EXAMPLES,
        "feedback.source": "verifier",
        "feedback.position": "start",
        "rollout.prompts_per_step": 8,
        "rollout.max_completion_length": 16,
        "rollout.stop_strings": ("\n",),
        "rollout.temperature": 0.7,
        "loss.teacher_top_k": 0,
        "teacher.every": 2,
        "optim.learning_rate": 1e-5,
        "optim.adam_beta2": 0.95,
        "optim.warmup_steps": 2,
        "optim.max_steps": 6,
        "evaluation.eval_num_prompts": 16,
        "lean.timeout_s": 10.0,
        "checkpoint.save_steps": 4,
        "checkpoint.save_total_limit": 1,
        "checkpoint.save_final_model": False,
    },
}
