"""`fdfast train --dry-run`: the modelled memory and time of a run's stages, as a table."""

import math
from collections.abc import Sequence
from typing import Any

from fdfast.errors import InputError
from fdfast.kernels.cost import BANDWIDTH_TB, TFLOPS
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.estimate import (
    ASSUMED,
    BYTES,
    COPY,
    GIB,
    MEMORY_GIB,
    STATES,
    Estimate,
    ModelShape,
    Workload,
    estimate,
)
from fdfast.trainer.stages import distills, samples_ahead, stage_configs


def workloads(
    config: TrainConfig, *, prompt_tokens: int | None = None, completion_tokens: int | None = None
) -> list[tuple[str, Workload]]:
    """The step of each stage of a run, with its name.

    Args:
        config: of the run.
        prompt_tokens: of a prompt on average; None: its limit.
        completion_tokens: of an attempt; likewise.

    Raises:
        InputError: fewer tokens than one.
    """
    for name, value in (("prompt", prompt_tokens), ("completion", completion_tokens)):
        if value is not None and value < 1:
            raise InputError(f"--{name}-tokens must be at least 1; got {value}")
    found = []
    for number, stage in enumerate(stage_configs(config), 1):
        weight = stage.loss.distillation_weight
        kind = {1.0: "Feedback Distillation", 0.0: "GRPO"}.get(weight, "a mix of both losses")
        work = Workload(
            prompts_per_step=stage.rollout.prompts_per_step,
            num_generations=stage.rollout.num_generations,
            prompt_tokens=prompt_tokens or stage.prompt.max_prompt_length,
            completion_tokens=completion_tokens or stage.rollout.max_completion_length,
            feedback_tokens=stage.feedback.max_feedback_length,
            max_pass_tokens=stage.model.pass_tokens("cuda"),
            generation_batch_size=stage.rollout.generation_batch_size,
            dtype=stage.model.dtype,
            distillation_weight=weight,
            beta=stage.loss.beta,
            teacher_top_k=stage.loss.teacher_top_k,
            **_teacher(stage, distills(config)),
            samples_ahead=samples_ahead(config),
            gradient_checkpointing=stage.model.gradient_checkpointing,
            activation_offloading=stage.model.activation_offloading,
            workspace_mb=stage.loss.workspace_mb,
            use_vllm=stage.rollout.use_vllm,
            vllm_mode=stage.vllm.mode,
            vllm_gpu_memory_utilization=stage.vllm.gpu_memory_utilization,
            vllm_tensor_parallel_size=stage.vllm.tensor_parallel_size,
            vllm_enable_sleep_mode=stage.vllm.enable_sleep_mode,
            lean=stage.data.task == "lean",
            lean_workers=stage.lean.workers,
            feedback=stage.feedback.source,
            feedback_max_completion_length=stage.feedback.max_tokens,
            feedback_max_concurrency=stage.feedback.max_concurrency,
        )
        found.append((f"stage {number}, {kind}", work))
    return found


def _teacher(stage: TrainConfig, asked: bool) -> dict[str, Any]:
    """What EMATeacher keeps, where a stage of the run asks it."""
    teacher = stage.teacher
    moves = teacher.kind == "ema" and teacher.alpha < 1
    return {
        "teacher_weights": asked and teacher.kind != "live",
        "teacher_dtype": teacher.scoring_dtype if asked else "",
        "teacher_copies": asked and moves and teacher.master_device != "cpu",
    }


def not_modelled(config: TrainConfig) -> list[str]:
    """What of the settings the numbers leave out, a line each."""
    found = []
    if config.lora.use_peft:
        found.append("lora.use_peft: the numbers are of all weights trained; adapters take less")
    feedback = config.feedback
    if "self" in (feedback.source, feedback.on_failure) and feedback.self_model == "initial":
        found.append("feedback.self_model: the initial model, which a moving teacher is not")
    if config.ray.address:
        found.append("ray.address: the numbers are of a learner that samples and checks itself")
    if config.rollout.max_staleness:
        found.append(
            "rollout.max_staleness: stages go on at once, and the sum of their times is the most"
        )
    return [f"NOT modelled: {line}" for line in found]


def advice(shape: ModelShape, work: Workload, found: Estimate, *, gpu: str, gpus: int) -> str:
    """Whether it fits, and if not what to lower, one line.

    Args:
        shape: of the model.
        work: of the step.
        found: of both.
        gpu: a name in MEMORY_GIB.
        gpus: how many.
    """
    room = MEMORY_GIB[gpu] * GIB * ASSUMED["usable"]
    peak, memory = found.peak_bytes, found.memory_bytes
    if peak <= room:
        return f"fits: {peak / GIB:.1f} of {room / GIB:.1f} GiB usable"
    over = f"does NOT fit: {peak / GIB:.1f} of {room / GIB:.1f} GiB usable"
    sharded = sum(memory.get(name, 0.0) for name in (*STATES, "gradients"))
    copied = BYTES[work.dtype] * shape.num_parameters * (not work.use_vllm)  # of several GPUs
    if sharded + memory.get(COPY, 0.0) + memory["head and its workspace"] >= room:
        left = 0.8 * room - copied  # a fifth for the rest of what is not sharded
        if left <= 0:
            return f"{over}; the copy that samples is too much for one GPU: set use_vllm=true"
        need = math.ceil(sharded * gpus / left)
        return f"{over}; weights and optimizer alone are too much: take {max(need, gpus + 1)} GPUs"
    if found.rollout_bytes > room:
        name = "vllm_gpu_memory_utilization" if work.use_vllm else "generation_batch_size"
        return f"{over} in the rollout; lower {name}"
    asleep = 0.0 if work.vllm_enable_sleep_mode else memory.get("vLLM's share", 0.0)
    first = "set vllm_enable_sleep_mode=true" if asleep else ""
    if asleep and peak - asleep <= room:
        return f"{over}; {first}, or lower vllm_gpu_memory_utilization"
    kept = memory["activations"] + memory.get("teacher evidence", 0.0)
    share = max(0.0, room - (peak - asleep - kept)) / kept
    tokens = max(int(work.max_pass_tokens * share) // 256 * 256, 256)
    lower = f"lower max_pass_tokens to {tokens}"
    if not work.gradient_checkpointing:
        lower += ", or set gradient_checkpointing=true"
    return f"{over}; {f'{first} and ' if first else ''}{lower}"


def table(shape: ModelShape, stages: Sequence[tuple[str, Workload]], *, gpu: str, gpus: int) -> str:
    """What `--dry-run` prints: memory and time of each stage of the run.

    Args:
        shape: of the model.
        stages: name and step of each.
        gpu: a name in MEMORY_GIB.
        gpus: how many.
    """
    every = [(name, work, estimate(shape, work, gpu=gpu, gpus=gpus)) for name, work in stages]
    lines = [
        f"{shape.name}: {shape.num_parameters / 1e6:,.1f} M parameters, {shape.num_layers} layers, "
        f"V = {shape.vocabulary}; {gpus} x {gpu} ({MEMORY_GIB[gpu]:g} GiB, "
        f"{TFLOPS[gpu]:g} TFLOP/s, {BANDWIDTH_TB[gpu]:g} TB/s)"
    ]
    for name, work, found in every:
        lines += [
            "",
            f"{name}: {work.prompts_per_step} x {work.num_generations} attempts of "
            f"{work.prompt_tokens} + {work.completion_tokens} tokens, {work.dtype}",
            f"  {'memory of each GPU':<32}{'GiB':>10}",
        ]
        for part, size in found.memory_bytes.items():
            lines.append(f"  {part:<32}{size / GIB:>10.2f}  modelled")
        for part, size in (("rollout", found.rollout_bytes), ("update", found.update_bytes)):
            lines.append(f"  {f'peak of the {part}':<32}{size / GIB:>10.2f}  modelled")
        lines += [
            *(f"  {part}" for part in advice(shape, work, found, gpu=gpu, gpus=gpus).split("; ")),
            f"  {'time of a step':<32}{'s':>10}",
        ]
        for part, spent in found.seconds.items():
            lines.append(f"  {part:<32}{spent:>10.2f}  modelled")
        total = sum(found.seconds.values())
        lines.append(f"  {'in all, one after the other':<32}{total:>10.2f}  modelled")
    return "\n".join([*lines, "", _assumptions()])


def _assumptions() -> str:
    return (
        f"assumed: passes hold {ASSUMED['mfu']:.0%} of the peak, decoding and the optimizer "
        f"{ASSUMED['bandwidth']:.0%} of the bandwidth; {ASSUMED['usable']:.0%} of the memory is "
        f"usable;\n{ASSUMED['lean_check_s']:g} s a check of Lean, {ASSUMED['llm_answer_s']:g} s an "
        "answer of an endpoint; every attempt has the tokens above; states are sharded over "
        "GPUs.\nNot counted: communication, what activation_offloading copies, waiting for tools, "
        "the tail of rollouts."
    )
