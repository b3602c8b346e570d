"""The groups of a training run's settings."""

from dataclasses import dataclass
from typing import Literal

from fdfast.dispatch import BACKENDS
from fdfast.divergences import TABLE, TAILS
from fdfast.feedback import SOURCES
from fdfast.losses.policy import IS_MODES, LOSS_TYPES
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
class DataSettings(Settings):
    """What is attempted.

    Attributes:
        task: chat (questions without a check) or lean (theorems, checked by Lean).
        dataset: a file or folder of theorems or hf:OWNER/NAME, in the fields of miniF2F or another
            published set (data.jsonl.read_theorems); for chat a JSONL file of questions.
            "base_theorems" and "questions" ship with fdfast.
        dataset_split: the split to train on; "" for all.
        problem_names: keep problems whose name fits one of these patterns (easy_*); () for all.
    """

    group = "data."

    task: Literal["chat", "lean"] = "lean"
    dataset: str = "base_theorems"
    dataset_split: str = "train"
    problem_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptSettings(Settings):
    """What the model reads.

    Attributes:
        system_prompt: first message of every prompt; "" for the chat template's own.
        prompt_template: the user's message; {prompt} is the problem.
        examples: worked examples as chat turns before the problem: [question, answer] pairs.
        completion_prefix: begins the assistant's turn, given and not trained; {prompt} as above.
        max_prompt_length: a prompt with more tokens is an error, never cut silently.
    """

    group = "prompt."

    system_prompt: str = ""
    prompt_template: str = "{prompt}"
    examples: tuple[tuple[str, str], ...] = ()
    completion_prefix: str = ""
    max_prompt_length: int = at_least_one(2048)


@dataclass(frozen=True)
class FeedbackSettings(Settings):
    """What the teacher is told of an attempt.

    Attributes:
        source: constant, verifier, solution, llm (a model behind an OpenAI-compatible chat
            endpoint) or self (the model itself).
        text: the constant's sentence.
        position: where it stands in the user's message to the teacher, end or start; the paper does
            not say.
        template: that whole message in your words instead; {prompt} as above (already in its own
            template) and {feedback}. "" for the source's own at position.
        on_failure: of llm or self: skip leaves the attempt out of the step, another source steps
            in.
        allow_solution: whether llm and self may say the solution.
        max_feedback_length: tokens of feedback in the teacher's prompt at most; longer is cut in
            the middle.
        max_tokens: tokens that llm or self may write, thinking included.
        self_model: who is self: the initial model as in the paper (of a moving teacher a second
            copy in memory, read from model_name_or_path again at --resume), or the teacher.
        base_url: of llm's API, with its version: http://127.0.0.1:8000/v1, say.
        model: its name there.
        api_key_env: the environment variable with the key; "" sends none.
        max_concurrency: requests at once.
        max_retries: requests sent again for one answer, after an error.
        timeout_s: seconds that one request may take.
        prices_usd: US dollars per million tokens of prompts and of answers.
        budget_tokens: of this process in all; 0 for no limit. Cached answers cost nothing.
        budget_usd: likewise.
    """

    group = "feedback."

    source: str = one_of("verifier", SOURCES)
    text: str = ""
    position: Literal["end", "start"] = "end"
    template: str = ""
    on_failure: str = one_of("skip", ("skip", *SOURCES))
    allow_solution: bool = False
    max_feedback_length: int = at_least_one(1024)
    max_tokens: int = at_least_one(2048)
    self_model: Literal["initial", "teacher"] = "initial"
    base_url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    max_concurrency: int = at_least_one(16)
    max_retries: int = not_negative(5)
    timeout_s: float = positive(120.0)
    prices_usd: tuple[float, float] = (0.0, 0.0)
    budget_tokens: int = not_negative(0)
    budget_usd: float = not_negative(0.0)


@dataclass(frozen=True)
class RolloutSettings(Settings):
    """How attempts are sampled.

    Attributes:
        prompts_per_step: problems a step.
        max_staleness: updates by which the weights that sample a batch may be older than those
            that it changes; 0 makes a batch when the one before it is trained on, as the paper
            does. Above, rollouts, Lean and feedback of later steps go on while a step is trained
            on, with a copy of the model (vLLM and Ray have theirs), and GRPO corrects by
            vllm.importance_sampling_*. A resumed run makes anew what was under way.
        num_generations: attempts a problem.
        max_completion_length: tokens of an attempt at most.
        temperature: of sampling.
        top_p: nucleus of sampling; 1 is off.
        top_k: of sampling; 0 is off.
        stop_strings: text that ends an attempt, beside the model's end token.
        generation_batch_size: attempts generated at once.
        use_vllm: whether vLLM samples, on a copy of the weights that follows every step; else the
            trained model itself.
        tools: whether the model may write Lean files, check them, and search tool_libraries, before
            it answers; for task lean and a model whose chat template has tools.
        tool_libraries: folders of Lean files to search.
        max_tool_calling_iterations: turns of an attempt that may end in tool calls.
        max_tool_tokens: of the tools' answers to one turn; longer ones are cut in the middle.
    """

    group = "rollout."

    prompts_per_step: int = at_least_one(128)
    max_staleness: int = not_negative(0)
    num_generations: int = at_least_one(1)
    max_completion_length: int = at_least_one(8192)
    temperature: float = positive(1.0)
    top_p: float = within(1.0, lambda p: 0 < p <= 1, "(0, 1]")
    top_k: int = not_negative(0)
    stop_strings: tuple[str, ...] = ()
    generation_batch_size: int = at_least_one(16)
    use_vllm: bool = False
    tools: bool = False
    tool_libraries: tuple[str, ...] = ()
    max_tool_calling_iterations: int = at_least_one(8)
    max_tool_tokens: int = at_least_one(1024)


@dataclass(frozen=True)
class VLLMSettings(Settings):
    """For rollout.use_vllm.

    Attributes:
        mode: colocate (in this process, on the same device) or server (one that runs already).
        server_base_url: of the server: http://127.0.0.1:8000, say.
        weights_dir: a folder that the server sees too, through which it gets new weights; "" for
            one in memory (/dev/shm), for a server on this machine.
        max_model_length: tokens of a prompt with all that follows it; 0 for the model's own.
        gpu_memory_utilization: share of the GPU's memory for a colocated vLLM.
        tensor_parallel_size: GPUs of a colocated vLLM.
        enable_sleep_mode: whether a colocated vLLM gives its memory back during the update.
        importance_sampling_correction: whether what vLLM's arithmetic, or rollout.max_staleness,
            makes of the policy is corrected by p_train / p_sampler.
        importance_sampling_mode: token or sequence, truncate or mask.
        importance_sampling_clip_max: upper bound of that ratio.
    """

    group = "vllm."

    mode: Literal["colocate", "server"] = "colocate"
    server_base_url: str = ""
    weights_dir: str = ""
    max_model_length: int = not_negative(0)
    gpu_memory_utilization: float = within(0.3, lambda u: 0 < u <= 1, "(0, 1]")
    tensor_parallel_size: int = at_least_one(1)
    enable_sleep_mode: bool = False
    importance_sampling_correction: bool = True
    importance_sampling_mode: str = one_of("sequence_mask", IS_MODES)
    importance_sampling_clip_max: float = positive(3.0)


@dataclass(frozen=True)
class RaySettings(Settings):
    """A Ray cluster that samples and checks.

    Attributes:
        address: HOST:PORT of its head, or "auto" for the one that this machine belongs to; "" for
            none. Each actor has the model (rollout.use_vllm: in vLLM), lean.workers and tools of
            its own; rollout.generation_batch_size is for each.
        num_actors: actors on it; what finds no room joins when there is some.
        gpus_per_actor: 0 samples on the CPU.
        cpus_per_actor: as Ray counts them.
    """

    group = "ray."

    address: str = ""
    num_actors: int = at_least_one(1)
    gpus_per_actor: float = not_negative(1.0)
    cpus_per_actor: float = not_negative(1.0)


@dataclass(frozen=True)
class LeanSettings(Settings):
    """Lean's checks.

    Attributes:
        timeout_s: seconds a check may take, of an attempt or of a tool's file.
        workers: checks at once.
    """

    group = "lean."

    timeout_s: float = positive(30.0)
    workers: int = at_least_one(2)


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
