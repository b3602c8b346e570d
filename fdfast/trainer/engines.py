"""The rollout engine that a run's settings name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fdfast.lean import LeanPool
from fdfast.models import fetch_demo_model
from fdfast.rollout import Engine, HFEngine
from fdfast.rollout.ray_fleet import RayFleet
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.rollouts import sampling_options, tool_libraries


def make_engine(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    lean: LeanPool | None = None,
    say: Callable[[str], None] = print,
) -> Engine | RayFleet:
    """Samples from `model`, from vLLM's copy of it, or from the copies on a Ray cluster.

    Args:
        config: of the run.
        model: the student.
        tokenizer: its tokenizer.
        lean: the learner's, whose version a cluster's must be.
        say: prints a line, of what happens on a cluster.

    Raises:
        InputError: the settings of vLLM do not fit the model.
        MachineError: vLLM or Ray is missing, or there is no server or cluster.
    """
    if config.ray.address:
        return _make_fleet(config, model, tokenizer, lean, say)
    if not config.rollout.use_vllm:
        return HFEngine(model, tokenizer, batch_size=config.rollout.generation_batch_size)
    if config.vllm.mode == "server":
        from fdfast.rollout.turns import end_ids
        from fdfast.rollout.vllm_server import VLLMServerEngine

        return VLLMServerEngine(
            config.vllm.server_base_url,
            tokenizer,
            end_ids=end_ids(model.generation_config, tokenizer),
            max_concurrency=config.rollout.generation_batch_size,
            weights_dir=Path(config.vllm.weights_dir) if config.vllm.weights_dir else None,
            may_sleep=config.vllm.enable_sleep_mode,
        )
    from fdfast.rollout.vllm_engine import VLLMEngine
    from fdfast.rollout.vllm_turns import logprobs_mode_for

    name = config.model.model_name_or_path
    return VLLMEngine(
        fetch_demo_model() if name == "demo" else name,
        tokenizer,
        dtype=config.model.dtype,
        max_model_len=config.vllm.max_model_length or None,
        gpu_memory_utilization=config.vllm.gpu_memory_utilization,
        tensor_parallel_size=config.vllm.tensor_parallel_size,
        enable_sleep_mode=config.vllm.enable_sleep_mode,
        logprobs_mode=logprobs_mode_for(sampling_options(config)) or "processed_logprobs",
        max_num_seqs=config.rollout.generation_batch_size,
        seed=config.seed,
        weights_dir=Path(config.vllm.weights_dir) if config.vllm.weights_dir else None,
    )


def _make_fleet(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    lean: LeanPool | None,
    say: Callable[[str], None],
) -> RayFleet:
    from fdfast.rollout.ray_actor import ActorSettings, model_files
    from fdfast.rollout.vllm_turns import logprobs_mode_for

    vllm_args = {
        "max_model_len": config.vllm.max_model_length or None,
        "gpu_memory_utilization": config.vllm.gpu_memory_utilization,
        "tensor_parallel_size": config.vllm.tensor_parallel_size,
        "logprobs_mode": logprobs_mode_for(sampling_options(config)) or "processed_logprobs",
        "seed": config.seed,
    }
    settings = ActorSettings(
        model_files(model, tokenizer),
        dtype=config.model.dtype,
        batch_size=config.rollout.generation_batch_size,
        use_vllm=config.rollout.use_vllm,
        vllm_args=vllm_args if config.rollout.use_vllm else {},
        lean_version="" if lean is None else lean.toolchain.version,
        lean_workers=config.lean.workers,
        lean_timeout_s=config.lean.timeout_s,
        tools=config.rollout.tools,
        libraries=tool_libraries(config),
    )
    return RayFleet(
        settings,
        address=config.ray.address,
        num_actors=config.ray.num_actors,
        gpus_per_actor=config.ray.gpus_per_actor,
        cpus_per_actor=config.ray.cpus_per_actor,
        say=say,
    )
