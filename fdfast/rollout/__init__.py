"""Rollouts: prompts in, the student's own tokens out. One interface for every engine."""

from typing import TYPE_CHECKING

from fdfast.lazy import lazy_names

if TYPE_CHECKING:
    from fdfast.rollout.engine import Engine
    from fdfast.rollout.generation import generate
    from fdfast.rollout.hf import HFEngine
    from fdfast.rollout.toolboxes import Toolboxes
    from fdfast.rollout.trajectory import SamplingOptions, ToolCall, Tools, Trajectory
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "Engine": "engine",
            "HFEngine": "hf",
            "SamplingOptions": "trajectory",
            "ToolCall": "trajectory",
            "Toolboxes": "toolboxes",
            "Tools": "trajectory",
            "Trajectory": "trajectory",
            "generate": "generation",
        },
    )

__all__ = [
    "Engine",
    "HFEngine",
    "SamplingOptions",
    "ToolCall",
    "Toolboxes",
    "Tools",
    "Trajectory",
    "generate",
]
