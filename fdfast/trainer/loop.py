"""Feedback Distillation, top to bottom: rollout, verify, feedback, teacher and student, update.

Source: Feedback Distillation (2026), arXiv 2605.30861.
"""

import contextlib
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fdfast.data.problems import Problem
from fdfast.errors import InputError, MachineError
from fdfast.feedback import FeedbackProvider
from fdfast.fused_layers import fuse_layers
from fdfast.losses import FeedbackDistillationLoss, GRPOLoss
from fdfast.models import HeadWeights, lm_head
from fdfast.teacher import EMATeacher
from fdfast.trainer.batch import Attempt, Prompts
from fdfast.trainer.checkpoint import (
    TrainState,
    check_settings,
    restore,
    save_checkpoint,
    save_final_model,
)
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.engines import make_engine
from fdfast.trainer.feedback import check_key, make_provider
from fdfast.trainer.guards import Alarm, alarms, num_skipped, rate_factor
from fdfast.trainer.master import MasterWeights
from fdfast.trainer.metrics import Clock, MetricsLog, read_jsonl, records, step_line, summary
from fdfast.trainer.provenance import write_provenance
from fdfast.trainer.ranks import Ranks, ranks_of_torchrun
from fdfast.trainer.rollouts import (
    Rollouts,
    check_for_ranks,
    check_problems,
    lean_pool,
    read_split,
    schemas,
    step_seed,
    told,
)
from fdfast.trainer.run_folder import (
    find_start,
    open_folder,
    run_lock,
    take_up_spent,
    write_spent,
)
from fdfast.trainer.scoring import Scorer
from fdfast.trainer.screen import Screen
from fdfast.trainer.sharding import WholeCopy, shard, whole
from fdfast.trainer.stages import Place, distills, place, total_steps
from fdfast.trainer.student import Adapters, keep_reference, load_reference, load_student
from fdfast.trainer.vocabulary_parallel import heads_of


def train(
    config: TrainConfig, *, resume: bool = False, quiet: bool = False
) -> list[dict[str, Any]]:
    """Train, and return the metrics of every step, as metrics.jsonl has them.

    Under torchrun the ranks share each step and the weights; the main one prints and writes.
    Whatever ends it early, Ctrl-C (KeyboardInterrupt) or an error, leaves a checkpoint.

    Args:
        config: every setting.
        resume: go on from the newest checkpoint of config.output_dir.
        quiet: print nothing.

    Raises:
        InputError: a setting, data set or model is off; output_dir holds a run and resume is False.
        MachineError: the machine lacks something: Lean, disk, a package.
    """
    with ranks_of_torchrun() as ranks:
        return _train_on(ranks, config, resume=resume, quiet=quiet or not ranks.main)


def _train_on(
    ranks: Ranks, config: TrainConfig, *, resume: bool, quiet: bool
) -> list[dict[str, Any]]:
    folder = Path(config.output_dir)
    with ranks.together():
        found = find_start(folder, resume=resume)
        newest = found.checkpoint
        if newest is not None:
            check_settings(config, newest)
        check_key(config)
        check_for_ranks(config, ranks)
        problems = read_split(config, config.data.dataset_split)
        evaluation = config.evaluation
        held_out = read_split(config, evaluation.eval_split) if evaluation.eval_num_prompts else []
    with (
        Screen(folder.name, total=total_steps(config), quiet=quiet) as screen,
        _matmul_precision(config.model.float32_matmul_precision),
        lean_pool(config) as lean,
        contextlib.ExitStack() as closing,
    ):
        for line in found.lines():
            screen.say(f"{folder}: {line}")
        screen.say(f"{folder}: loading {newest or config.model.model_name_or_path}")
        state = _initial_state(config, newest, ranks)
        sampled = state.whole_model()
        with ranks.together():
            prompts = Prompts(state.tokenizer, config, schemas(config))
            check_problems([*problems, *held_out], prompts, lean)
            if ranks.main:
                closing.enter_context(run_lock(folder))
                open_folder(folder, found)
                write_provenance(config, folder, step=state.step)
            provider = _provider(config, state)
            if provider is not None and provider.counters is not None:
                take_up_spent(folder, provider.counters, state.feedback)
                state.feedback = provider.counters
            engine = closing.enter_context(
                contextlib.closing(make_engine(config, sampled, state.tokenizer, lean, screen.say))
            )
            log = MetricsLog(folder, step=state.step, writes=ranks.main)
        run = _Run(
            config=config,
            state=state,
            problems=problems,
            held_out=held_out[: evaluation.eval_num_prompts],
            rollouts=Rollouts(config, engine, lean, prompts, provider, ranks=ranks),
            log=log,
            screen=screen,
            ranks=ranks,
        )
        _train_and_save(run)
        ranks.meet()  # all lines are there
    return read_jsonl(run.log.metrics)


def _train_and_save(run: "_Run") -> None:
    """The loop, and whatever ends it, Ctrl-C or an error: finished steps are saved."""
    state, folder, begun_at = run.state, Path(run.config.output_dir), run.state.step
    complete = False
    try:
        _train(run)
        if run.config.checkpoint.save_final_model:
            save_final_model(state, folder, run.ranks)
        complete = True
    finally:
        saves = not complete and not state.changing and state.step > begun_at
        if saves and run.ranks.agreed:
            run.screen.say(f"stopped: saving step {state.step}")
            with run.ranks.held():
                path = save_checkpoint(state, run.config, folder, run.ranks)
            run.screen.say(f"saved {path}; --resume goes on from there")


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the loop works with; `state` alone changes."""

    config: TrainConfig
    state: TrainState
    problems: list[Problem]
    held_out: list[Problem]
    rollouts: Rollouts
    log: MetricsLog
    screen: Screen
    ranks: Ranks


def _train(run: _Run) -> None:
    """The loop."""
    config, state = run.config, run.state
    scorer = _scorer(run, at := place(config, state.step))
    while True:
        if _evaluation_due(run):
            _evaluate(run, scorer)
        if state.step >= total_steps(config):
            return
        if (now := place(config, state.step)).index != at.index:
            scorer = _scorer(run, now)
        at = now
        clock = Clock()
        chosen = _choose(run.problems, at)
        seed = step_seed(config, state.step)
        count, feedback = at.config.rollout.num_generations, at.config.loss.distillation_weight > 0
        attempts, counts = run.rollouts.attempts(
            chosen, count, seed, state, clock, feedback=feedback
        )
        if counts and run.ranks.main:
            write_spent(Path(config.output_dir), state.feedback)
        with clock("update"):
            metrics: dict[str, Any] = _gradients(run, scorer, attempts) | counts
        shared = _of_all_ranks(run, attempts)
        with run.ranks.held():  # from here to the lines on disk all happens or nothing does
            state.num_tokens += int(metrics["num_tokens"])  # cumulative, as TRL counts
            metrics |= _update(run, at, metrics["loss"]) | {"num_tokens": state.num_tokens}
            metrics = run.ranks.from_main(
                None
                if shared is None
                else metrics | summary(shared, count) | clock.metrics() | {"stage": at.index}
            )
            heard = alarms(run.log.history, metrics, config)
            metrics["alarms"] = [alarm.name for alarm in heard]
            run.log.write({"step": state.step} | metrics, _lines(run, shared or [], seed))
        run.screen.say(step_line(state.step, metrics, total_steps(config)))
        for alarm in heard:
            run.screen.say(f"step {state.step}: {alarm.text}")
        run.screen.at(state.step)
        _stop_if_asked(run, heard)
        if config.checkpoint.save_steps and state.step % config.checkpoint.save_steps == 0:
            save_checkpoint(state, config, Path(config.output_dir), run.ranks)


def _of_all_ranks(run: _Run, attempts: list[Attempt]) -> list[Attempt] | None:
    """The step's attempts in the order of its problems, on the main rank."""
    shares = run.ranks.to_main(attempts)
    return None if shares is None else [attempt for share in shares for attempt in share]


def _stop_if_asked(run: _Run, heard: Sequence[Alarm]) -> None:
    """After too many skipped steps, or an alarm that the settings stop for.

    Raises:
        MachineError: stop.
    """
    config, step = run.config, run.state.step
    skipped = num_skipped(run.log.history)
    with run.ranks.together():
        if skipped > config.guards.max_skipped_steps:
            raise MachineError(
                f"step {step}: the loss or the gradient was not finite in {skipped} steps in a "
                "row; lower learning_rate, or look at what they were trained on: fdfast show "
                f"{config.output_dir}/attempts.jsonl --step {step}"
            )
        if config.guards.entropy_alarm_action == "stop":
            for alarm in heard:
                if alarm.name == "entropy":
                    raise MachineError(f"step {step}: {alarm.text}")


def _evaluation_due(run: _Run) -> bool:
    config, step = run.config, run.state.step
    asked = step in (0, total_steps(config)) or (
        config.evaluation.eval_steps and step % config.evaluation.eval_steps == 0
    )
    return bool(run.held_out and asked) and step not in run.log.evaluated


def _evaluate(run: _Run, scorer: Scorer) -> None:
    """The same without an update, on held-out problems, with the same seed every time."""
    num_generations, seed = run.config.evaluation.num_generations_eval, step_seed(run.config, -1)
    attempts, counts = run.rollouts.attempts(
        run.held_out,
        num_generations,
        seed,
        run.state,
        Clock(),
        feedback=scorer.config.loss.distillation_weight > 0,
    )
    with torch.no_grad():
        metrics = scorer.score(told(attempts), backward=False) | counts
    shared = _of_all_ranks(run, attempts)
    metrics = run.ranks.from_main(
        None if shared is None else metrics | summary(shared, num_generations)
    )
    step = run.state.step
    run.log.write_evaluation(step, metrics, _lines(run, shared or [], seed))
    run.screen.say("evaluation  " + step_line(step, metrics, total_steps(run.config)))


def _lines(run: _Run, attempts: list[Attempt], seed: int) -> list[dict[str, Any]]:
    """Of attempts.jsonl."""
    return records(
        attempts,
        run.state.tokenizer,
        model=run.config.model.model_name_or_path,
        seed=seed,
        step=run.state.step,
    )


def _initial_state(config: TrainConfig, checkpoint: Path | None, ranks: Ranks) -> TrainState:
    with ranks.together():
        if config.model.dtype == "float16":
            raise InputError("dtype=float16 can't be trained without loss scaling; take bfloat16")
        model, tokenizer = load_student(
            config.model.model_name_or_path,
            dtype=config.model.dtype,
            adapters=_adapters(config),
            saved=checkpoint,
        )
    fuse_layers(model)  # before the teacher and what samples are copied
    sampled = None
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
    state = TrainState(model, tokenizer, teacher, master, optimizer, sampled=sampled)
    if checkpoint is not None:
        restore(state, checkpoint)
    return state


def _provider(config: TrainConfig, state: TrainState) -> FeedbackProvider | None:
    """None where no stage asks for feedback: one of source self may hold a model."""
    if not distills(config):
        return None
    teacher = state.teacher
    return make_provider(config, teacher.model, state.tokenizer, is_initial=teacher.frozen)


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


def _scorer(run: _Run, at: Place) -> Scorer:
    """The loss of a stage, and what it looks at."""
    state, config = run.state, at.config
    wanted = config.loss.beta and config.loss.distillation_weight < 1
    reference = _reference(run, at) if wanted else None
    heads = heads_of(state.model)
    loss_fn = _loss(config, lm_head(state.model), heads.group)
    return Scorer(config, state.model, state.teacher.model, loss_fn, reference, run.ranks, heads)


def _reference(run: _Run, at: Place) -> Any:
    """The student as the stage found it; kept in the run's folder, for a resume."""
    path = Path(run.config.output_dir) / f"reference-{at.index}"
    student = run.state.whole_model() if at.step == 0 else None
    with run.ranks.together():
        if student is not None and run.ranks.main:
            keep_reference(student, run.state.tokenizer, path)
    with run.ranks.together():
        reference = load_reference(run.state.model, path, dtype=run.config.model.dtype)
    if (cut := _cut(run.config, run.ranks)) is not None:
        cut(reference)
    return reference


def _cut(config: TrainConfig, ranks: Ranks) -> Callable[[Any], None] | None:
    """What cuts a model over the ranks, where there are several."""
    if ranks.device is None:
        return None
    keeps = config.model.vocabulary_parallel
    return functools.partial(shard, device=ranks.device, keeps_head_cut=keeps)


def _loss(
    config: TrainConfig, head: HeadWeights, group: Any = None
) -> FeedbackDistillationLoss | GRPOLoss:
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


def _choose(problems: Sequence[Problem], at: Place) -> list[Problem]:
    """The step's problems: every epoch is a shuffle of its own, so the step number alone is the
    data cursor.
    """
    size, seed = at.config.rollout.prompts_per_step, at.config.seed
    first = at.position + at.step * size
    places = (divmod(position, len(problems)) for position in range(first, first + size))
    return [problems[_order(seed, epoch, len(problems))[index]] for epoch, index in places]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _gradients(run: _Run, scorer: Scorer, attempts: list[Attempt]) -> dict[str, float]:
    """The step's gradient, from zero, and what was seen on the way."""
    torch.manual_seed(step_seed(run.config, run.state.step))  # of dropout, where a model has it
    run.state.model.train()
    run.state.optimizer.zero_grad(set_to_none=True)
    return scorer.score(told(attempts), backward=True)


def _learning_rate(at: Place) -> float:
    """Of the step there; each stage has a schedule of its own."""
    optim, step = at.config.optim, at.step
    factor = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    if optim.lr_scheduler_type == "linear" and step >= optim.warmup_steps:
        factor = (optim.max_steps - step) / max(1, optim.max_steps - optim.warmup_steps)
    return optim.learning_rate * factor


def _update(run: _Run, at: Place, loss: float) -> dict[str, float]:
    """Clip, step the optimizer, let the teacher follow; where the loss or the gradient is not
    finite, nothing but the count of steps changes.
    """
    state, config = run.state, at.config
    if at.index and not at.step and at.optimizer_state == "reset":
        state.optimizer.state.clear()
    rate = _learning_rate(at) * rate_factor(run.log.history, config)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    limit = config.optim.max_grad_norm or float("inf")
    norm = whole(torch.nn.utils.clip_grad_norm_(state.master.take_gradients(), limit))
    skipped = not (torch.isfinite(norm) and math.isfinite(loss))
    state.changing = True
    if not skipped:
        state.optimizer.step()
        state.master.write_back()
    state.step += 1
    followed = not skipped and state.teacher.step(state.master.master, state.step)
    state.changing = False
    return {
        "grad_norm": float(norm),
        "learning_rate": rate,
        "teacher/updated": float(followed),
        "skipped": float(skipped),
    }
