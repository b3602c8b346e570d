"""The rollout engine that a run's settings name."""

from pathlib import Path
from typing import Any

from fdfast.models import fetch_demo_model
from fdfast.rollout import Engine, HFEngine
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.rollouts import sampling_options


def make_engine(config: TrainConfig, model: Any, tokenizer: Any) -> Engine:
    """Samples from `model`, or from vLLM's copy of it.

    Args:
        config: of the run.
        model: the student.
        tokenizer: its tokenizer.

    Raises:
        InputError: the settings of vLLM do not fit the model.
        MachineError: vLLM is missing, or its server does not answer.
    """
    if not config.use_vllm:
        return HFEngine(model, tokenizer, batch_size=config.generation_batch_size)
    if config.vllm_mode == "server":
        from fdfast.rollout.turns import end_ids
        from fdfast.rollout.vllm_server import VLLMServerEngine

        return VLLMServerEngine(
            config.vllm_server_base_url,
            tokenizer,
            end_ids=end_ids(model.generation_config, tokenizer),
            max_concurrency=config.generation_batch_size,
            weights_dir=Path(config.vllm_weights_dir) if config.vllm_weights_dir else None,
            may_sleep=config.vllm_enable_sleep_mode,
        )
    from fdfast.rollout.vllm_engine import VLLMEngine
    from fdfast.rollout.vllm_turns import logprobs_mode_for

    name = config.model_name_or_path
    return VLLMEngine(
        fetch_demo_model() if name == "demo" else name,
        tokenizer,
        dtype=config.dtype,
        max_model_len=config.vllm_max_model_length or None,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        enable_sleep_mode=config.vllm_enable_sleep_mode,
        logprobs_mode=logprobs_mode_for(sampling_options(config)) or "processed_logprobs",
        max_num_seqs=config.generation_batch_size,
        seed=config.seed,
        weights_dir=Path(config.vllm_weights_dir) if config.vllm_weights_dir else None,
    )
