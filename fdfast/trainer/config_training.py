"""Settings of what learns from them: model, loss, teacher, optimizer, and what is kept."""

from dataclasses import dataclass
from typing import Literal

from fdfast.dispatch import BACKENDS
from fdfast.divergences import TABLE, TAILS
from fdfast.losses.policy import LOSS_TYPES
from fdfast.trainer.settings import (
    Settings,
    at_least_one,
    not_negative,
    one_of,
    positive,
    within,
)
from fdfast.types import DEFAULT_WORKSPACE_MB

GPU_PASS_TOKENS = 16384
# FD step of SmolLM2-135M, 16 attempts of 128 + 128 tokens, float32, one thread of an AMD EPYC; CPU
# seconds of scoring and memory beside models and optimizer, medians of 3: 512 tokens 32.3 s, 1.04
# GiB; 1024 28.3 s, 1.60 GiB; 2048 30.4 s, 2.66 GiB; 4096 30.4 s, 3.73 GiB.
CPU_PASS_TOKENS = 1024


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model, and how passes through it are computed.

    Attributes:
        model_name_or_path: a folder, a hub name, or "demo" (SmolLM2-135M-Instruct).
        device: cpu or cuda; "" for a GPU where there is one. Under torchrun each rank has its own.
        dtype: of the trained weights: float32 or bfloat16; float16 is for `fdfast rollout` alone.
        float32_matmul_precision: torch's: highest, high or medium. On CPUs without bfloat16 matrix
            units medium is as exact as highest and takes another library, twice as fast on AMD.
        max_pass_tokens: of one forward pass; None for 16384 on a GPU and 1024 on a CPU, whose
            passes of more take more memory and no less time. Attempts are packed, with what they
            share once, into as few passes as this allows; a problem whose attempts are more is
            streamed, or refused where the loss wants them whole (under None: beyond 16384).
        gradient_checkpointing: trade time for memory in the student's layers.
        vocabulary_parallel: on several ranks (CPUs) each computes the loss of all ranks' tokens
            with its own rows of the LM head, which no rank gathers; a head that is the embedding
            too is still gathered for that. On one rank it changes nothing.
        activation_offloading: keep on the CPU what the student's backward pass needs until it does,
            of a model on a GPU; with gradient_checkpointing that is the layers' inputs alone.
    """

    group = "model."

    model_name_or_path: str = "demo"
    device: Literal["", "cpu", "cuda"] = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    max_pass_tokens: int | None = within(None, lambda tokens: tokens >= 1, "[1, inf)")
    gradient_checkpointing: bool = False
    vocabulary_parallel: bool = False
    activation_offloading: bool = False

    def pass_tokens(self, device: str) -> int:
        """What a pass is filled up to on a kind of device, cuda or cpu."""
        return self.max_pass_tokens or (CPU_PASS_TOKENS if device == "cpu" else GPU_PASS_TOKENS)

    @property
    def whole_tokens(self) -> int:
        """What a pass may hold where it can't be divided."""
        return self.max_pass_tokens or GPU_PASS_TOKENS


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Adapters in place of all weights.

    Attributes:
        use_peft: whether LoRA adapters alone are trained; the final model has them merged, and
            output_dir/adapter has them by themselves.
        r: rank of an adapter.
        alpha: an adapter is alpha / r * B A.
        dropout: of an adapter's input.
        target_modules: last parts of the names of layers that get one (q_proj, v_proj); () for
            every linear layer but the head.
    """

    group = "lora."

    use_peft: bool = False
    r: int = at_least_one(16)
    alpha: float = positive(32.0)
    dropout: float = within(0.0, lambda p: 0 <= p < 1, "[0, 1)")
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossSettings(Settings):
    """What is minimised.

    Attributes:
        distillation_weight: 1 for Feedback Distillation, 0 for GRPO (Lean's verdict is the reward),
            or a mix of both losses. At 0 neither feedback nor the teacher is asked.
        divergence: a name in divergences.TABLE.
        divergence_alpha: for jsd and skew_kl.
        distillation_temperature: of the student's and the teacher's distributions in the loss.
        teacher_top_k: teacher's tokens in the loss; 25 in the paper, 0 for the whole vocabulary.
        tail: for teacher_top_k: truncate, bucket, renormalize.
        loss_type: of GRPO: dapo, bnpo, cispo, dr_grpo, grpo, sapo.
        importance_sampling_level: token, or sequence (GSPO).
        epsilon: lower clip range.
        epsilon_high: upper clip range; None: epsilon.
        beta: weight of the KL to the reference, the student as the stage found it; 0 for none.
        scale_rewards: what a group's advantages are divided by: group, batch or none.
        entropy_coef: weight of the entropy bonus.
        grad_filter: the largest share of a token's gradient by the logits that the backward pass
            may drop, 0.03 say; None is exact.
        workspace_mb: MiB that logits may take at once.
        backend: of the LM head's op: auto (triton on a GPU, else cpu), cpu, triton, or reference,
            which is slow and stores all logits.
    """

    group = "loss."

    distillation_weight: float = within(1.0, lambda w: 0 <= w <= 1, "[0, 1]")
    divergence: str = one_of("forward_kl", TABLE)
    divergence_alpha: float = 0.5
    distillation_temperature: float = positive(1.0)
    teacher_top_k: int = not_negative(25)
    tail: str = one_of("truncate", TAILS)
    loss_type: str = one_of("dapo", LOSS_TYPES)
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = not_negative(0.2)
    epsilon_high: float | None = None
    beta: float = not_negative(0.0)
    scale_rewards: Literal["group", "batch", "none"] = "group"
    entropy_coef: float = not_negative(0.0)
    grad_filter: float | None = within(None, lambda f: 0 <= f < 1, "[0, 1)")
    workspace_mb: float = positive(DEFAULT_WORKSPACE_MB)
    backend: str = one_of("auto", BACKENDS)


@dataclass(frozen=True)
class TeacherSettings(Settings):
    """The copy of the model that reads the feedback.

    Attributes:
        kind: ema (the paper's), frozen (the initial model), periodic (the student as it was at the
            last update) or live (the student itself). Where no stage distills there is none.
        alpha: of kind ema, the share it keeps at an update; 1 is a frozen teacher.
        every: optimizer steps between updates, of kinds ema and periodic.
        scoring_dtype: of the teacher's passes: "" for model.dtype, or bfloat16.
        master_device: of ema's float32 copy: "" for beside the model, or cpu.
    """

    group = "teacher."

    kind: Literal["ema", "frozen", "live", "periodic"] = "ema"
    alpha: float = within(0.9, lambda a: 0 <= a <= 1, "[0, 1]")
    every: int = at_least_one(5)
    scoring_dtype: Literal["", "bfloat16"] = ""
    master_device: Literal["", "cpu"] = ""


@dataclass(frozen=True)
class OptimSettings(Settings):
    """The optimizer and its schedule.

    Attributes:
        learning_rate: the peak.
        lr_scheduler_type: constant_with_warmup or linear (to 0 at max_steps).
        warmup_steps: linear warm-up.
        max_steps: optimizer steps; with stages each has its own.
        adam_beta1: AdamW.
        adam_beta2: AdamW.
        adam_epsilon: AdamW.
        weight_decay: AdamW.
        max_grad_norm: clipping; 0 is off.
    """

    group = "optim."

    learning_rate: float = positive(1e-5)
    lr_scheduler_type: Literal["constant_with_warmup", "linear"] = "constant_with_warmup"
    warmup_steps: int = not_negative(50)
    max_steps: int = at_least_one(200)
    adam_beta1: float = within(0.9, lambda b: 0 <= b < 1, "[0, 1)")
    adam_beta2: float = within(0.999, lambda b: 0 <= b < 1, "[0, 1)")
    adam_epsilon: float = positive(1e-8)
    weight_decay: float = not_negative(0.0)
    max_grad_norm: float = not_negative(1.0)


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """What is measured on problems that are not trained on, with one fixed seed.

    Attributes:
        eval_split: the split to evaluate on; "" for all. Evaluation samples with one fixed seed.
        eval_num_prompts: its first so many problems; 0 for no evaluation.
        num_generations_eval: attempts at each of them.
        eval_steps: steps between evaluations; 0 for before the first and after the last alone.
    """

    group = "evaluation."

    eval_split: str = "test"
    eval_num_prompts: int = not_negative(0)
    num_generations_eval: int = at_least_one(1)
    eval_steps: int = not_negative(0)


@dataclass(frozen=True)
class GuardSettings(Settings):
    """Alarms.

    Attributes:
        max_skipped_steps: steps in a row that may be skipped because their loss or gradient is not
            finite; one more ends the run.
        max_bad_step_dumps: batches of skipped steps kept in output_dir/bad-step-<n>; 0 for none.
        alarm_window: steps whose median an alarm compares with.
        entropy_alarm_ratio: alarm where entropy falls below this share of its median; 0 for none.
        entropy_alarm_action: what follows: warn, stop (which leaves a checkpoint) or lower_rate (by
            half).
        kl_alarm_ratio: alarm where kl is more than so many times its median; 0 for none.
        zero_reward_alarm_steps: alarm after so many steps without a proof; 0 for none.
    """

    group = "guards."

    max_skipped_steps: int = not_negative(3)
    max_bad_step_dumps: int = not_negative(3)
    alarm_window: int = at_least_one(20)
    entropy_alarm_ratio: float = not_negative(0.5)
    entropy_alarm_action: Literal["warn", "stop", "lower_rate"] = "warn"
    kl_alarm_ratio: float = not_negative(10.0)
    zero_reward_alarm_steps: int = not_negative(10)


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """What is kept of a run.

    Attributes:
        save_steps: steps between checkpoints; 0 for none but the one that Ctrl-C leaves.
        save_total_limit: checkpoints kept; older ones go. 0 keeps all.
        save_final_model: write the trained model to output_dir/model at the end.
    """

    group = "checkpoint."

    save_steps: int = not_negative(50)
    save_total_limit: int = not_negative(2)
    save_final_model: bool = True
