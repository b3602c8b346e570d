"""Random prefix forests in depth-first order, and what attention over them must be.

Legend: T tokens, N nodes, H query heads, G key and value heads, D head size.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdfast import types


class Node(NamedTuple):
    """A run of tokens start .. end - 1 whose attention begins with its parent's, if it has one."""

    start: int
    end: int
    parent: int  # a node before it, or -1


@dataclass(frozen=True)
class Forest:
    """Nodes in depth-first order, and one number a token of each kind."""

    nodes: list[Node]
    kv_end: Tensor  # (T,) int32: the end of the subtree of the token's node
    position_ids: Tensor  # (T,) int64: continues the parent's

    @property
    def num_tokens(self) -> int:
        return len(self.kv_end)

    @property
    def cu_seqlens(self) -> Tensor:
        """(N + 1,) int32."""
        return torch.tensor([0, *(node.end for node in self.nodes)], dtype=torch.int32)

    @property
    def parent(self) -> Tensor:
        """(N,) int32."""
        return torch.tensor([node.parent for node in self.nodes], dtype=torch.int32)

    def tensors(self, device: str | torch.device = "cpu") -> types.Forest:
        """What a backend is given."""
        parts = (self.cu_seqlens, self.parent, self.kv_end, self.position_ids)
        return types.Forest(*(part.to(device) for part in parts))


def forest(lengths: list[int], parents: list[int]) -> Forest:
    """The forest of nodes of these lengths (zero is allowed), which are in depth-first order."""
    nodes: list[Node] = []
    start = 0
    for length, parent in zip(lengths, parents, strict=True):
        nodes.append(Node(start, start + length, parent))
        start += length
    subtree_ends = [node.end for node in nodes]
    for index in reversed(range(len(nodes))):
        parent = nodes[index].parent
        assert parent < index
        if parent >= 0:
            subtree_ends[parent] = max(subtree_ends[parent], subtree_ends[index])
    kv_end = torch.zeros(start, dtype=torch.int32)
    position_ids = torch.zeros(start, dtype=torch.int64)
    next_position: list[int] = []
    for node, subtree_end in zip(nodes, subtree_ends, strict=True):
        first = next_position[node.parent] if node.parent >= 0 else 0
        next_position.append(first + node.end - node.start)
        kv_end[node.start : node.end] = subtree_end
        position_ids[node.start : node.end] = torch.arange(first, next_position[-1])
    return Forest(nodes, kv_end, position_ids)


def random_forest(
    rng: random.Random,
    *,
    num_nodes: int = 9,
    max_length: int = 30,
    min_length: int = 1,
    roots: float = 0.15,
) -> Forest:
    """Nodes of random lengths, each a root (with probability `roots`) or the child of the node
    before it or of one of that one's ancestors: every forest in depth-first order can come out.
    """
    lengths = [rng.randint(min_length, max_length) for _ in range(num_nodes)]
    parents: list[int] = []
    for index in range(num_nodes):
        if index == 0 or rng.random() < roots:
            parents.append(-1)
            continue
        line = [index - 1]
        while parents[line[-1]] >= 0:
            line.append(parents[line[-1]])
        parents.append(rng.choice(line))
    return forest(lengths, parents)


def dense_mask(tree: Forest, sliding_window: int | None = None) -> Tensor:
    """(T, T) bool, from the nodes alone: which keys (columns) a query (a row) sees."""
    mask = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.bool)
    for node in tree.nodes:
        length = node.end - node.start
        own = torch.ones(length, length, dtype=torch.bool).tril()
        mask[node.start : node.end, node.start : node.end] = own
        above = node.parent
        while above >= 0:
            mask[node.start : node.end, tree.nodes[above].start : tree.nodes[above].end] = True
            above = tree.nodes[above].parent
    if sliding_window is not None:
        distance = tree.position_ids[:, None] - tree.position_ids[None, :]
        mask &= distance < sliding_window
    return mask


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(T, H, D) and the natural log-sum-exp (H, T) in the inputs' dtype, differentiable.

    Args:
        q: (T, H, D).
        k: (T, G, D), G a divisor of H.
        v: likewise.
        mask: (T, T) bool.
        scale: of the scores.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)
