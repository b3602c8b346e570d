"""Feedback Distillation, top to bottom: rollout, verify, feedback, teacher and student, update.

Source: Feedback Distillation (2026), arXiv 2605.30861.
"""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fdfast.cpu.gemm import fast_gemms, onednn_keeps_float32
from fdfast.data.problems import Problem
from fdfast.trainer.batch import Attempt, Prompts
from fdfast.trainer.checkpoint import (
    TrainState,
    check_settings,
    save_checkpoint,
    save_final_model,
)
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.engines import make_engine
from fdfast.trainer.feedback import check_key
from fdfast.trainer.guards import alarms, rate_factor, stop_if_asked
from fdfast.trainer.metrics import (
    Clock,
    MetricsLog,
    read_jsonl,
    records,
    stage_times,
    step_line,
    summary,
)
from fdfast.trainer.pipeline import Batch, Batches, OnDemand, Pipeline
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
from fdfast.trainer.settings import flat
from fdfast.trainer.setup import initial_state, make_scorer, provider_of
from fdfast.trainer.sinks import Sink, check_reports, make_sinks
from fdfast.trainer.stages import Place, place, samples_ahead, total_steps
from fdfast.trainer.update import gradients, keep_bad_step, update


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
        changes = [] if newest is None else check_settings(config, newest)
        check_key(config)
        check_for_ranks(config, ranks)
        check_reports(config.logging.report_to)
        problems = read_split(config, config.data.dataset_split)
        evaluation = config.evaluation
        held_out = read_split(config, evaluation.eval_split) if evaluation.eval_num_prompts else []
    with (
        Screen(folder.name, total=total_steps(config), quiet=quiet) as screen,
        _matmul_precision(config.model.float32_matmul_precision),
        lean_pool(config) as lean,
        contextlib.ExitStack() as closing,
    ):
        for line in [*found.lines(), *changes]:
            screen.say(f"{folder}: {line}")
        screen.say(f"{folder}: loading {newest or config.model.model_name_or_path}")
        state = initial_state(config, newest, ranks)
        sampled = state.model_to_sample()
        with ranks.together():
            prompts = Prompts(state.tokenizer, config, schemas(config))
            check_problems([*problems, *held_out], prompts, lean)
            if ranks.main:
                closing.enter_context(run_lock(folder))
                open_folder(folder, found)
                write_provenance(config, folder, step=state.step)
            provider = provider_of(config, state)
            if provider is not None and provider.counters is not None:
                take_up_spent(folder, provider.counters, state.feedback)
                state.feedback = provider.counters
            engine = closing.enter_context(
                contextlib.closing(make_engine(config, sampled, state.tokenizer, lean, screen.say))
            )
            sinks = _sinks(config, state.step, closing) if ranks.main else []
            log = MetricsLog(folder, step=state.step, writes=ranks.main, sinks=sinks)
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


def _sinks(config: TrainConfig, step: int, closing: contextlib.ExitStack) -> list[Sink]:
    logging, folder = vars(config.logging), Path(config.output_dir)
    sinks = make_sinks(**logging, folder=folder, step=step, settings=flat(config))
    for sink in sinks:
        closing.callback(sink.close)
    return sinks


def _train_and_save(run: "_Run") -> None:
    """The loop, and whatever ends it, Ctrl-C or an error: finished steps are saved."""
    state, folder, begun_at = run.state, Path(run.config.output_dir), run.state.step
    complete = False
    try:
        _train(run)
        if run.config.checkpoint.save_final_model:
            path = save_final_model(state, folder, run.ranks)
            run.screen.say(f"saved {path}")
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
    ahead = samples_ahead(config) and next(state.model.parameters()).device.type == "cpu"
    # Which library multiplies is the process's: while some sample, the learner may not switch it.
    with fast_gemms(ahead and onednn_keeps_float32()), _batches(run) as batches:
        _train_on_batches(run, batches)


def _train_on_batches(run: _Run, batches: Batches) -> None:
    config, state = run.config, run.state
    # Nobody else may hold a scorer: of a stage that has ended it is a reference model in memory.
    scorer = make_scorer(state, at := place(config, state.step), run.ranks)
    while True:
        if _evaluation_due(run):
            _evaluate(run, scorer)
        if state.step >= total_steps(config):
            return
        if (now := place(config, state.step)).index != at.index:
            scorer = make_scorer(state, now, run.ranks)
        at = now
        clock = Clock()
        batch = batches.take(state.step)
        if batch.counts and run.ranks.main:
            write_spent(Path(config.output_dir), state.feedback)
        with clock("update"):
            metrics: dict[str, Any] = gradients(state, scorer, batch.attempts) | batch.counts
        metrics["staleness"] = batch.step - batch.sampled_at
        shared, seed = _of_all_ranks(run, batch.attempts), step_seed(config, state.step)
        with run.ranks.held():  # from here to the lines on disk all happens or nothing does
            state.num_tokens += int(metrics["num_tokens"])  # cumulative, as TRL counts
            factor = rate_factor(run.log.history, at.config)
            with clock("update"):
                metrics |= update(state, at, metrics["loss"], rate_factor=factor)
            metrics["num_tokens"] = state.num_tokens
            metrics = run.ranks.from_main(
                None
                if shared is None
                else metrics
                | summary(shared, at.config.rollout.num_generations)
                | stage_times(batch.clock, scorer.clock, clock)
                | {"stage": at.index}
            )
            heard = alarms(run.log.history, metrics, config)
            metrics["alarms"] = [alarm.name for alarm in heard]
            lines = _lines(run, shared or [], seed)
            run.log.write({"step": state.step} | metrics, lines)
        batches.finished(state.step)
        run.screen.say(step_line(state.step, metrics, total_steps(config)))
        said = [alarm.text for alarm in heard]
        if metrics["skipped"]:
            said.insert(0, keep_bad_step(state, at, run.ranks, shared or [], lines, metrics))
        for text in said:
            run.screen.say(f"step {state.step}: {text}")
        run.screen.show(metrics, said)
        run.screen.at(state.step)
        with run.ranks.together():
            stop_if_asked(run.log.history, heard, config, state.step)
        if config.checkpoint.save_steps and state.step % config.checkpoint.save_steps == 0:
            save_checkpoint(state, config, Path(config.output_dir), run.ranks)


def _batches(run: _Run) -> Batches:
    """Makes the batches of the steps that are left."""

    def sample(step: int) -> Batch:
        at, clock = place(run.config, step), Clock()
        attempts, sampled_at = run.rollouts.sampled(
            _choose(run.problems, at),
            at.config.rollout.num_generations,
            step_seed(run.config, step),
            run.state,
            clock,
        )
        return Batch(step, attempts, sampled_at, clock=clock)

    def tell(batch: Batch) -> Batch:
        if place(run.config, batch.step).config.loss.distillation_weight > 0:
            batch.attempts, batch.counts = run.rollouts.with_feedback(
                batch.attempts, batch.clock, step=batch.step + 1
            )
        return batch

    staleness = run.config.rollout.max_staleness
    if not staleness:
        return OnDemand(sample, tell)
    steps = {"first": run.state.step, "last": total_steps(run.config)}
    return Pipeline(sample, tell, max_staleness=staleness, **steps)


def _of_all_ranks(run: _Run, attempts: list[Attempt]) -> list[Attempt] | None:
    """The step's attempts in the order of its problems, on the main rank."""
    shares = run.ranks.to_main(attempts)
    return None if shares is None else [attempt for share in shares for attempt in share]


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
    run.state.model.eval()  # a step's gradient left it with its dropout on
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
