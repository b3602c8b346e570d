"""Every setting of a training run: one dataclass."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from fdfast.dispatch import BACKENDS
from fdfast.divergences import TABLE, TAILS
from fdfast.errors import InputError
from fdfast.feedback import SOURCES
from fdfast.losses.policy import IS_MODES, LOSS_TYPES
from fdfast.trainer.feedback import check_feedback
from fdfast.trainer.stages import Stage, stage_configs
from fdfast.types import DEFAULT_WORKSPACE_MB


@dataclass(frozen=True)
class TrainConfig:
    """A Feedback Distillation run; the defaults are the paper's where it names one.

    Names are TRL's where TRL has one. Attributes:
        model_name_or_path: a folder, a hub name, or "demo" (SmolLM2-135M-Instruct).
        dtype: of the trained weights: float32, bfloat16, float16.
        use_peft: whether LoRA adapters alone are trained; the final model has them merged, and
            output_dir/adapter has them by themselves.
        lora_r: rank of an adapter.
        lora_alpha: an adapter is lora_alpha / lora_r * B A.
        lora_dropout: of an adapter's input.
        lora_target_modules: last parts of the names of layers that get one (q_proj, v_proj); () for
            every linear layer but the head.
        task: chat (questions without a check) or lean (theorems, checked by Lean).
        dataset: a file or folder of theorems or hf:OWNER/NAME, in the fields of miniF2F or another
            published set (data.jsonl.read_theorems); for chat a JSONL file of questions.
            "base_theorems" and "questions" ship with fdfast.
        dataset_split: the split to train on; "" for all.
        problem_names: keep problems whose name fits one of these patterns (easy_*); () for all.
        output_dir: metrics, checkpoints and the final model go there.
        float32_matmul_precision: torch's: highest, high or medium. On CPUs without bfloat16 matrix
            units medium is as exact as highest and takes another library, twice as fast on AMD.
        seed: of everything random; a step's randomness follows from (seed, step) alone.

        system_prompt: first message of every prompt; "" for the chat template's own.
        prompt_template: the user's message; {prompt} is the problem.
        examples: worked examples as chat turns before the problem: [question, answer] pairs.
        completion_prefix: begins the assistant's turn, given and not trained; {prompt} as above.
        feedback: constant, verifier, solution, llm (a model behind an OpenAI-compatible chat
            endpoint) or self (the model itself).
        feedback_text: the constant's sentence.
        feedback_position: where it stands in the user's message to the teacher, end or start; the
            paper does not say.
        feedback_template: that whole message in your words instead; {prompt} as above (already in
            its own template) and {feedback}. "" for the source's own at feedback_position.
        feedback_on_failure: of llm or self: skip leaves the attempt out of the step, another source
            steps in.
        feedback_allow_solution: whether llm and self may say the solution.
        feedback_max_completion_length: tokens that llm or self may write, thinking included.
        feedback_self_model: who is self: the initial model as in the paper (of a moving teacher a
            second copy in memory, read from model_name_or_path again at --resume), or the teacher.
        feedback_base_url: of llm's API, with its version: http://127.0.0.1:8000/v1, say.
        feedback_model: its name there.
        feedback_api_key_env: the environment variable with the key; "" sends none.
        feedback_max_concurrency: requests at once.
        feedback_max_retries: requests sent again for one answer, after an error.
        feedback_timeout_s: seconds that one request may take.
        feedback_prices_usd: US dollars per million tokens of prompts and of answers.
        feedback_budget_tokens: of the run in all, resumes included; 0 for no limit. Cached answers
            cost nothing.
        feedback_budget_usd: likewise.

        prompts_per_step: problems a step.
        num_generations: attempts a problem.
        max_prompt_length: a prompt with more tokens is an error, never cut silently.
        max_feedback_length: tokens of feedback in the teacher's prompt at most; longer is cut in
            the middle.
        max_completion_length: tokens of an attempt at most.
        temperature: of sampling.
        top_p: nucleus of sampling; 1 is off.
        top_k: of sampling; 0 is off.
        stop_strings: text that ends an attempt, beside the model's end token.
        generation_batch_size: attempts generated at once.
        use_vllm: whether vLLM samples, on a copy of the weights that follows every step; else the
            trained model itself.
        vllm_mode: colocate (in this process, on the same device) or server (one that runs already).
        vllm_server_base_url: of the server: http://127.0.0.1:8000, say.
        vllm_weights_dir: a folder that the server sees too, through which it gets new weights; ""
            for one in memory (/dev/shm), for a server on this machine.
        vllm_max_model_length: tokens of a prompt with all that follows it; 0 for the model's own.
        vllm_gpu_memory_utilization: share of the GPU's memory for a colocated vLLM.
        vllm_tensor_parallel_size: GPUs of a colocated vLLM.
        vllm_enable_sleep_mode: whether a colocated vLLM gives its memory back during the update.
        ray_address: a Ray cluster that samples and checks: HOST:PORT of its head, or "auto" for the
            one that this machine belongs to; "" for none. Each actor has the model (use_vllm: in
            vLLM), lean_workers and tools of its own; generation_batch_size is for each.
        ray_num_actors: actors on it; what finds no room joins when there is some.
        ray_gpus_per_actor: 0 samples on the CPU.
        ray_cpus_per_actor: as Ray counts them.
        tools: whether the model may write Lean files, check them, and search tool_libraries, before
            it answers; for task lean and a model whose chat template has tools.
        tool_libraries: folders of Lean files to search.
        max_tool_calling_iterations: turns of an attempt that may end in tool calls.
        max_tool_tokens: of the tools' answers to one turn; longer ones are cut in the middle.

        lean_timeout_s: seconds a check may take, of an attempt or of a tool's file.
        lean_workers: checks at once.

        distillation_weight: 1 for Feedback Distillation, 0 for GRPO (Lean's verdict is the reward),
            or a mix of both losses. At 0 neither feedback nor the teacher is asked.
        loss_type: of GRPO: dapo, bnpo, cispo, dr_grpo, grpo, sapo.
        importance_sampling_level: token, or sequence (GSPO).
        epsilon: lower clip range.
        epsilon_high: upper clip range; None: epsilon.
        beta: weight of the KL to the reference, the student as the stage found it; 0 for none.
        scale_rewards: what a group's advantages are divided by: group, batch or none.
        vllm_importance_sampling_correction: whether what vLLM's arithmetic makes of the policy is
            corrected by p_train / p_sampler.
        vllm_importance_sampling_mode: token or sequence, truncate or mask.
        vllm_importance_sampling_clip_max: upper bound of that ratio.

        loss_temperature: of the student's and the teacher's distributions in the loss.
        divergence: a name in divergences.TABLE.
        divergence_alpha: for jsd and skew_kl.
        teacher_top_k: teacher's tokens in the loss; 25 in the paper, 0 for the whole vocabulary.
        tail: for teacher_top_k: truncate, bucket, renormalize.
        entropy_coef: weight of the entropy bonus.
        grad_filter: see policy_head; None is exact.
        workspace_mb: see policy_head.
        backend: see policy_head.
        teacher_kind: ema (the paper's), frozen (the initial model), periodic (the student as it was
            at the last update) or live (the student itself). Where no stage distills there is none.
        teacher_ema_alpha: of kind ema, the share it keeps at an update; 1 is a frozen teacher.
        teacher_ema_every: optimizer steps between updates, of kinds ema and periodic.
        teacher_scoring_dtype: of the teacher's passes: "" for dtype, or bfloat16.
        teacher_master_device: of ema's float32 copy: "" for beside the model, or cpu.

        learning_rate: the peak.
        lr_scheduler_type: constant_with_warmup or linear (to 0 at max_steps).
        warmup_steps: linear warm-up.
        max_steps: optimizer steps; with stages each has its own.
        stages: stages of the run, in order, each with max_steps and whatever differs from the
            settings here: distillation_weight, learning_rate, ... (stages.Stage); () for one.
        max_pass_tokens: of one forward pass. Attempts are packed, with what they share once, into
            as few passes as this allows; a problem whose attempts are more is streamed.
        adam_beta1: AdamW.
        adam_beta2: AdamW.
        adam_epsilon: AdamW.
        weight_decay: AdamW.
        max_grad_norm: clipping; 0 is off.
        gradient_checkpointing: trade time for memory in the student's layers.

        eval_split: the split to evaluate on; "" for all. Evaluation samples with one fixed seed.
        eval_num_prompts: its first so many problems; 0 for no evaluation.
        num_generations_eval: attempts at each of them.
        eval_steps: steps between evaluations; 0 for before the first and after the last alone.

        max_skipped_steps: steps in a row that may be skipped because their loss or gradient is not
            finite; one more ends the run.
        alarm_window: steps whose median an alarm compares with.
        entropy_alarm_ratio: alarm where entropy falls below this share of its median; 0 for none.
        entropy_alarm_action: what follows: warn, stop (which leaves a checkpoint) or
            lower_rate (by half).
        kl_alarm_ratio: alarm where kl is more than so many times its median; 0 for none.
        zero_reward_alarm_steps: alarm after so many steps without a proof; 0 for none.

        save_steps: steps between checkpoints; 0 for none but the one that Ctrl-C leaves.
        save_total_limit: checkpoints kept; older ones go. 0 keeps all.
        save_final_model: write the trained model to output_dir/model at the end.
    """

    model_name_or_path: str = "demo"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = ()
    task: Literal["chat", "lean"] = "lean"
    dataset: str = "base_theorems"
    dataset_split: str = "train"
    problem_names: tuple[str, ...] = ()
    output_dir: str = "runs/fd"
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    seed: int = 0

    system_prompt: str = ""
    prompt_template: str = "{prompt}"
    examples: tuple[tuple[str, str], ...] = ()
    completion_prefix: str = ""
    feedback: str = "verifier"
    feedback_text: str = ""
    feedback_position: Literal["end", "start"] = "end"
    feedback_template: str = ""
    feedback_on_failure: str = "skip"
    feedback_allow_solution: bool = False
    feedback_max_completion_length: int = 2048
    feedback_self_model: Literal["initial", "teacher"] = "initial"
    feedback_base_url: str = ""
    feedback_model: str = ""
    feedback_api_key_env: str = "OPENAI_API_KEY"
    feedback_max_concurrency: int = 16
    feedback_max_retries: int = 5
    feedback_timeout_s: float = 120.0
    feedback_prices_usd: tuple[float, float] = (0.0, 0.0)
    feedback_budget_tokens: int = 0
    feedback_budget_usd: float = 0.0

    prompts_per_step: int = 128
    num_generations: int = 1
    max_prompt_length: int = 2048
    max_feedback_length: int = 1024
    max_completion_length: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: tuple[str, ...] = ()
    generation_batch_size: int = 16
    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"
    vllm_server_base_url: str = ""
    vllm_weights_dir: str = ""
    vllm_max_model_length: int = 0
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False
    ray_address: str = ""
    ray_num_actors: int = 1
    ray_gpus_per_actor: float = 1.0
    ray_cpus_per_actor: float = 1.0
    tools: bool = False
    tool_libraries: tuple[str, ...] = ()
    max_tool_calling_iterations: int = 8
    max_tool_tokens: int = 1024

    lean_timeout_s: float = 30.0
    lean_workers: int = 2

    distillation_weight: float = 1.0
    loss_type: str = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    scale_rewards: Literal["group", "batch", "none"] = "group"
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float = 3.0

    loss_temperature: float = 1.0
    divergence: str = "forward_kl"
    divergence_alpha: float = 0.5
    teacher_top_k: int = 25
    tail: str = "truncate"
    entropy_coef: float = 0.0
    grad_filter: float | None = None
    workspace_mb: float = DEFAULT_WORKSPACE_MB
    backend: str = "auto"
    teacher_kind: Literal["ema", "frozen", "live", "periodic"] = "ema"
    teacher_ema_alpha: float = 0.9
    teacher_ema_every: int = 5
    teacher_scoring_dtype: Literal["", "bfloat16"] = ""
    teacher_master_device: Literal["", "cpu"] = ""

    learning_rate: float = 1e-5
    lr_scheduler_type: Literal["constant_with_warmup", "linear"] = "constant_with_warmup"
    warmup_steps: int = 50
    max_steps: int = 200
    stages: tuple[Stage, ...] = ()
    max_pass_tokens: int = 16384
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False

    eval_split: str = "test"
    eval_num_prompts: int = 0
    num_generations_eval: int = 1
    eval_steps: int = 0

    max_skipped_steps: int = 3
    alarm_window: int = 20
    entropy_alarm_ratio: float = 0.5
    entropy_alarm_action: Literal["warn", "stop", "lower_rate"] = "warn"
    kl_alarm_ratio: float = 10.0
    zero_reward_alarm_steps: int = 10

    save_steps: int = 50
    save_total_limit: int = 2
    save_final_model: bool = True

    def __post_init__(self) -> None:
        """Check the rules that a type can't say."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"config: {field.name} must be a finite number; got {value}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InputError(f"config: {name} must be at least 1; got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise InputError(f"config: {name} must not be negative; got {getattr(self, name)}")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise InputError(f"config: {name} must be positive; got {getattr(self, name)}")
        for name, value, holds, rule in (
            ("top_p", self.top_p, self.top_p <= 1, "(0, 1]"),
            (
                "teacher_ema_alpha",
                self.teacher_ema_alpha,
                0 <= self.teacher_ema_alpha <= 1,
                "[0, 1]",
            ),
            (
                "vllm_gpu_memory_utilization",
                self.vllm_gpu_memory_utilization,
                0 < self.vllm_gpu_memory_utilization <= 1,
                "(0, 1]",
            ),
            (
                "distillation_weight",
                self.distillation_weight,
                0 <= self.distillation_weight <= 1,
                "[0, 1]",
            ),
            ("adam_beta1", self.adam_beta1, 0 <= self.adam_beta1 < 1, "[0, 1)"),
            ("adam_beta2", self.adam_beta2, 0 <= self.adam_beta2 < 1, "[0, 1)"),
            ("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "[0, 1)"),
            ("grad_filter", self.grad_filter, 0 <= (self.grad_filter or 0) < 1, "[0, 1)"),
        ):
            if not holds:
                raise InputError(f"config: {name} must lie in {rule}; got {value}")
        for name, value, known in (
            ("divergence", self.divergence, tuple(TABLE)),
            ("tail", self.tail, TAILS),
            ("loss_type", self.loss_type, LOSS_TYPES),
            ("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, IS_MODES),
            ("backend", self.backend, BACKENDS),
            ("feedback", self.feedback, SOURCES),
            ("feedback_on_failure", self.feedback_on_failure, ("skip", *SOURCES)),
        ):
            if value not in known:
                raise InputError(f"config: {name} must be one of {', '.join(known)}; got {value!r}")
        if TABLE[self.divergence].needs_alpha and not 0 < self.divergence_alpha < 1:
            raise InputError(
                f"config: divergence_alpha must lie in (0, 1) for divergence {self.divergence!r}; "
                f"got {self.divergence_alpha}"
            )
        self._check_texts()

    def _check_texts(self) -> None:
        """The rules of the texts, and of what goes with what."""
        if not self.output_dir.strip():
            raise InputError("config: output_dir must name a folder; got ''")
        check_feedback(self)
        self._check_policy()
        if not self.use_vllm and (self.vllm_server_base_url or self.vllm_mode == "server"):
            raise InputError(
                "config: vllm_mode and vllm_server_base_url want use_vllm=true; set it, or drop "
                "them"
            )
        length = self.max_prompt_length + self.max_completion_length
        if self.use_vllm and 0 < self.vllm_max_model_length < length and not self.tools:
            raise InputError(
                f"config: vllm_max_model_length must be at least max_prompt_length + "
                f"max_completion_length = {length}; got {self.vllm_max_model_length}"
            )
        if self.use_vllm and (self.vllm_mode == "server") != bool(self.vllm_server_base_url):
            raise InputError(
                "config: vllm_server_base_url names the server of vllm_mode 'server', and of no "
                f"other; got {self.vllm_server_base_url!r} with vllm_mode {self.vllm_mode!r}"
            )
        if self.ray_address and self.vllm_mode == "server":
            raise InputError(
                "config: ray_address has its actors run vLLM themselves; drop vllm_mode 'server', "
                "or ray_address"
            )
        if self.tools and self.task != "lean":
            raise InputError(f"config: tools wants task 'lean'; got task {self.task!r}")
        if self.tool_libraries and not self.tools:
            raise InputError(
                "config: tool_libraries is searched by a tool; set tools=true, or drop it"
            )
        if "{prompt}" not in self.prompt_template + self.completion_prefix:
            raise InputError(
                "config: prompt_template or completion_prefix must contain {prompt}; "
                f"got {self.prompt_template!r}"
            )

    def _check_policy(self) -> None:
        """The rules of what is rewarded, in every stage."""
        for config in stage_configs(self) if self.stages else [self]:
            if config.max_steps < 1:
                raise InputError(f"config: max_steps must be at least 1; got {config.max_steps}")
        weight = self.distillation_weight
        if weight < 1 and self.task != "lean":
            raise InputError(
                "config: distillation_weight below 1 wants task 'lean', whose verdicts are the "
                f"rewards; got task {self.task!r}"
            )
        if 0 < weight < 1 and self.loss_temperature != self.temperature:
            raise InputError(
                "config: a mix of both losses has one temperature; got loss_temperature "
                f"{self.loss_temperature} and temperature {self.temperature}"
            )
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise InputError(
                "config: loss_type 'cispo' wants epsilon_high, the cap of the ratio (5.0, say)"
            )


_AT_LEAST_ONE = (
    "prompts_per_step",
    "num_generations",
    "num_generations_eval",
    "max_prompt_length",
    "max_feedback_length",
    "feedback_max_completion_length",
    "feedback_max_concurrency",
    "max_completion_length",
    "generation_batch_size",
    "max_tool_calling_iterations",
    "max_tool_tokens",
    "vllm_tensor_parallel_size",
    "ray_num_actors",
    "lean_workers",
    "teacher_ema_every",
    "lora_r",
    "max_steps",
    "max_pass_tokens",
    "alarm_window",
)
_NOT_NEGATIVE = (
    "feedback_max_retries",
    "feedback_budget_tokens",
    "feedback_budget_usd",
    "top_k",
    "vllm_max_model_length",
    "ray_gpus_per_actor",
    "ray_cpus_per_actor",
    "teacher_top_k",
    "entropy_coef",
    "epsilon",
    "beta",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "eval_num_prompts",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "max_skipped_steps",
    "entropy_alarm_ratio",
    "kl_alarm_ratio",
    "zero_reward_alarm_steps",
)
_POSITIVE = (
    "feedback_timeout_s",
    "temperature",
    "loss_temperature",
    "top_p",
    "learning_rate",
    "workspace_mb",
    "vllm_importance_sampling_clip_max",
    "lean_timeout_s",
    "adam_epsilon",
    "lora_alpha",
)
