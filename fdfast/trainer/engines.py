"""The rollout engine that a run's settings name."""

from typing import Any

from fdfast.rollout import Engine, HFEngine
from fdfast.trainer.config import TrainConfig


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
    return HFEngine(model, tokenizer, batch_size=config.generation_batch_size)
