"""prefix_attention in Triton against dense masks, under the interpreter or on a GPU.

Legend: T tokens, H query heads, G key and value heads, D head size.
"""

import dataclasses
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fdfast.kernels import prefix_attention, prefix_attention_tiles
from fdfast.kernels.prefix_attention_tiles import AttentionTile
from tests.forests import Forest, dense_attention, dense_mask, forest, random_forest
from tests.helpers import (
    BF16,
    DEVICES,
    F16,
    F32,
    F64,
    assert_close_to_truth,
    floor_of,
    generator,
)

DEVICE = DEVICES["triton"]
NAMES = ("out", "lse", "dq", "dk", "dv")

# Nodes' lengths and parents, in depth-first order. Tiles are of 32 tokens where nothing else is
# said, so all of these have tiles that no query sees, whole ones, and ends within a tile.
FORESTS = {
    # A prompt, and answers whose keys no other answer sees.
    "group": forest([70, 31, 40, 33], [-1, 0, 0, 0]),
    # A prompt, feedback, answers: three deep.
    "teacher": forest([70, 9, 31, 12, 25, 7, 40], [-1, 0, 1, 0, 3, 0, 5]),
    # Two groups, four levels, one token here and there, an empty node.
    "groups": forest([30, 1, 20, 0, 17, 44, 9, 1, 33], [-1, 0, 1, 1, 3, -1, 5, 6, 6]),
    # Nothing to share.
    "roots": forest([40, 1, 50], [-1, -1, -1]),
    "tokens": forest([1] * 40, [-1, *range(20), *[3] * 19]),
}


@dataclasses.dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.to(dtype) for x in vars(self).values()))


def make_inputs(
    T: int, H: int = 2, G: int = 1, D: int = 16, *, dtype: torch.dtype = F32, spread: float = 1.0
) -> Inputs:
    g = generator(7)
    shapes = ((T, H, D), (T, G, D), (T, G, D), (T, H, D))
    q, k, v, dout = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return Inputs(q * spread, k, v, dout)


def truth_of(inputs: Inputs, tree: Forest, window: int | None) -> dict[str, Tensor]:
    """What the dense mask gives in the dtype of the inputs."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    scale = inputs.q.shape[-1] ** -0.5
    out, lse = dense_attention(*leaves, dense_mask(tree, window), scale)
    gradients = torch.autograd.grad(out, leaves, inputs.dout)
    values = (out.detach(), lse.detach(), *gradients)
    return dict(zip(NAMES, values, strict=True))


def ours_of(inputs: Inputs, tree: Forest, window: int | None) -> dict[str, Tensor]:
    q, k, v, dout = (_moved(x) for x in vars(inputs).values())
    shared = (tree.tensors(DEVICE), inputs.q.shape[-1] ** -0.5, window)
    out, lse = prefix_attention.forward(q, k, v, *shared)
    assert (out.dtype, lse.dtype) == (q.dtype, F32)
    gradients = prefix_attention.backward(dout, q, k, v, out, lse, *shared)
    assert [x.dtype for x in gradients] == [q.dtype, k.dtype, v.dtype]
    values = (x.cpu() for x in (out, lse, *gradients))
    return dict(zip(NAMES, values, strict=True))


def _moved(tensor: Tensor) -> Tensor:
    """On the device, with its strides."""
    moved = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
    storage = tensor.untyped_storage().to(device=DEVICE)
    return moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def assert_right(inputs: Inputs, tree: Forest, window: int | None = None) -> dict[str, Tensor]:
    ours = ours_of(inputs, tree, window)
    same_dtype = truth_of(inputs, tree, window)
    truth = truth_of(inputs.to(F64), tree, window)
    dtype = inputs.q.dtype
    for name in NAMES:
        floor = floor_of(dtype) + (0.0 if name == "lse" else torch.finfo(dtype).eps)
        assert_close_to_truth(ours[name], same_dtype[name], truth[name], floor, name)
    return ours


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 under the interpreter, so that small forests have many."""
    for key in prefix_attention_tiles.INTERPRET:
        monkeypatch.setitem(prefix_attention_tiles.INTERPRET, key, AttentionTile(32, 32, 4, 1))


@pytest.mark.parametrize("window", [None, 1, 25])
@pytest.mark.parametrize("name", FORESTS)
def test_output_and_gradients_are_those_of_the_dense_mask(name: str, window: int | None) -> None:
    tree = FORESTS[name]
    assert_right(make_inputs(tree.num_tokens), tree, window)


@pytest.mark.parametrize("seed", range(4))
def test_random_forests(seed: int) -> None:
    tree = random_forest(random.Random(seed), num_nodes=12, max_length=35, min_length=seed % 2)
    assert_right(make_inputs(tree.num_tokens), tree, [None, 20][seed // 2])


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("H", "G", "D"),
    # One key head for all, SmolLM2's nine and three, one each; powers of two and two that are not.
    [(8, 1, 16), (9, 3, 64), (2, 2, 128), (2, 1, 256), (2, 1, 80), (4, 2, 96)],
)
def test_groups_of_heads_and_sizes_of_heads(H: int, G: int, D: int, dtype: torch.dtype) -> None:
    tree = forest([33, 1, 20, 5], [-1, 0, 1, 0])
    assert_right(make_inputs(tree.num_tokens, H, G, D, dtype=dtype), tree)


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 32), (16, 64)])
def test_tiles_need_not_be_square(
    block_q: int, block_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in prefix_attention_tiles.INTERPRET:
        tile = AttentionTile(block_q, block_k, 4, 1)
        monkeypatch.setitem(prefix_attention_tiles.INTERPRET, key, tile)
    tree = FORESTS["teacher"]
    for window in (None, 40):
        assert_right(make_inputs(tree.num_tokens), tree, window)


def test_strided_inputs() -> None:
    # Views of one projection's output, as a fused QKV gives, heads before tokens, and a dout whose
    # last dimension is not contiguous.
    tree, (H, G, D) = FORESTS["teacher"], (4, 2, 16)
    T = tree.num_tokens
    fused = torch.randn(T, (H + 2 * G) * D, generator=generator(3)).view(T, H + 2 * G, D)
    heads_first = torch.randn(G, T, D, generator=generator(4)).transpose(0, 1)
    dout = torch.randn(T, D, H, generator=generator(5)).transpose(1, 2)
    assert_right(Inputs(fused[:, :H], fused[:, H : H + G], heads_first, dout), tree, 30)


def test_peaked_scores() -> None:
    # Higher ones cost the backward digits, here and in FlashAttention: it takes them from a float32
    # log-sum-exp.
    tree = FORESTS["groups"]
    ours = assert_right(make_inputs(tree.num_tokens, spread=20.0), tree)
    assert ours["lse"].abs().max() > 50


@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one(T: int) -> None:
    tree = forest([T], [-1])
    inputs = make_inputs(T)
    if T == 1:
        assert_right(inputs, tree, 3)
        return
    for tensor in ours_of(inputs, tree, 3).values():
        assert tensor.numel() == 0


def test_nothing_leaks_into_another_branch() -> None:
    # The loss is of one answer alone: no gradient at all reaches the others' keys and values.
    tree = FORESTS["teacher"]
    inputs = make_inputs(tree.num_tokens)
    answer = tree.nodes[4]
    inputs.dout[: answer.start], inputs.dout[answer.end :] = 0.0, 0.0
    ours = assert_right(inputs, tree)
    seen = dense_mask(tree)[answer.start : answer.end].any(0)
    assert seen.any()
    for name in ("dk", "dv"):
        assert (ours[name][seen] != 0).any()
        assert (ours[name][~seen] == 0).all()


def test_results_repeat_to_the_bit() -> None:
    tree = FORESTS["groups"]
    inputs = make_inputs(tree.num_tokens, 4, 2)
    first, again = (ours_of(inputs, tree, None) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], again[name])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_row_is_what_it_is_without_the_branches_beside_it(dtype: torch.dtype) -> None:
    # Down to rounding: the tiles fall otherwise.
    tree = FORESTS["group"]
    inputs = make_inputs(tree.num_tokens, dtype=dtype)
    prompt, answer = tree.nodes[0], tree.nodes[3]
    rows = torch.cat([torch.arange(prompt.end), torch.arange(answer.start, answer.end)])
    alone = Inputs(*(x[rows] for x in vars(inputs).values()))
    packed = ours_of(inputs, tree, None)["out"][rows].float()
    separate = ours_of(alone, forest([len(rows)], [-1]), None)["out"].float()
    assert (packed - separate).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("window", [None, 1, 25])
@pytest.mark.parametrize(("block_q", "block_k"), [(32, 32), (64, 16), (16, 64)])
def test_lists_hold_every_tile_that_is_seen_and_without_a_window_no_other(
    block_q: int, block_k: int, window: int | None, by_key: bool
) -> None:
    tile = AttentionTile(block_q, block_k, 4, 1)
    for tree in FORESTS.values():
        T = tree.num_tokens
        lists = prefix_attention.tile_lists(
            tree.kv_end, tree.position_ids, tile, window, by_key=by_key
        )
        mask = dense_mask(tree, window)
        if by_key:
            mask = mask.T
        mine, theirs = (block_k, block_q) if by_key else (block_q, block_k)
        for row in range(len(lists.masked)):
            begin, masked, end = (
                int(lists.first[row]),
                int(lists.masked[row]),
                int(lists.first[row + 1]),
            )
            strip = mask[row * mine : (row + 1) * mine]
            seen = {
                c for c in range(-(-T // theirs)) if strip[:, c * theirs : (c + 1) * theirs].any()
            }
            listed = lists.tiles[begin:end].tolist()
            assert len(set(listed)) == len(listed)
            assert seen <= set(listed)
            if window is None:
                assert seen == set(listed)
            for column in lists.tiles[begin:masked].tolist():
                assert strip[:, column * theirs : (column + 1) * theirs].all()


def test_lists_are_made_once_for_a_tree_and_anew_when_it_changes() -> None:
    tree = forest([70, 31], [-1, 0])
    tile = AttentionTile(32, 32, 4, 1)

    def lists() -> prefix_attention.TileLists:
        return prefix_attention.tile_lists(tree.kv_end, tree.position_ids, tile, None)

    first = lists()
    assert lists() is first
    tree.kv_end[:70] = 70
    assert len(lists().tiles) < len(first.tiles)


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        ours_of(make_inputs(4, dtype=F64), forest([4], [-1]), None)
