"""The trainer: one dataclass of settings, one loop that reads top to bottom."""

from fdfast.trainer.config import TrainConfig, load_config
from fdfast.trainer.loop import train
from fdfast.trainer.presets import PRESETS

__all__ = ["PRESETS", "TrainConfig", "load_config", "train"]
