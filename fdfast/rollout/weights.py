"""A model's weights as its checkpoint would hold them, for engines that load checkpoints."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfast.errors import InputError
from fdfast.models import has_adapters

_PEFT = "base_model.model."
# Of plain LoRA, what `get_delta_weight` reads.
_LORA = re.compile(r"\.lora_([AB]\.\w+\.weight|embedding_[AB]\.\w+)$")


def checkpoint_weights(model: Any) -> dict[str, Tensor]:
    """The weights under the names of a checkpoint, tied ones once, peft's adapters merged.

    Args:
        model: a causal LM of transformers, or peft's wrapper of one. It is left as it is.

    Returns:
        Tensors of any shape and dtype, detached, on the model's device. They are the model's own
        where nothing had to be computed, so they change when it is trained on.

    Raises:
        InputError: an adapter can't be merged into the weights.
    """
    with torch.no_grad():
        base, weights = base_model(model), model_weights(model)
        return {name: tensor.detach() for name, tensor in _as_saved(base, weights).items()}


def model_weights(model: Any) -> dict[str, Tensor]:
    """Likewise under the names of the (base) model's own state, for another of its class.

    Raises:
        InputError: an adapter can't be merged into the weights.
    """
    with torch.no_grad():
        weights = merged_state(model) if has_adapters(model) else dict(model.state_dict())
        _drop_tied(base_model(model), weights)
        return {name: tensor.detach() for name, tensor in weights.items()}


def base_model(model: Any) -> Any:
    """The causal LM in peft's wrapper, or the model itself."""
    return model.get_base_model() if has_adapters(model) else model


def load_model_weights(model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy what `model_weights` gave into another model of that class.

    Args:
        model: a causal LM of transformers; its dtype and device stay.
        weights: names and tensors; each may be freed as soon as the next is asked for.

    Raises:
        InputError: a tensor is of another shape, unknown, or missing.
    """
    own = model.state_dict()
    loaded = set()
    with torch.no_grad():
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                raise InputError(
                    f"weights: {name} {tuple(tensor.shape)} does not fit {type(model).__name__}; "
                    "both models must be of one config"
                )
            own[name].copy_(tensor)
            loaded.add(own[name].data_ptr())  # what is tied to it is loaded, too
    if missing := sorted(name for name, t in own.items() if t.data_ptr() not in loaded):
        raise InputError(
            f"weights: {len(missing)} of the model's tensors are missing ({missing[0]}, ...); "
            "both models must be of one config"
        )


def save_weights(model: Any, folder: Path) -> None:
    """The weights in `folder` as safetensors, which vLLM loads; nothing else of the model.

    Args:
        model: see `checkpoint_weights`.
        folder: it exists.

    Raises:
        InputError: see `checkpoint_weights`.
    """
    save_tensors(checkpoint_weights(model), folder)


def save_tensors(weights: Mapping[str, Tensor], folder: Path) -> None:
    """What `checkpoint_weights` gave in `folder` as safetensors, which vLLM loads."""
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_tied(base: Any, weights: dict[str, Tensor]) -> None:
    """Remove the second names of tied weights, as save_pretrained does.

    Raises:
        InputError: the two have come apart (an adapter on one of them), so no checkpoint of this
            model can hold them.
    """
    for name, source in base.all_tied_weights_keys.items():
        if name not in weights or source not in weights:
            continue
        if weights.pop(name).data_ptr() != weights[source].data_ptr():
            raise InputError(
                f"update_weights: {name} and {source} are tied but no longer equal; put adapters "
                "on neither, or set tie_word_embeddings to false"
            )


def _as_saved(base: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that save_pretrained writes: some models (experts) hold them otherwise."""
    from transformers.core_model_loading import revert_weight_conversion

    saved: dict[str, Tensor] = revert_weight_conversion(base, weights)
    return saved


def merged_state(model: Any) -> dict[str, Tensor]:
    """The state of a peft model's base with the active adapters added, computed beside the model:
    merging in place and back again would change the weights that are trained, by rounding, at each
    update.

    Raises:
        InputError: an adapter can't be merged into the weights.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        plain = name.removeprefix(_PEFT)
        module_name, _, leaf = name.rpartition(".")
        if _LORA.search(name):
            continue
        if ".lora_" in name or "modules_to_save" in name or "original_module" in name:
            raise InputError(
                f"update_weights: {plain} is of a kind of adapter that is not merged here; give a "
                "model of plain LoRA layers, or merge_and_unload() one first"
            )
        if module_name.endswith(".base_layer"):
            layer = model.get_submodule(module_name.removesuffix(".base_layer"))
            plain = plain.replace(".base_layer.", ".")
            if leaf == "weight" and not layer.merged and not layer.disable_adapters:
                tensor = tensor + _delta(layer, plain)  # noqa: PLW2901 (a new tensor, by intent)
        weights[plain] = tensor.detach()
    return weights


def _delta(layer: Any, name: str) -> Tensor:
    """What the active adapters add to a layer's weight."""
    if not hasattr(layer, "get_delta_weight") or getattr(layer, "lora_variant", None):
        raise InputError(
            f"update_weights: the adapter of {name} ({type(layer).__name__}) can't be merged; use "
            "LoRA, or merge_and_unload() the model first"
        )
    held = layer.lora_A.keys() | layer.lora_embedding_A.keys()
    deltas = [layer.get_delta_weight(a) for a in layer.active_adapters if a in held]
    return torch.stack(deltas).sum(0) if deltas else torch.zeros_like(layer.get_base_layer().weight)
