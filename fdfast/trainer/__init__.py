"""The trainer: one dataclass of settings, one loop that reads top to bottom."""

from typing import TYPE_CHECKING

from fdfast.lazy import lazy_names

if TYPE_CHECKING:
    from fdfast.trainer.config import TrainConfig
    from fdfast.trainer.config_file import load_config, make_config
    from fdfast.trainer.loop import train
    from fdfast.trainer.presets import PRESETS
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "PRESETS": "presets",
            "TrainConfig": "config",
            "load_config": "config_file",
            "make_config": "config_file",
            "train": "loop",
        },
    )

__all__ = ["PRESETS", "TrainConfig", "load_config", "make_config", "train"]
