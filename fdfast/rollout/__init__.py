"""Rollouts: prompts in, the student's own tokens out. One interface for every engine."""

from fdfast.rollout.completion import Completion, SamplingOptions
from fdfast.rollout.hf import HFEngine

__all__ = ["Completion", "HFEngine", "SamplingOptions"]
