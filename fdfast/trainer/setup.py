"""What a run works with: student, teacher, optimizer, feedback, and each stage's loss."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fdfast.errors import InputError
from fdfast.feedback import FeedbackProvider
from fdfast.fused_layers import fuse_layers
from fdfast.losses import FeedbackDistillationLoss, GRPOLoss
from fdfast.models import HeadWeights, find_device, lm_head
from fdfast.offloading import check_device
from fdfast.teacher import EMATeacher
from fdfast.trainer.checkpoint import TrainState, restore
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.feedback import make_provider
from fdfast.trainer.master import MasterWeights
from fdfast.trainer.ranks import Ranks
from fdfast.trainer.scoring import Scorer
from fdfast.trainer.sharding import WholeCopy, shard
from fdfast.trainer.stages import Place, distills, samples_ahead
from fdfast.trainer.student import Adapters, keep_reference, load_reference, load_student
from fdfast.trainer.vocabulary_parallel import heads_of


def initial_state(config: TrainConfig, checkpoint: Path | None, ranks: Ranks) -> TrainState:
    """Student, teacher and optimizer, as a run begins or as its checkpoint has them.

    Raises:
        InputError: a model or setting is off, or the checkpoint is damaged.
    """
    with ranks.together():
        device = ranks.device or find_device(config.model.device)
        if config.model.dtype == "float16":
            raise InputError("dtype=float16 can't be trained without loss scaling; take bfloat16")
        if config.model.activation_offloading:
            check_device(device)
        model, tokenizer = load_student(
            config.model.model_name_or_path,
            dtype=config.model.dtype,
            adapters=_adapters(config),
            saved=checkpoint,
        )
    if ranks.device is None:
        model.to(device)
    fuse_layers(model)  # before the teacher and what samples are copied
    sampled = None
    if samples_ahead(config):
        sampled = WholeCopy(model, device, shares=True)
    if ranks.device is not None:
        # vLLM takes its weights from anywhere, and has a copy of its own on the GPU.
        place = torch.device("cpu") if config.rollout.use_vllm else ranks.device
        sampled = WholeCopy(model, place)
    cut = _cut(config, ranks)
    teacher = EMATeacher(
        model,
        # Nobody asks it in a run of GRPO alone: live is no copy.
        kind=config.teacher.kind if distills(config) else "live",
        alpha=config.teacher.alpha,
        every=config.teacher.every,
        scoring_dtype=config.teacher.scoring_dtype if distills(config) else "",
        master_device=config.teacher.master_device,
        prepare=cut,
    )
    if config.model.gradient_checkpointing:
        # transformers 5.2x renamed it and warns at the old name, which 5.17 alone has.
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if cut is not None:
        cut(model)
    master = MasterWeights(model)
    optimizer = torch.optim.AdamW(
        master.master.values(),
        lr=config.optim.learning_rate,
        betas=(config.optim.adam_beta1, config.optim.adam_beta2),
        eps=config.optim.adam_epsilon,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    state = TrainState(
        model, tokenizer, teacher, master, optimizer, sampled=sampled, sharded=cut is not None
    )
    if checkpoint is not None:
        restore(state, checkpoint)
    return state


def provider_of(config: TrainConfig, state: TrainState) -> FeedbackProvider | None:
    """None where no stage asks for feedback: one of source self may hold a model."""
    if not distills(config):
        return None
    teacher = state.teacher
    # A model is in one pass at a time: a pipeline has the teacher in the learner's.
    shared = teacher.frozen and not config.rollout.max_staleness
    return make_provider(config, teacher.model, state.tokenizer, is_initial=shared)


def _adapters(config: TrainConfig) -> Adapters | None:
    if not config.lora.use_peft:
        return None
    return Adapters(
        rank=config.lora.r,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        seed=config.seed,
    )


def make_scorer(state: TrainState, at: Place, ranks: Ranks) -> Scorer:
    """The loss of a stage, and what it looks at."""
    config = at.config
    wanted = config.loss.beta and config.loss.distillation_weight < 1
    reference = _reference(state, at, ranks) if wanted else None
    heads = heads_of(state.model)
    loss_fn = make_loss(config, lm_head(state.model), heads.group)
    return Scorer(config, state.model, state.teacher.model, loss_fn, reference, ranks, heads)


def _reference(state: TrainState, at: Place, ranks: Ranks) -> Any:
    """The student as the stage found it; kept in the run's folder, for a resume."""
    path = Path(at.config.output_dir) / f"reference-{at.index}"
    student = state.whole_model() if at.step == 0 else None
    with ranks.together():
        if student is not None and ranks.main:
            keep_reference(student, state.tokenizer, path)
    with ranks.together():
        reference = load_reference(state.model, path, dtype=at.config.model.dtype)
    if (cut := _cut(at.config, ranks)) is not None:
        cut(reference)
    return reference


def _cut(config: TrainConfig, ranks: Ranks) -> Callable[[Any], None] | None:
    """What cuts a model over the ranks, where there are several."""
    if ranks.device is None:
        return None
    keeps = config.model.vocabulary_parallel
    return functools.partial(shard, device=ranks.device, keeps_head_cut=keeps)


def make_loss(
    config: TrainConfig, head: HeadWeights, group: Any = None
) -> FeedbackDistillationLoss | GRPOLoss:
    """The loss that the settings name, for a model with this head; group: see `policy_head`."""
    loss, vllm = config.loss, config.vllm
    common: dict[str, Any] = {
        "divergence": loss.divergence,
        "alpha": loss.divergence_alpha,
        "tail": loss.tail,
        "logit_softcap": head.logit_softcap,
        "entropy_coef": loss.entropy_coef,
        "grad_filter": loss.grad_filter,
        "workspace_mb": loss.workspace_mb,
        "backend": loss.backend,
        "group": group,
    }
    if loss.distillation_weight == 1:
        return FeedbackDistillationLoss(temperature=loss.distillation_temperature, **common)
    return GRPOLoss(
        distillation_weight=loss.distillation_weight,
        loss_type=loss.loss_type,
        importance_sampling_level=loss.importance_sampling_level,
        epsilon=loss.epsilon,
        epsilon_high=loss.epsilon_high,
        beta=loss.beta,
        temperature=config.rollout.temperature,
        max_completion_length=config.rollout.max_completion_length,
        vllm_importance_sampling_mode=vllm.importance_sampling_mode,
        vllm_importance_sampling_clip_max=vllm.importance_sampling_clip_max,
        **common,
    )
