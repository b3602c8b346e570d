"""One training step of one contender in a process of its own:
`python -m benchmarks.trainer_worker CASE CONTENDER TURN QUICK` prints a line of JSON.

A step like it comes first, so that the optimizer has its state. TRL's trainer runs as it is; what
it would sample is given to it. Ours runs the functions of its own loop.
"""

import contextlib
import ctypes
import functools
import gc
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import MIB, status_bytes
from benchmarks.trainer_cases import (
    FEEDBACK,
    FEEDBACK_TEMPLATE,
    OURS,
    REPROMPT_TEMPLATE,
    SEQUENCES,
    Batch,
    Case,
    all_cases,
    make_batch,
)

STEPS = 2  # the last is measured
EMA_SHARE = 0.95  # what the teacher keeps at every step: TRL's default
PASS_TOKENS = 1024  # of ours: what shares no prefix is a pass of its own beyond that
COMMON = {"learning_rate": 1e-5, "max_grad_norm": 1.0, "weight_decay": 0.0, "max_steps": STEPS}


def main(case_name: str, contender: str, turn: int, *, quick: bool) -> dict[str, float]:
    """Load, take a step, measure the next."""
    from fdfast.models import fetch_demo_model

    case = next(c for c in all_cases(quick=quick) if c.name == case_name)
    return measured_step(case, contender, fetch_demo_model(), turn)


def measured_step(case: Case, contender: str, folder: Path, turn: int) -> dict[str, float]:
    """What one step of the model in `folder` takes.

    Returns:
        wall_s and cpu_s; the phases' seconds; peak_mib beyond what the process held just before the
        step (models and the optimizer's state), rss_mib with it; loss and grad_norm of both steps.
    """
    from fdfast.models import load_model

    who, precision = contender.split(", ")
    probe = Probe()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with probe.patched(), tempfile.TemporaryDirectory() as output:
            if who == OURS:
                _ours(case, folder, turn, probe, Path(output), precision)
            else:
                model, tokenizer = load_model(folder)
                batch = make_batch(case, tokenizer, turn)
                _trl(case, model, tokenizer, batch, probe, output)
    finally:
        torch.set_float32_matmul_precision(before)
    return probe.found | {"threads": torch.get_num_threads()}


class Probe:
    """Times the phases of a step and reads the process's memory around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.found: dict[str, float] = {}

    def begin(self) -> None:
        """Just before the step; gradients of the one before are gone."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.held_bytes = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.seconds.clear()
        self.cpu, self.start = time.process_time(), time.perf_counter()

    def end(self) -> None:
        """Just after it."""
        stop = time.perf_counter()
        cpu_s, peak_bytes = time.process_time() - self.cpu, status_bytes("VmHWM")
        phases = {f"{name}_s": seconds for name, seconds in self.seconds.items()}
        phases["optimizer_s"] = stop - self.backward_end  # clipping and the teacher's average, too
        wall_s = stop - self.start
        self.found = phases | {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "other_s": wall_s - sum(phases.values()),
            "peak_mib": (peak_bytes - self.held_bytes) / MIB,
            "rss_mib": peak_bytes / MIB,
        }
        for step, (loss, norm) in enumerate(zip(self.losses, self.norms, strict=True), start=1):
            self.found |= {f"loss_{step}": loss, f"grad_norm_{step}": norm}

    def watch(self, model: Any, name: str) -> None:
        """Time the passes of a model without its head."""
        base = model.get_decoder()
        base.register_forward_pre_hook(lambda *_: self._open(name))
        base.register_forward_hook(lambda *_: self._close(name))

    def _open(self, name: str) -> None:
        self.seconds[name] -= time.perf_counter()

    def _close(self, name: str) -> None:
        self.seconds[name] += time.perf_counter()

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Backward passes are timed, norms of gradients noted where somebody clips by them."""
        backward, clip = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_

        def timed_backward(*args: Any, **kwargs: Any) -> None:
            self._open("backward")
            backward(*args, **kwargs)
            self._close("backward")
            self.backward_end = time.perf_counter()

        def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
            norm = clip(*args, **kwargs)
            self.norms.append(float(norm))
            return norm

        torch.Tensor.backward, torch.nn.utils.clip_grad_norm_ = timed_backward, noted  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.Tensor.backward, torch.nn.utils.clip_grad_norm_ = backward, clip  # type: ignore[assignment]

    def inside(self, function: Any) -> Any:
        """The function of head and loss; the models' own passes in it do not count."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            passes = self.seconds["student"] + self.seconds["teacher"]
            start = time.perf_counter()
            result = function(*args, **kwargs)
            passes = self.seconds["student"] + self.seconds["teacher"] - passes
            self.seconds["loss"] += time.perf_counter() - start - passes
            return result

        return timed


def _ours(case: Case, folder: Path, turn: int, probe: Probe, output: Path, precision: Any) -> None:
    """The loop's own functions, in its order."""
    from unittest import mock

    from fdfast.trainer import scoring, setup
    from fdfast.trainer.config_file import make_config
    from fdfast.trainer.ranks import Ranks
    from fdfast.trainer.stages import place
    from fdfast.trainer.update import gradients, update

    config = make_config(
        {
            "model.model_name_or_path": str(folder),
            "output_dir": str(output),
            "model.float32_matmul_precision": precision,
            "model.max_pass_tokens": PASS_TOKENS,
            "loss.distillation_weight": float(case.distills),
            "loss.teacher_top_k": 0,
            "teacher.alpha": EMA_SHARE,
            "teacher.every": 1,
            "optim.warmup_steps": 1,
            **COMMON,
        }
    )
    ranks = Ranks()
    state = setup.initial_state(config, None, ranks)
    attempts = _attempts(make_batch(case, state.tokenizer, turn), case)
    probe.watch(state.model, "student")
    probe.watch(state.teacher.model, "teacher")
    at = place(config, 0)
    scorer = setup.make_scorer(state, at, ranks)
    with mock.patch.object(scoring._Part, "__call__", probe.inside(scoring._Part.__call__)):
        for step in range(STEPS):
            if step == STEPS - 1:
                state.optimizer.zero_grad(set_to_none=True)  # as TRL does at the end of a step
                probe.begin()
            metrics = gradients(state, scorer, attempts)
            probe.norms.append(update(state, at, metrics["loss"])["grad_norm"])
            probe.losses.append(metrics["loss"])
    probe.end()


def _attempts(batch: Batch, case: Case) -> list[Any]:
    """The sequences as the rollout would hand them over."""
    from fdfast.data.problems import Problem
    from fdfast.losses import group_advantages
    from fdfast.rollout import Trajectory
    from fdfast.trainer.batch import Attempt

    advantages = group_advantages(torch.tensor(batch.rewards), case.num_generations)
    if case.num_generations == 1:
        advantages = torch.zeros(SEQUENCES)
    return [
        Attempt(
            Problem(f"p{number // case.num_generations}", batch.prompts[number]),
            Trajectory(
                batch.completion_ids[number],
                [0.0] * case.completion_length,
                [True] * case.completion_length,
                "",
                "length",
                prompt_ids=batch.prompt_ids[number],
            ),
            batch.teacher_prompt_ids[number],
            advantage=advantage,
        )
        for number, advantage in enumerate(advantages.tolist())
    ]


def _trl(case: Case, model: Any, tokenizer: Any, batch: Batch, probe: Probe, output: str) -> None:
    """TRL's trainer from beginning to end, with the completions it would sample in its hands."""
    from transformers import TrainerCallback

    trainer = (_sdpo if case.distills else _grpo)(case, model, tokenizer, batch, output)
    probe.watch(model, "student")
    if case.distills:
        probe.watch(trainer.teacher_model, "teacher")
    timed = probe.inside(trainer.compute_loss)

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = timed(*args, **kwargs)
        probe.losses.append(float(loss))
        return loss

    trainer.compute_loss = compute_loss

    class Around(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS - 1:
                probe.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS:
                probe.end()

    trainer.add_callback(Around())  # the last one: the teacher has followed before it
    trainer.train()


def _settings(case: Case, output: str) -> dict[str, Any]:
    """Of both of TRL's trainers. Their defaults, bfloat16 and checkpointing, are switched off."""
    return {
        "output_dir": output,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": SEQUENCES,
        "num_generations": case.num_generations,
        "max_completion_length": case.completion_length,
        "lr_scheduler_type": "constant",
        "shuffle_dataset": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **COMMON,
    }


def _dataset(case: Case, batch: Batch) -> Any:
    from datasets import Dataset

    prompts = [batch.prompts[n] for n in range(0, SEQUENCES, case.num_generations)]
    return Dataset.from_dict({"prompt": prompts, "privileged_context": [FEEDBACK] * len(prompts)})


def _sdpo(case: Case, model: Any, tokenizer: Any, batch: Batch, output: str) -> Any:
    """SDPO as Feedback Distillation: full_logits with alpha 0 is KL(teacher || student)."""
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    settings = SDPOConfig(
        **_settings(case, output),
        max_prompt_length=case.prompt_length,
        distillation_weight=1.0,
        distillation_mode="full_logits",
        distillation_alpha=0.0,
        teacher_model_kind="ema",
        teacher_update_rate=1 - EMA_SHARE,
        teacher_sync_steps=1,
        use_successful_as_teacher=False,
        include_environment_feedback=True,
        reprompt_template=REPROMPT_TEMPLATE,
        feedback_template=FEEDBACK_TEMPLATE,
        scale_rewards="none",
    )
    trainer = SDPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=_dataset(case, batch),
        processing_class=tokenizer,
    )

    def generate(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        assert prompt_ids == batch.prompt_ids
        return prompt_ids, list(batch.completion_ids)

    trainer._generate = generate
    return trainer


def _grpo(case: Case, model: Any, tokenizer: Any, batch: Batch, output: str) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        **_settings(case, output),
        beta=0.0,
        loss_type="dapo",
        num_iterations=1,
        scale_rewards="group",
        use_liger_kernel=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: list(batch.rewards),
        args=settings,
        train_dataset=_dataset(case, batch),
        processing_class=tokenizer,
    )

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        assert prompt_ids == batch.prompt_ids
        return list(batch.completion_ids), None

    trainer._generate_single_turn = generate
    return trainer


if __name__ == "__main__":
    _, case_name, contender, turn, quick = sys.argv
    print(json.dumps(main(case_name, contender, int(turn), quick=quick == "1")))
