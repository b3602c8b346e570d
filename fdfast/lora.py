"""LoRA: adapters on a student, what they come to, and how they are saved.

Source: Hu et al. (2021), arXiv 2106.09685. Legend: M outputs, N inputs, R rank.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfast.errors import InputError, MachineError
from fdfast.models import has_adapters, save_model
from fdfast.rollout.weights import merged_state

_FACTOR = re.compile(r"(.+)\.lora_[AB]\.(\w+)\.weight")


def import_peft() -> Any:
    """The library, or one line that says what installs it."""
    try:
        import peft
    except ImportError as error:
        raise MachineError(
            f"model.use_peft wants peft, which is not installed ({error}); run: pip install "
            "'fdfast[lora]'"
        ) from error
    return peft


@contextmanager
def _quiet() -> Iterator[None]:
    """peft uses an older name of transformers, which then warns of peft."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Model .*tie_word_embeddings=True`")
        yield


def add_adapters(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (),
    seed: int = 0,
) -> Any:
    """The model with adapters on linear layers, which alone are trained; they begin at zero.

    Args:
        model: a causal LM of transformers; peft changes it in place.
        rank: of B A.
        alpha: the adapter is alpha / rank * B A.
        dropout: of an adapter's input, while it is trained.
        target_modules: last parts of layers' names; () for every linear layer but the head.
        seed: of A's initial values.

    Raises:
        InputError: no layer has such a name, or it is none that the teacher can average.
        MachineError: peft is missing.
    """
    peft = import_peft()
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules) or "all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        with _quiet():
            adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(
            f"model: lora_target_modules {list(target_modules)} can't be adapted "
            f"({' '.join(str(error).split())[:150]})"
        ) from error
    adapted_layers(adapted)
    return adapted


def load_adapters(model: Any, folder: Path) -> Any:
    """The model with the adapters that `save_adapters` wrote, to be trained on."""
    with _quiet():
        return import_peft().PeftModel.from_pretrained(model, folder, is_trainable=True)


def save_adapters(model: Any, tokenizer: Any, folder: Path) -> None:
    """The adapters alone, with the tokenizer; peft loads them over the base model."""
    # "auto" would ask the hub about the base model's vocabulary.
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def save_merged(model: Any, tokenizer: Any, folder: Path) -> None:
    """The base model with the adapters in its weights; transformers and vLLM load it."""
    if not has_adapters(model):
        save_model(model, tokenizer, folder)
        return
    base = model.get_base_model()
    base.save_pretrained(folder, state_dict=merged_state(model))
    tokenizer.save_pretrained(folder)


def adapted_layers(model: Any) -> dict[str, tuple[Any, str]]:
    """A peft model's adapted linear layers and the adapter that is trained, by name.

    Raises:
        InputError: something is trained that is not the two factors of a linear layer.
    """
    found: dict[str, tuple[Any, str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = _FACTOR.fullmatch(name)
        layer = model.get_submodule(factor[1]) if factor else None
        plain = (
            layer is not None
            and isinstance(layer.get_base_layer(), torch.nn.Linear)
            and not getattr(layer, "lora_variant", None)
            and not layer.fan_in_fan_out
            and not layer.merged
        )
        if factor is None or not plain or layer is model.get_output_embeddings():
            raise InputError(
                f"lora: {name} is no factor of a plain adapter on a linear layer below the head, "
                "which the teacher could average; choose other lora_target_modules, without DoRA, "
                "biases and modules_to_save"
            )
        if found.setdefault(factor[1], (layer, factor[2]))[1] != factor[2]:
            raise InputError(f"lora: {factor[1]} trains two adapters at once; train one")
    return found


class DeltaLinear(torch.nn.Module):
    """y = base(x) + x delta^T: added as a LoRA layer adds them, for a small delta would be lost in
    the narrow sum of the weights.

    Args:
        base: (M, N) linear layer, shared with whoever has it.
        delta: (M, N), in the base's dtype, on its device.
    """

    def __init__(self, base: torch.nn.Linear, delta: Tensor) -> None:
        super().__init__()
        self.base = base
        self.delta = torch.nn.Parameter(delta, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) to (..., M)."""
        y: Tensor = self.base(x)
        return y + torch.nn.functional.linear(x, self.delta)
