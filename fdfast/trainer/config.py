"""Every setting of a training run: one tree of dataclasses."""

from dataclasses import dataclass, field

from fdfast.divergences import TABLE
from fdfast.errors import InputError
from fdfast.trainer.config_groups import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    FeedbackSettings,
    GuardSettings,
    LeanSettings,
    LoraSettings,
    LossSettings,
    ModelSettings,
    OptimSettings,
    PromptSettings,
    RaySettings,
    RolloutSettings,
    TeacherSettings,
    VLLMSettings,
)
from fdfast.trainer.feedback import check_feedback
from fdfast.trainer.settings import Settings
from fdfast.trainer.sinks import LoggingSettings
from fdfast.trainer.stages import Stage, stage_configs


@dataclass(frozen=True)
class TrainConfig(Settings):
    """A run; the defaults are the paper's for Feedback Distillation where it names one.

    Names are TRL's where TRL has one. Attributes:
        output_dir: metrics, checkpoints and the final model go there.
        seed: of everything random; a step's randomness follows from (seed, step) alone.
        model: the model, and how passes through it are computed.
        lora: adapters in place of all weights.
        data: what is attempted.
        prompt: what the model reads.
        feedback: what the teacher is told of an attempt.
        rollout: how attempts are sampled.
        vllm: for rollout.use_vllm.
        ray: a Ray cluster that samples and checks.
        lean: Lean's checks.
        loss: what is minimised.
        teacher: the copy of the model that reads the feedback.
        optim: the optimizer and its schedule.
        evaluation: what is measured on problems that are not trained on.
        guards: alarms.
        checkpoint: what is kept of a run.
        logging: where the curves go, beside metrics.jsonl.
        stages: stages of the run, in order, each with max_steps, optimizer_state (reset, or keep
            the one of the stage before) and those of these settings that differ in it:
            distillation_weight, learning_rate, lr_scheduler_type, warmup_steps, prompts_per_step,
            num_generations, beta, entropy_coef; () for one stage by the settings here.
    """

    output_dir: str = "runs/fd"
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataSettings = field(default_factory=DataSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    feedback: FeedbackSettings = field(default_factory=FeedbackSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    lean: LeanSettings = field(default_factory=LeanSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    guards: GuardSettings = field(default_factory=GuardSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        """The rules between groups; each group has checked its own."""
        super().__post_init__()
        if not self.output_dir.strip():
            raise InputError("config: output_dir must name a folder; got ''")
        check_feedback(self)
        for config in stage_configs(self) if self.stages else [self]:
            config._check_loss()
        self._check_vllm()
        self._check_prompt()

    def _check_loss(self) -> None:
        loss = self.loss
        if TABLE[loss.divergence].needs_alpha and not 0 < loss.divergence_alpha < 1:
            raise InputError(
                f"config: loss.divergence_alpha must lie in (0, 1) for divergence "
                f"{loss.divergence!r}; got {loss.divergence_alpha}"
            )
        weight, temperature = loss.distillation_weight, self.rollout.temperature
        if weight < 1 and self.data.task != "lean":
            raise InputError(
                "config: loss.distillation_weight below 1 wants data.task 'lean', whose verdicts "
                f"are the rewards; got task {self.data.task!r}"
            )
        if 0 < weight < 1 and loss.distillation_temperature != temperature:
            raise InputError(
                "config: a mix of both losses has one temperature; got "
                f"loss.distillation_temperature {loss.distillation_temperature} and "
                f"rollout.temperature {temperature}"
            )
        if self.model.vocabulary_parallel and loss.backend not in ("auto", "cpu"):
            raise InputError(
                "config: model.vocabulary_parallel wants loss.backend 'auto' or 'cpu'; got "
                f"{loss.backend!r}"
            )
        if self.model.vocabulary_parallel and loss.grad_filter is not None:
            raise InputError(
                "config: model.vocabulary_parallel wants loss.grad_filter=null; got "
                f"{loss.grad_filter}"
            )
        if loss.loss_type == "cispo" and loss.epsilon_high is None:
            raise InputError(
                "config: loss.loss_type 'cispo' wants loss.epsilon_high, the cap of the ratio "
                "(5.0, say)"
            )

    def _check_vllm(self) -> None:
        vllm, used, tools = self.vllm, self.rollout.use_vllm, self.rollout.tools
        if not used and (vllm.server_base_url or vllm.mode == "server"):
            raise InputError(
                "config: vllm.mode and vllm.server_base_url want rollout.use_vllm=true; set it, or "
                "drop them"
            )
        length = self.prompt.max_prompt_length + self.rollout.max_completion_length
        if used and 0 < vllm.max_model_length < length and not tools:
            raise InputError(
                "config: vllm.max_model_length must be at least max_prompt_length + "
                f"max_completion_length = {length}; got {vllm.max_model_length}"
            )
        if used and (vllm.mode == "server") != bool(vllm.server_base_url):
            raise InputError(
                "config: vllm.server_base_url names the server of vllm.mode 'server', and of no "
                f"other; got {vllm.server_base_url!r} with vllm.mode {vllm.mode!r}"
            )
        if self.ray.address and vllm.mode == "server":
            raise InputError(
                "config: ray.address has its actors run vLLM themselves; drop vllm.mode 'server', "
                "or ray.address"
            )

    def _check_prompt(self) -> None:
        tools, libraries = self.rollout.tools, self.rollout.tool_libraries
        if tools and self.data.task != "lean":
            raise InputError(
                f"config: rollout.tools wants data.task 'lean'; got task {self.data.task!r}"
            )
        if libraries and not tools:
            raise InputError(
                "config: rollout.tool_libraries is searched by a tool; set tools=true, or drop it"
            )
        if "{prompt}" not in self.prompt.prompt_template + self.prompt.completion_prefix:
            raise InputError(
                "config: prompt.prompt_template or prompt.completion_prefix must contain {prompt}; "
                f"got {self.prompt.prompt_template!r}"
            )
