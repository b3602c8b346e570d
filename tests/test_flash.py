"""The cascade over flash-attn, with stand-ins for the library: see flash_stand_in.py.

Legend: T tokens, H query heads, G key and value heads, D head size.
"""

import random
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from fdfast import flash
from fdfast.errors import MachineError
from tests import flash_stand_in
from tests.forests import Forest, dense_attention, dense_mask, forest, random_forest
from tests.helpers import BF16, F16, F32, F64, assert_close_to_truth, floor_of, generator

NAMES = ("out", "lse", "dq", "dk", "dv")
# A library: where it is imported from, its stand-in, and a GPU it is taken for.
LIBRARIES = {
    "2": ("flash_attn.flash_attn_interface", flash_stand_in.flash_2, 8),
    "3 at first": ("flash_attn_interface", flash_stand_in.flash_3_first, 9),
    "3": ("flash_attn_interface", flash_stand_in.flash_3, 9),
    "4": ("flash_attn.cute.interface", flash_stand_in.flash_4, 10),
}
FORESTS = {
    "group": forest([40, 11, 20, 13], [-1, 0, 0, 0]),
    "teacher": forest([30, 9, 21, 12, 15, 7, 20], [-1, 0, 1, 0, 3, 0, 5]),
    # Empty nodes: a root, one within, a leaf; nodes of one token.
    "empty nodes": forest([0, 5, 0, 7, 1, 0, 9, 3], [-1, 0, 1, 2, 2, 1, -1, 6]),
    "roots": forest([10, 1, 20], [-1, -1, -1]),
}


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """The stand-in as the only flash-attn there is, and a GPU it is for."""
    path, stand_in, major = LIBRARIES[name]
    for other, _, _ in LIBRARIES.values():
        monkeypatch.setitem(sys.modules, other, None)
    module = stand_in()
    monkeypatch.setitem(sys.modules, path, module)
    for parent in ("flash_attn", "flash_attn.cute"):
        if path.startswith(f"{parent}."):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(flash, "capability_of", lambda device: major)
    return module


def make_inputs(T: int, H: int = 4, G: int = 2, D: int = 16, dtype: torch.dtype = F16) -> Any:
    g = generator(11)
    shapes = ((T, H, D), (T, G, D), (T, G, D), (T, H, D))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def cascade(inputs: list[Tensor], tree: Forest, window: int | None) -> dict[str, Tensor]:
    q, k, v, dout = inputs
    shared = (tree.tensors(), q.shape[-1] ** -0.5, window)
    out, lse = flash.forward(q, k, v, *shared)
    gradients = flash.backward(dout, q, k, v, out, lse, *shared)
    assert [x.dtype for x in (out, *gradients)] == [q.dtype] * 4
    return dict(zip(NAMES, (out, lse, *gradients), strict=True))


def dense(inputs: list[Tensor], tree: Forest, window: int | None) -> dict[str, Tensor]:
    *leaves, dout = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    mask = dense_mask(tree, window)
    out, lse = dense_attention(*leaves, mask, leaves[0].shape[-1] ** -0.5)
    values = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))
    return dict(zip(NAMES, values, strict=True))


def assert_right(
    inputs: list[Tensor], tree: Forest, window: int | None = None
) -> dict[str, Tensor]:
    ours = cascade(inputs, tree, window)
    same_dtype = dense(inputs, tree, window)
    truth = dense([x.double() for x in inputs], tree, window)
    # Every part is rounded to 16 bits before it is added, so one unit a part is rounding.
    rounding = 2 * torch.finfo(inputs[0].dtype).eps
    for name in NAMES:
        floor = floor_of(F32) + (0.0 if name == "lse" else rounding)
        assert_close_to_truth(ours[name], same_dtype[name], truth[name], floor, name)
    return ours


@pytest.mark.parametrize("window", [None, 1, 12, 1000])
@pytest.mark.parametrize("tree", FORESTS.values(), ids=FORESTS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_cascade_is_the_dense_mask(
    name: str, tree: Forest, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, name)
    assert_right(make_inputs(tree.num_tokens), tree, window)


@pytest.mark.parametrize("seed", range(12))
def test_random_forests(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2")
    tree = random_forest(random.Random(seed), num_nodes=14, max_length=9, min_length=seed % 2)
    dtype = (F16, BF16)[seed % 3 % 2]
    assert_right(make_inputs(tree.num_tokens, dtype=dtype), tree, [None, 5, 30][seed % 3])


def test_one_call_for_the_nodes_and_one_a_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, "2")
    tree = FORESTS["teacher"]
    cascade(make_inputs(tree.num_tokens), tree, None)
    calls = [call["causal"] for call in module.calls if "causal" in call]
    assert calls == [True, False, False]
    assert len(module.calls) == 6  # as many in the backward
    module.calls.clear()
    cascade(make_inputs(tree.num_tokens), tree, 12)
    assert [call["left"] for call in module.calls if "left" in call] == [11]
    assert len(module.calls) == 2


def test_a_plan_is_made_once_for_a_forest() -> None:
    tree = FORESTS["teacher"]
    bounds, parent = tree.cu_seqlens, tree.parent
    assert flash.plan(bounds, parent, None) is not None
    first, _ = flash.plan(bounds, parent, None)
    assert flash.plan(bounds, parent, None)[0] is first
    parent[2] = 0
    assert flash.plan(bounds, parent, None)[0] is not first


def test_nothing_leaks_into_another_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2")
    tree = FORESTS["teacher"]
    inputs = make_inputs(tree.num_tokens)
    answer = tree.nodes[4]
    inputs[3][: answer.start], inputs[3][answer.end :] = 0.0, 0.0
    ours = assert_right(inputs, tree)
    seen = dense_mask(tree)[answer.start : answer.end].any(0)
    for name in ("dk", "dv"):
        assert (ours[name][~seen] == 0).all()


@pytest.mark.parametrize("empty", [float("inf"), -float("inf")])
def test_a_part_without_keys_changes_nothing(empty: float) -> None:
    g = generator(2)
    out, part_out = torch.randn(2, 5, 3, 4, generator=g).unbind()
    lse, part_lse = torch.randn(2, 3, 5, generator=g).unbind()
    whole = flash.merge(out, lse, part_out, part_lse)
    part_lse[:, 2], part_out[2] = empty, float("nan")
    merged, both = flash.merge(out, lse, part_out, part_lse)
    assert torch.equal(merged[2], out[2])
    assert torch.equal(both[:, 2], lse[:, 2])
    others = [0, 1, 3, 4]
    assert torch.equal(merged[others], whole[0][others])


def test_the_gradients_need_the_merged_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the docstring warns of: each part's own output and log-sum-exp give another dq.
    install(monkeypatch, "2")
    tree = FORESTS["group"]
    q, k, v, dout = make_inputs(tree.num_tokens)
    truth = dense([x.double() for x in (q, k, v, dout)], tree, None)
    library = flash.library(8)
    scale = q.shape[-1] ** -0.5
    (own, above), _ = flash.plan(tree.cu_seqlens, tree.parent, None)
    naive = torch.zeros_like(q)
    for part in (own, above):
        rows, keys = part.query_rows, part.key_rows
        out, lse = library.forward(q[rows], k[keys], v[keys], part, scale, None)
        given = (dout[rows], q[rows], k[keys], v[keys], out, lse)
        naive[rows] += library.backward(*given, part, scale, None)[0]
    error = (naive.double() - truth["dq"]).norm() / truth["dq"].norm()
    assert error > 0.1


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_backward_is_as_deterministic_as_torch_is_asked_to_be(
    name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, name)
    torch.use_deterministic_algorithms(deterministic)
    tree = FORESTS["group"]
    cascade(make_inputs(tree.num_tokens), tree, None)
    asked = [call["deterministic"] for call in module.calls if "deterministic" in call]
    assert asked == [deterministic] * 2


def test_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2")
    tree = forest([0], [-1])
    ours = cascade(make_inputs(0), tree, None)
    assert ours["out"].shape == ours["dq"].shape == (0, 4, 16)
    assert ours["lse"].shape == (4, 0)


def test_without_a_gpu_or_the_library_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = FORESTS["group"]
    with pytest.raises(MachineError, match="wants tensors on an NVIDIA GPU; got one on cpu"):
        cascade(make_inputs(tree.num_tokens), tree, None)
    with pytest.raises(TypeError, match=r"float16 or bfloat16; got torch\.float32"):
        cascade(make_inputs(tree.num_tokens, dtype=F32), tree, None)
    with pytest.raises(MachineError, match="multiples of 8 up to 256; got 12"):
        cascade(make_inputs(tree.num_tokens, D=12), tree, None)
    for path, _, _ in LIBRARIES.values():
        monkeypatch.setitem(sys.modules, path, None)
    with pytest.raises(MachineError, match="pip install flash-attn") as caught:
        flash.library(9)
    assert "\n" not in str(caught.value)
    with pytest.raises(MachineError, match=r"wants compute capability 8\.0; this GPU has 7\.x"):
        flash.library(7)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, "2")

    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, window_size=(-1, -1)):  # as in 2.4
        raise AssertionError

    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    with pytest.raises(MachineError, match="takes no softcap, window_size_left: another version"):
        flash.library(8)
    del module._flash_attn_varlen_forward
    with pytest.raises(MachineError, match="has no _flash_attn_varlen_forward"):
        flash.library(8)


def test_float64_truth_is_the_reference() -> None:
    # The dense reference of this file against torch's own attention.
    tree = FORESTS["teacher"]
    q, k, v, _ = (x.to(F64) for x in make_inputs(tree.num_tokens))
    out, _ = dense_attention(q, k, v, dense_mask(tree), 0.25)
    heads = [
        x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    ]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=dense_mask(tree), scale=0.25
    )
    assert (out - theirs[0].transpose(0, 1)).abs().max() < 1e-12
