"""A model whose weights lie on several ranks: FSDP2, a group of weights for each decoder layer and
one for the rest (embedding, last norm, head).

The trainer calls the decoder and reads the head's weight beside it, both outside of the model's own
forward, on which FSDP's hooks hang. So what needs the weights runs `inside` the model: the rest is
gathered before it, each layer gathers itself on the way, and gradients go back to their shards as
sums over the ranks, not means.

A head that is cut along the vocabulary (vocabulary_parallel) is never gathered: each rank reads its
own rows (`head_shard`), and the gradient that autograd leaves at them is already that of all ranks'
tokens. One that is also the embedding is gathered for that, and `head_shard` are its rows all the
same: FSDP adds what the embedding's gradient has for them.
"""

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from fdfast.errors import InputError
from fdfast.models import HeadWeights, hidden_states, lm_head
from fdfast.packing import PrefixTree

T = TypeVar("T")


def shard(model: Any, device: torch.device, *, keeps_head_cut: bool = False) -> None:
    """Cut the weights of a causal LM over all ranks, along their first dimension; in place.

    A collective. Each rank holds the same weights before.

    Args:
        model: of transformers, peft's wrapper included.
        device: of this rank; the model is moved there.
        keeps_head_cut: `head_shard` shall say the head's rows of this rank, and no pass gather it.

    Raises:
        InputError: a rank would have no row of the head.
    """
    model.to(device)
    head = model.get_output_embeddings()
    if keeps_head_cut:
        _check_rows(len(head.weight))
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Gradients of narrow weights are added up in float32.
    options: Any = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    base = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    for layer in base.layers:
        fully_shard(layer, **options)
    if keeps_head_cut and head.weight is not model.get_input_embeddings().weight:
        fully_shard(head, **options)  # a group that gathers itself in its own forward: in no pass
    fully_shard(model, **options)
    if keeps_head_cut:
        # Of these objects autograd and the optimizer know, whether the others are gathered or not.
        model.head_shard = lm_head(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum: what ranks add up is one loss. gloo has no scaled sum, so none is asked for.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.run_inside = types.MethodType(lambda _, function: function(), model)
    register_fsdp_forward_method(model, "run_inside")


def _check_rows(V: int) -> None:
    """Rows are dealt out in runs of one length, the last ones shorter."""
    size = torch.distributed.get_world_size()
    if -(-V // size) * (size - 1) >= V:
        raise InputError(
            f"model.vocabulary_parallel: a vocabulary of {V} leaves one of {size} ranks without a "
            "row of the head; take fewer ranks, or vocabulary_parallel=false"
        )


def head_shard(model: Any) -> HeadWeights:
    """This rank's rows of a head that `shard` kept cut; differentiable."""
    head: HeadWeights = model.head_shard
    weight, bias = head.weight, head.bias
    assert isinstance(weight, DTensor)
    return head._replace(
        weight=weight.to_local(), bias=bias.to_local() if isinstance(bias, DTensor) else None
    )


def _groups(model: Any) -> list[FSDPModule]:
    """The modules whose weights a pass gathers."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, FSDPModule) and m is not head]


def inside(model: Any, function: Callable[[], T]) -> T:
    """What `function` returns, run where the model's weights can be read; of a whole model they
    always can. A collective: every rank runs as many layers in the same order.

    Args:
        model: sharded or whole.
        function: its result is differentiable, as if the weights were whole.
    """
    if isinstance(model, FSDPModule):
        result: T = model.run_inside(function)  # type: ignore[attr-defined]
        return result
    return function()


def release(*models: Any) -> None:
    """Give back what `inside` left gathered: weights will change, or memory is wanted."""
    for model in models:
        for module in _groups(model):
            module.reshard()


@contextlib.contextmanager
def gathered(model: Any, *others: Any) -> Iterator[None]:
    """Hold whole weights and, of `model`, whole gradients on each rank until the end, so that ranks
    may run different numbers of passes within. A collective at its beginning and at its end.

    Args:
        model: sharded; its gradients are reduced at the end.
        others: sharded; they have none.
    """
    modules = [module for each in (model, *others) for module in _groups(each)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.set_requires_gradient_sync(False, recurse=False)
    inside(model, lambda: None)  # the first to run is the root
    for other in others:
        inside(other, lambda: None)
    for module in modules:
        module.unshard()
    yield
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.set_reshard_after_backward(True, recurse=False)
        module.set_requires_gradient_sync(True, recurse=False)
    if torch.is_grad_enabled():
        empty_pass(model).backward()  # type: ignore[no-untyped-call]
    release(model, *others)


def blank_tree() -> PrefixTree:
    """A pack without targets."""
    return PrefixTree.from_sequences([[0]], [[False]])


def empty_pass(model: Any) -> Tensor:
    """A loss of 0 that depends on every trained weight: the part of a rank that has no pack left
    in a pass of the others.
    """
    tree = blank_tree().to(next(model.parameters()).device)

    def loss() -> Tensor:
        parts = [hidden_states(model, tree).sum()]
        if not isinstance(model.get_output_embeddings(), FSDPModule):  # it is gathered too
            head = lm_head(model)
            parts += [0.0 * x[:1].sum() for x in (head.weight, head.bias) if x is not None]
        return torch.stack([part.float() for part in parts]).sum()

    return inside(model, loss)


class WholeCopy:
    """The student with whole weights, for what samples from it; it follows after each update.

    Args:
        model: before it is sharded.
        device: where the copy lies.
        shares: whether weights that are not trained are the model's very own: it lies on that
            device, and will not be sharded.
    """

    def __init__(self, model: Any, device: torch.device, *, shares: bool = False) -> None:
        shared = [p for p in model.parameters() if shares and not p.requires_grad]
        copied = copy.deepcopy(model, {id(p): p for p in shared})
        self.model = copied.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def follow(self, student: Any) -> None:
        """Take over the weights, one after the other; of a sharded student a collective."""
        release(student)
        for own, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            if own is not theirs:
                own.copy_(whole(theirs))


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this rank has a shard. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
