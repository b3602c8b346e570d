"""`fdfast train --dry-run`: the modelled memory and time of a run's stages, as a table."""

import math
from collections.abc import Sequence

from fdfast.kernels.cost import BANDWIDTH_TB, TFLOPS
from fdfast.trainer.estimate import (
    ASSUMED,
    GIB,
    MEMORY_GIB,
    STATES,
    Estimate,
    ModelShape,
    Workload,
    estimate,
)


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
    if sharded + memory["head and its workspace"] >= room:
        # A fifth is left for what is not sharded.
        need = math.ceil(sharded * gpus / (0.8 * room))
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
    lines = [
        f"{shape.name}: {shape.num_parameters / 1e6:,.1f} M parameters, {shape.num_layers} layers, "
        f"V = {shape.vocabulary}; {gpus} x {gpu} ({MEMORY_GIB[gpu]:g} GiB, "
        f"{TFLOPS[gpu]:g} TFLOP/s, {BANDWIDTH_TB[gpu]:g} TB/s)"
    ]
    for name, work in stages:
        found = estimate(shape, work, gpu=gpu, gpus=gpus)
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
        "GPUs.\nNot counted: communication, waiting for tools, the tail of rollouts."
    )
