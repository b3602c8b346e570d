"""Settings by name; what a preset leaves out is TrainConfig's default, the paper's own number."""

from typing import Any

# The paper's column for GRPO. It names no clip range, no normalisation and no scale of advantages:
# those are TRL's defaults.
_GRPO: dict[str, Any] = {
    "distillation_weight": 0.0,
    "learning_rate": 1e-7,
    "num_generations": 5,
    "beta": 0.001,
}

PRESETS: dict[str, dict[str, Any]] = {
    # The paper's table: Qwen3-8B, LeanWorkbook; the model and the data set are yours to name.
    "fd_paper": {},
    "grpo_paper": _GRPO,
    "fd_then_grpo": {"stages": ({"max_steps": 200}, {"max_steps": 200, **_GRPO})},
    # The two parts of `fdfast demo`: what 135M parameters show in minutes on two cores.
    "demo_concise": {
        "task": "chat",
        "dataset": "questions",
        "float32_matmul_precision": "medium",
        "system_prompt": "You are helpful.",
        "feedback": "constant",
        "feedback_text": "Be concise: answer in one short sentence.",
        "feedback_position": "start",
        "prompts_per_step": 8,
        "max_completion_length": 48,
        "temperature": 0.7,
        "teacher_top_k": 0,
        "teacher_ema_alpha": 1.0,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.95,
        "warmup_steps": 2,
        "max_steps": 16,
        "eval_num_prompts": 8,
        "num_generations_eval": 2,
        "save_steps": 4,
        "save_total_limit": 1,
        "save_final_model": False,
    },
    "demo_lean": {
        "task": "lean",
        "float32_matmul_precision": "medium",
        "problem_names": ("easy_*", "taut_*", "calc_*"),
        "system_prompt": "You write Lean.",
        "prompt_template": "Complete the Lean proofs.",
        "completion_prefix": (
            "theorem e1 (p : Prop) (x : p) : p := x\n"
            "theorem e2 (p q : Prop) (x : p) (y : q) : q := y\n"
            "theorem e3 (p : Prop) : p → p := fun x => x\n"
            "theorem e4 : Eq (Nat.add 3 4) 7 := rfl\n{prompt}"
        ),
        "feedback": "verifier",
        "feedback_position": "start",
        "prompts_per_step": 8,
        "max_completion_length": 16,
        "stop_strings": ("\n",),
        "temperature": 0.7,
        "teacher_top_k": 0,
        "teacher_ema_every": 2,
        "learning_rate": 1e-5,
        "adam_beta2": 0.95,
        "warmup_steps": 2,
        "max_steps": 6,
        "eval_num_prompts": 16,
        "lean_timeout_s": 10.0,
        "save_steps": 4,
        "save_total_limit": 1,
        "save_final_model": False,
    },
}
