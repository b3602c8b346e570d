"""Prefix attention inside unpatched Hugging Face models, through transformers' AttentionInterface.

The model's attention is ours during a pass and, where layers are computed anew in the backward pass
(gradient checkpointing), during that; else it stays what it was, so generation is not touched.
Legend: T tokens, H query heads, K key heads, E head size, D hidden.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fdfast.errors import InputError
from fdfast.fused_layers import made_again
from fdfast.offloading import Copies, CudaCopies, Offload
from fdfast.packing import PrefixTree
from fdfast.prefix_attention import prefix_attention

# Neither flash, sdpa nor flex may be in the name: transformers reads them out of it.
NAME = "fdfast_prefix"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Their rotation depends on the longest sequence of the batch.
_ROPE_BY_LENGTH = {"dynamic", "longrope"}


class Pass:
    """One forward pass of a tree.

    No dataclass: FSDP2 looks for tensors in the dataclasses that a layer is given, and hands the
    layer a copy where it finds some; what the layer counts and keeps would be lost.

    Attributes:
        tree: of all tokens that are attended to: those above, then those of the pass.
        backend: of `prefix_attention`.
        above: for each layer the keys and values, (K, A, E), of the A tokens before those of the
            pass, which are not computed here; empty: there are none.
        keeps: whether `kept` shall hold each layer's keys and values of the pass.
        offload: whether what the backward pass needs lies on the CPU until then.
        kept: see `keeps`.
        num_calls: layers that asked.
    """

    def __init__(
        self,
        tree: PrefixTree,
        backend: str = "auto",
        *,
        keeps: bool = False,
        offload: bool = False,
    ) -> None:
        self.tree, self.backend, self.keeps, self.offload = tree, backend, keeps, offload
        self.above: list[tuple[Tensor, Tensor]] = []
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.num_calls = 0


def last_hidden(model: Any, run: Pass, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """The last hidden states (T, D) of the tokens of a pass; logits are not made.

    Args:
        model: a causal LM of transformers, peft's wrapper included.
        run: the pass.
        input_ids: (T,) int64.
        position_ids: (T,) int64.

    Raises:
        InputError: the result would be wrong for this model, or nothing can be brought away from
            its device.
    """
    base = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    config = base.config
    _refuse(model, config, position_ids)
    _register()
    checkpointing = getattr(base, "gradient_checkpointing", False)
    offload = run.offload and torch.is_grad_enabled()
    copies = CudaCopies(input_ids.device) if offload else None
    with _attention(config), _kept_as(copies, checkpointing=checkpointing):
        output = base(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            prefix_pass=run,
        )
    if run.num_calls != config.num_hidden_layers:
        raise InputError(
            f"{type(model).__name__}: {run.num_calls} of its {config.num_hidden_layers} layers "
            "take their attention through transformers' AttentionInterface; the others would "
            "misread a pack"
        )
    hidden: Tensor = output.last_hidden_state[0]
    if hidden.requires_grad and checkpointing:
        hidden.register_hook(functools.partial(_attend_in_backward, config))  # type: ignore[no-untyped-call]
    return hidden


def _refuse(model: Any, config: Any, position_ids: Tensor) -> None:
    name = type(model).__name__
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        raise InputError(
            f"{name}: its layers of type {', '.join(others)} carry state from token to token, "
            "which a pack of several sequences would mix; run them apart"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for kind in [rope, *rope.values()]:  # of all layers, or of each type of them
        if not isinstance(kind, dict) or kind.get("rope_type") not in _ROPE_BY_LENGTH:
            continue
        limit: int = kind.get("original_max_position_embeddings", config.max_position_embeddings)
        if int(position_ids.max()) >= limit:
            raise InputError(
                f"{name}: its rotation ({kind['rope_type']}) depends on a sequence's length beyond "
                f"{limit} tokens; take shorter sequences, or run them apart"
            )


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


@contextlib.contextmanager
def _attention(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def _kept_as(copies: Copies | None, *, checkpointing: bool) -> Iterator[None]:
    """How a pass keeps what its backward pass needs, if there is one."""
    offload = None if copies is None else Offload(copies)
    with contextlib.ExitStack() as stack:
        if offload is not None:
            stack.callback(offload.close)
        if torch.is_grad_enabled() and not checkpointing:
            stack.enter_context(made_again(offload))
        elif offload is not None:  # what is left to keep: the layers' inputs
            hooks = torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack)
            stack.enter_context(hooks)
        yield


def _attend_in_backward(config: Any, _gradient: Tensor) -> None:
    """Layers that are computed anew need what they were computed with."""
    before = config._attn_implementation
    if before == NAME:
        return

    def restore() -> None:
        config._attn_implementation = before

    config._attn_implementation = NAME
    torch.autograd.Variable._execution_engine.queue_callback(restore)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_pass: Pass | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What a layer calls: query (1, H, T, E), key and value (1, K, T, E), rotated."""
    name = type(module).__name__
    if prefix_pass is None:
        raise InputError(f"{name}: it does not pass on the keyword argument prefix_pass")
    if attention_mask is not None:
        raise InputError(f"{name}: it brings an attention mask of its own beside the pack's")
    if dropout:
        raise InputError(
            f"{name}: attention_dropout is {dropout}; set it to 0 in the model's config"
        )
    if not getattr(module, "is_causal", True):
        raise InputError(f"{name}: it attends to later tokens too, which a pack does not")
    for option in ("softcap", "s_aux", "position_bias"):
        if options.get(option) is not None:
            raise InputError(f"{name}: {option} in attention is not supported")
    prefix_pass.num_calls += 1
    out = _with_above(
        prefix_pass, module.layer_idx, query[0], key[0], value[0], scaling, sliding_window
    )
    return out.unsqueeze(0), None


def _with_above(
    run: Pass,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sliding_window: int | None,
) -> Tensor:
    """(T, H, E) from (H, T, E) and (K, T, E)."""
    if run.keeps:
        run.kept.append((key, value))
    num_above = 0
    if run.above:
        above_key, above_value = run.above[layer]
        num_above = above_key.shape[1]
        # Queries of nobody, whose output is dropped: they add exactly 0 to every gradient.
        query = torch.nn.functional.pad(query, (0, 0, num_above, 0))
        key, value = torch.cat([above_key, key], 1), torch.cat([above_value, value], 1)
    out = prefix_attention(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        run.tree,
        scale=scale,
        sliding_window=sliding_window,
        backend=run.backend,
    )
    return out[num_above:]
