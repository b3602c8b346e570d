"""Packs of sequences: every sequence is in its path, target for target, and what is alike is there
once.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdfast.packing import PrefixTree, fill_packs


def path_of(tree, row):
    """The tokens that row sees, in order: the mask by its definition."""
    tokens = torch.arange(row + 1)
    return tokens[row < tree.kv_end[: row + 1]]


def check(tree, sequences, masks):
    """The targets in order, each predicted from exactly the tokens before it."""
    expected = [
        (tuple(sequence[:t]), sequence[t])
        for sequence, mask in zip(sequences, masks, strict=True)
        for t in range(1, len(sequence))
        if mask[t]
    ]
    seen = [
        (tuple(tree.input_ids[path_of(tree, row)].tolist()), target)
        for row, target in zip(tree.logits_index.tolist(), tree.target_ids.tolist(), strict=True)
    ]
    assert seen == expected
    for row in range(tree.num_tokens):
        path = path_of(tree, row)
        assert tree.position_ids[path].tolist() == list(range(len(path)))
    bounds = tree.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == tree.num_tokens
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert all(parent < node for node, parent in enumerate(tree.parent.tolist()))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_any_sequences_are_in_their_paths(sequences, min_share, rng):
    masks = [[rng.random() < 0.6 for _ in sequence] for sequence in sequences]
    tree = PrefixTree.from_sequences(sequences, masks, min_share, min_ratio=1.0)
    check(tree, sequences, masks)
    assert tree.num_tokens <= tree.num_tokens_apart == sum(map(len, sequences))
    apart = PrefixTree.from_sequences(sequences, masks, min_share, min_ratio=1e9)
    check(apart, sequences, masks)
    assert apart.parent.tolist() == [-1] * len(sequences)
    if min_share == 1:  # nothing is there twice below the same tokens
        prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
        assert tree.num_tokens == len(prefixes)


def test_a_group_is_a_prompt_with_its_completions():
    prompt, feedback = list(range(100, 140)), [list(range(i, i + 40)) for i in (200, 300)]
    completions = [[1, 2, 3], [1, 2, 4], [5]]
    student = PrefixTree.from_sequences([prompt + c for c in completions])
    assert student.cu_seqlens.tolist() == [0, 40, 43, 46, 47]
    assert student.parent.tolist() == [-1, 0, 0, 0]
    assert student.kv_end.tolist() == [47] * 40 + [43] * 3 + [46] * 3 + [47]
    assert student.ratio == (3 * 40 + 7) / 47
    sequences = [prompt + f + c for f, c in zip([*feedback, feedback[1]], completions, strict=True)]
    masks = [[False] * 80 + [True] * len(c) for c in completions]
    teacher = PrefixTree.from_sequences(sequences, masks)
    assert teacher.parent.tolist() == [-1, 0, 0, 2, 2]
    assert teacher.target_ids.tolist() == [1, 2, 3, 1, 2, 4, 5]
    masks = [[False] * 40 + [True] * len(c) for c in completions]
    student = PrefixTree.from_sequences([prompt + c for c in completions], masks)
    assert student.target_ids.tolist() == teacher.target_ids.tolist()
    assert student.logits_index.tolist() == [39, 40, 41, 39, 43, 44, 39]


def test_too_little_in_common_is_not_shared():
    sequences = [[7] * 31 + [1] * 5, [7] * 31 + [2] * 5]
    assert PrefixTree.from_sequences(sequences).parent.tolist() == [-1, -1]
    assert PrefixTree.from_sequences(sequences, min_share=31).parent.tolist() == [-1, 0, 0]
    sequences = [[7] * 40 + [i] * 2000 for i in range(2)]  # saves 1 %
    assert PrefixTree.from_sequences(sequences).parent.tolist() == [-1, -1]
    # 10 tokens in common are too few, the 60 that two of them share are not
    sequences = [[1] * 10 + [2] * 50 + [3], [1] * 10 + [2] * 50 + [4], [1] * 10 + [5] * 9]
    tree = PrefixTree.from_sequences(sequences)
    assert tree.cu_seqlens.tolist() == [0, 60, 61, 62, 81]
    assert tree.parent.tolist() == [-1, 0, 0, -1]


def test_long_chains_need_no_recursion():
    sequences = [[1] * n for n in range(1, 1500)]
    tree = PrefixTree.from_sequences(sequences, min_share=1)
    assert tree.num_tokens == 1499


def test_packs_are_filled_first_fit_decreasing():
    assert fill_packs([5, 9, 4, 3, 20], 10) == [[0, 2], [1], [3], [4]]
    assert fill_packs([], 10) == []
    with pytest.raises(ValueError, match="max_tokens must be at least 1; got 0"):
        fill_packs([1], 0)


@pytest.mark.parametrize(
    ("sequences", "options", "said"),
    [
        ([], {}, "at least one; got none"),
        ([[1], []], {}, r"at least one token id; got shape \(0,\) at 1"),
        ([[1, 2]], {"train_mask": [[True]]}, r"got lengths \[1\] for sequences of \[2\]"),
        ([[1, 2]], {"min_share": 0}, "min_share must be at least 1; got 0"),
    ],
)
def test_bad_input_is_named(sequences, options, said):
    with pytest.raises(ValueError, match=said):
        PrefixTree.from_sequences(sequences, **options)
