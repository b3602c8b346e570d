"""fdfast: fast post-training of Lean 4 theorem provers by Feedback Distillation and GRPO."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fdfast.errors import InputError, MachineError

if TYPE_CHECKING:
    from fdfast.losses import FeedbackDistillationLoss, GRPOLoss
    from fdfast.policy_head import policy_head
    from fdfast.policy_head_loss import policy_head_loss
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
    "policy_head_loss",
    "topk_head",
]

# torch takes seconds to import; `fdfast --help` and `fdfast lean check` do without it. So these
# names, and the submodules, are imported when they are first asked for.
_HOME = {
    "FeedbackDistillationLoss": "losses",
    "GRPOLoss": "losses",
    "PolicyHead": "types",
    "TeacherHidden": "types",
    "TeacherTopK": "types",
    "TopK": "types",
    "policy_head": "policy_head",
    "policy_head_loss": "policy_head_loss",
    "topk_head": "topk_head",
}


class _Package(ModuleType):
    """Keeps fdfast.policy_head the function: importing the submodule of the same name would put the
    module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker would take any name for defined

    def __getattr__(name: str) -> Any:
        missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name.startswith("_"):
            raise missing
        module = f"{__name__}.{_HOME.get(name, name)}"
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise missing from None
        if name in _HOME:
            value = getattr(value, name)
            setattr(sys.modules[__name__], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
