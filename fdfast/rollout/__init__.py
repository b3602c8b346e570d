"""Rollouts: prompts in, the student's own tokens out. One interface for every engine."""

from fdfast.rollout.engine import Engine
from fdfast.rollout.generate import generate
from fdfast.rollout.hf import HFEngine
from fdfast.rollout.toolboxes import Toolboxes
from fdfast.rollout.trajectory import SamplingOptions, ToolCall, Tools, Trajectory

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
