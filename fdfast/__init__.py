"""fdfast: fast post-training of Lean 4 theorem provers by Feedback Distillation and GRPO."""

from fdfast.errors import InputError, MachineError
from fdfast.losses import FeedbackDistillationLoss, GRPOLoss
from fdfast.policy_head import policy_head
from fdfast.topk_head import topk_head
from fdfast.types import PolicyHead, TeacherHidden, TeacherTopK, TopK

__version__ = "0.1.0"

__all__ = [
    "FeedbackDistillationLoss",
    "GRPOLoss",
    "InputError",
    "MachineError",
    "PolicyHead",
    "TeacherHidden",
    "TeacherTopK",
    "TopK",
    "policy_head",
    "topk_head",
]
