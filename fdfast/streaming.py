"""The student's pass over a pack that is too large for memory: what is shared once, the rest in
parts.

A part's keys and values of the tokens above it are leaves, whose gradients add up from part to
part; one backward pass takes them through those tokens at the end. The gradient is that of the
whole pack; in memory are the tokens above and one part.
Legend: T tokens, M targets of the pack, m of a part, D hidden, K key heads, E head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdfast.errors import InputError
from fdfast.model_attention import Pass, last_hidden
from fdfast.packing import PrefixTree

# (m, D) hidden states and (m,) which of the tree's targets they predict -> the part's loss.
PartLoss = Callable[[Tensor, Tensor], Tensor]


def backward_in_parts(
    model: Any,
    tree: PrefixTree,
    loss: PartLoss,
    *,
    max_tokens: int,
    backend: str = "auto",
    offload: bool = False,
) -> Tensor:
    """Add the gradient of a loss that is a sum over targets to the model's parameters.

    Args:
        model: see `models.hidden_states`.
        tree: on the model's device.
        loss: called once for each part; the parts hold every target once, in no set order.
        max_tokens: that one forward pass computes; a node with more is a pass of its own.
        backend: of `prefix_attention`.
        offload: see `models.hidden_states`.

    Returns:
        The sum of the losses, without a graph.

    Raises:
        ValueError: max_tokens is below 1.
        InputError: see `models.hidden_states`; or the model checkpoints gradients, which would
            compute the kept keys anew.
    """
    if max_tokens < 1:
        raise ValueError(f"backward_in_parts: max_tokens must be at least 1; got {max_tokens}")
    stream = _Stream(model, tree, loss, max_tokens, backend, offload)
    stream.run(stream.children(-1), [])
    return stream.total


@dataclass(frozen=True)
class _Above:
    """A run of tokens that was computed: their keys and values in each layer, as leaves."""

    num_tokens: int
    leaves: list[tuple[Tensor, Tensor]]  # (K, tokens, E) each


class _Stream:
    """One pass over a tree; a subtree is named by its first node."""

    def __init__(
        self,
        model: Any,
        tree: PrefixTree,
        loss: PartLoss,
        max_tokens: int,
        backend: str,
        offload: bool,
    ) -> None:
        self.model, self.tree, self.loss = model, tree, loss
        self.max_tokens, self.backend, self.offload = max_tokens, backend, offload
        self.bounds: list[int] = tree.cu_seqlens.tolist()
        self.parents: list[int] = tree.parent.tolist()
        self.kv_end: list[int] = tree.kv_end.tolist()
        self.total = torch.zeros((), device=tree.input_ids.device)

    def children(self, node: int) -> list[int]:
        """The nodes that continue this one; of -1, the roots."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def end(self, node: int) -> int:
        """The end of a node's subtree."""
        return self.kv_end[self.bounds[node]]

    def run(self, siblings: list[int], above: list[_Above]) -> None:
        """Whole subtrees together as far as they fit; one that does not is divided."""
        for first, last in self._groups(siblings):
            start, end = self.bounds[first], self.end(last)
            if end - start <= self.max_tokens or not self.children(first):
                run = Pass(self.tree, self.backend, offload=self.offload)
                hidden, rows = self._forward(start, end, above, run)
                self._loss(hidden, rows).backward()  # type: ignore[no-untyped-call]
            else:
                self._divide(first, above)

    def _groups(self, siblings: list[int]) -> Iterator[tuple[int, int]]:
        """The first and last of each run of neighbours that fit together."""
        first = last = siblings[0]
        for node in siblings[1:]:
            if self.end(node) - self.bounds[first] > self.max_tokens:
                yield first, last
                first = node
            last = node
        yield first, last

    def _divide(self, node: int, above: list[_Above]) -> None:
        """The node's own tokens, what continues them, and the way back through the node."""
        start, stop = self.bounds[node], self.bounds[node + 1]
        run = Pass(self.tree, self.backend, keeps=True, offload=self.offload)
        hidden, rows = self._forward(start, stop, above, run)
        leaves = [
            (key.detach().requires_grad_(), value.detach().requires_grad_())
            for key, value in run.kept
        ]
        self.run(self.children(node), [*above, _Above(stop - start, leaves)])
        roots = [tensor for pair in run.kept for tensor in pair]
        gradients = [leaf.grad for pair in leaves for leaf in pair]
        ways = [(r, g) for r, g in zip(roots, gradients, strict=True) if g is not None]
        torch.autograd.backward(
            [self._loss(hidden, rows), *(root for root, _ in ways)],
            [None, *(gradient for _, gradient in ways)],
        )

    def _loss(self, hidden: Tensor, rows: Tensor) -> Tensor:
        part = self.loss(hidden, rows)
        self.total = self.total + part.detach()
        return part

    def _forward(
        self, start: int, end: int, above: list[_Above], run: Pass
    ) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the targets of these tokens, and which targets those are."""
        run.tree = self._part(start, end, sum(piece.num_tokens for piece in above))
        if above:
            run.above = [
                (torch.cat([k for k, _ in pieces], 1), torch.cat([v for _, v in pieces], 1))
                for pieces in zip(*(piece.leaves for piece in above), strict=True)
            ]
        tree = self.tree
        if run.keeps and getattr(self.model.get_decoder(), "gradient_checkpointing", False):
            raise InputError(
                "backward_in_parts: the model checkpoints gradients, whose layers would compute "
                "the kept keys anew; turn one of the two off"
            )
        hidden = last_hidden(
            self.model, run, tree.input_ids[start:end], tree.position_ids[start:end]
        )
        inside = (tree.logits_index >= start) & (tree.logits_index < end)
        (rows,) = inside.nonzero(as_tuple=True)
        return hidden.index_select(0, tree.logits_index[rows] - start), rows

    def _part(self, start: int, end: int, num_above: int) -> PrefixTree:
        """The tokens above, which are one run, and below it those of the part."""
        tree = self.tree
        device = tree.kv_end.device
        bounds = tree.cu_seqlens
        inside = bounds[(bounds >= start) & (bounds <= end)] - start + num_above
        top = [0] * bool(num_above)
        kv_end = (tree.kv_end[start:end] - start + num_above).clamp(max=num_above + end - start)
        own = torch.arange(num_above, device=device)
        return PrefixTree(
            input_ids=tree.input_ids[start:end],
            position_ids=torch.cat([own, tree.position_ids[start:end]]),
            cu_seqlens=torch.cat([inside.new_tensor(top), inside]),
            parent=self._parents(start, end, num_above),
            kv_end=torch.cat([kv_end.new_full((num_above,), num_above + end - start), kv_end]),
            logits_index=tree.logits_index[:0],
            target_ids=tree.target_ids[:0],
            num_tokens_apart=end - start,
        )

    def _parents(self, start: int, end: int, num_above: int) -> Tensor:
        first = self.bounds.index(start)
        shift = first - bool(num_above)
        inside = [
            max(parent - shift, 0 if num_above else -1) if parent >= first else bool(num_above) - 1
            for node, parent in enumerate(self.parents)
            if start <= self.bounds[node] < end
        ]
        top = [-1] * bool(num_above)
        return self.tree.parent.new_tensor([*top, *inside])
