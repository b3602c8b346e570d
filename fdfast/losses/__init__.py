"""The losses: thin PyTorch on N-sized tensors over one `policy_head` call."""

from fdfast.losses.advantages import group_advantages
from fdfast.losses.distillation import FeedbackDistillationLoss
from fdfast.losses.output import LossOutput, verl_names
from fdfast.losses.policy import GRPOLoss

__all__ = [
    "FeedbackDistillationLoss",
    "GRPOLoss",
    "LossOutput",
    "group_advantages",
    "verl_names",
]
