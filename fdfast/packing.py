"""Token sequences that begin alike, packed so that what they share passes through a model once.

A pack is a forest of nodes, each a run of tokens that continues its parent's. In depth-first order
the mask of any forest is one number a token: q sees k exactly when k <= q < kv_end[k].
Legend: S sequences, N nodes, T tokens of the pack, M target rows.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIN_SHARE = 32  # tokens; shorter parts of attention cost more calls than they save
MIN_RATIO = 1.05


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A pack of sequences; made by `from_sequences`.

    Attributes:
        input_ids: (T,) int64, nodes in depth-first order.
        position_ids: (T,) int64: the place of each token in its sequences, from 0.
        cu_seqlens: (N + 1,) int32: node n is the tokens cu_seqlens[n] to cu_seqlens[n + 1].
        parent: (N,) int32: the node that this one continues; -1 for a root.
        kv_end: (T,) int32: token q attends to token k exactly when k <= q < kv_end[k].
        logits_index: (M,) int64: the token whose hidden state predicts each target. A token that
            several sequences share may occur more than once.
        target_ids: (M,) int64: the targets, sequence after sequence in the order given, so in the
            same order for student and teacher whatever their prompts.
        num_tokens_apart: tokens of all sequences without sharing.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    parent: Tensor
    kv_end: Tensor
    logits_index: Tensor
    target_ids: Tensor
    num_tokens_apart: int

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        train_mask: Sequence[Sequence[bool]] | None = None,
        min_share: int = MIN_SHARE,
        *,
        min_ratio: float = MIN_RATIO,
    ) -> "PrefixTree":
        """Build the forest by longest common prefix.

        Args:
            sequences: S lists of token ids, none empty.
            train_mask: for each sequence as many flags as tokens: whether the token is a target,
                to be predicted from those before it. The first token never is one. None: all
                others are. Tool outputs are attended and not trained: False.
            min_share: tokens that a shared run must have at least.
            min_ratio: where sharing saves less than this ratio of tokens, each sequence is a root
                of its own. 1 shares whenever it can.

        Raises:
            ValueError: no sequence, an empty one, a mask of another length, or min_share below 1.
        """
        arrays = _arrays(sequences)
        masks = _masks(arrays, train_mask)
        if min_share < 1:
            raise ValueError(f"PrefixTree: min_share must be at least 1; got {min_share}")
        apart = sum(map(len, arrays))
        nodes, paths = _shared(arrays, min_share)
        if apart < min_ratio * sum(len(node.ids) for node in nodes):
            nodes = [_Node(-1, 0, array) for array in arrays]
            paths = [[number] for number in range(len(arrays))]
        return _assemble(nodes, paths, arrays, masks, apart)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def ratio(self) -> float:
        """Tokens without sharing over tokens of the pack: what is saved in all but attention."""
        return self.num_tokens_apart / max(self.num_tokens, 1)

    def to(self, device: torch.device | str) -> "PrefixTree":
        """The tree with its tensors on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def fill_packs(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Distribute groups over packs of a token budget, largest first into the first that has room.

    Args:
        sizes: tokens of each group; for student and teacher together the larger of the two.
        max_tokens: of a pack; a group that is larger stands alone.

    Returns:
        The groups of each pack, ascending; packs by their first group.
    """
    if max_tokens < 1:
        raise ValueError(f"fill_packs: max_tokens must be at least 1; got {max_tokens}")
    packs: list[list[int]] = []
    room: list[int] = []
    for group in sorted(range(len(sizes)), key=lambda g: (-sizes[g], g)):
        place = next((p for p, left in enumerate(room) if sizes[group] <= left), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(max_tokens)
        packs[place].append(group)
        room[place] -= sizes[group]
    return sorted(sorted(pack) for pack in packs)


@dataclass
class _Node:
    parent: int
    start: int  # position of its first token
    ids: Tensor


def _arrays(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    if not len(sequences):
        raise ValueError("PrefixTree: sequences must hold at least one; got none")
    arrays = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
    for number, array in enumerate(arrays):
        if array.dim() != 1 or not len(array):
            raise ValueError(
                f"PrefixTree: a sequence is a list of at least one token id; got shape "
                f"{tuple(array.shape)} at {number}"
            )
    return arrays


def _masks(arrays: list[Tensor], train_mask: Sequence[Sequence[bool]] | None) -> list[Tensor]:
    if train_mask is None:
        masks = [torch.ones(len(array), dtype=torch.bool) for array in arrays]
    else:
        masks = [torch.tensor(mask, dtype=torch.bool) for mask in train_mask]
        if [len(mask) for mask in masks] != [len(array) for array in arrays]:
            raise ValueError(
                "PrefixTree: train_mask must hold a flag for each token; got lengths "
                f"{[len(m) for m in masks]} for sequences of {[len(a) for a in arrays]}"
            )
    for mask in masks:
        mask[0] = False  # nothing before it predicts it
    return masks


def _shared(arrays: list[Tensor], min_share: int) -> tuple[list[_Node], list[list[int]]]:
    """The nodes in depth-first order, and the nodes of each sequence's path.

    A run is shared where at least `min_share` tokens below the run before it are; siblings stand in
    the order of their first sequence.
    """
    order = sorted(range(len(arrays)), key=lambda s: arrays[s].tolist())
    common = [_common(arrays[a], arrays[b]) for a, b in itertools.pairwise(order)]
    nodes: list[_Node] = []
    paths: list[list[int]] = [[] for _ in arrays]
    stack = [(0, len(order), -1, 0)]  # order[low:high] share the first `depth` tokens, in `parent`
    while stack:
        low, high, parent, depth = stack.pop()
        cuts = [i + 1 for i in range(low, high - 1) if common[i] < depth + min_share]
        if cuts:
            runs = itertools.pairwise([low, *cuts, high])
            last_first = sorted(runs, key=lambda run: -min(order[slice(*run)]))
            stack.extend((*run, parent, depth) for run in last_first)
            continue
        members = order[low:high]
        end = min(common[low : high - 1], default=len(arrays[members[0]]))
        for sequence in members:
            paths[sequence].append(len(nodes))
        nodes.append(_Node(parent, depth, arrays[members[0]][depth:end]))
        low += sum(len(arrays[sequence]) == end for sequence in members)  # they end here
        if low < high:
            stack.append((low, high, len(nodes) - 1, end))
    return nodes, paths


def _common(left: Tensor, right: Tensor) -> int:
    """How many tokens two sequences share from the beginning."""
    length = min(len(left), len(right))
    differ = (left[:length] != right[:length]).nonzero()
    return int(differ[0]) if len(differ) else length


def _assemble(
    nodes: list[_Node],
    paths: list[list[int]],
    arrays: list[Tensor],
    masks: list[Tensor],
    apart: int,
) -> PrefixTree:
    lengths = torch.tensor([len(node.ids) for node in nodes])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    starts = bounds.tolist()
    ends = starts[1:]  # of each node's subtree
    for number in range(len(nodes) - 1, -1, -1):
        if (parent := nodes[number].parent) >= 0:
            ends[parent] = max(ends[parent], ends[number])
    shifts = torch.tensor([node.start for node in nodes]) - bounds[:-1]
    rows, targets = [], []
    for path, array, mask in zip(paths, arrays, masks, strict=True):
        places = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in path])
        rows.append(places[:-1][mask[1:]])
        targets.append(array[mask])
    return PrefixTree(
        input_ids=torch.cat([node.ids for node in nodes]),
        position_ids=torch.arange(starts[-1]) + shifts.repeat_interleave(lengths),
        cu_seqlens=bounds.int(),
        parent=torch.tensor([node.parent for node in nodes], dtype=torch.int32),
        kv_end=torch.tensor(ends, dtype=torch.int32).repeat_interleave(lengths),
        logits_index=torch.cat(rows),
        target_ids=torch.cat(targets),
        num_tokens_apart=apart,
    )
