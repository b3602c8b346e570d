"""Prefix attention against a dense mask: every part's gradient stands on the merged output."""

import random

import pytest
import torch
from torch.autograd import gradcheck

from fdfast.errors import MachineError
from fdfast.packing import PrefixTree
from fdfast.prefix_attention import prefix_attention
from tests.forests import Forest, dense_attention, dense_mask, forest, random_forest

FORESTS = {
    "a prompt with completions": forest([70, 20, 31, 1, 9], [-1, 0, 0, 0, 0]),
    "feedback between": forest([40, 9, 31, 9, 31], [-1, 0, 1, 0, 3]),
    "two groups, four levels": forest(
        [30, 12, 20, 5, 17, 44, 9, 20, 33], [-1, 0, 1, 1, 0, -1, 5, 6, 6]
    ),
    "nodes of one token": forest([1, 1, 1, 50, 1, 2], [-1, 0, 1, 0, 3, 3]),
    "nothing shared": forest([20, 1, 31], [-1, -1, -1]),
    "one token": forest([1], [-1]),
    "no token": forest([], []),
} | {f"random {seed}": random_forest(random.Random(seed)) for seed in range(6)}


def tree_of(made: Forest) -> PrefixTree:
    T = made.num_tokens
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.zeros(T, dtype=torch.int64)
    return PrefixTree(
        ids, made.position_ids, made.cu_seqlens, made.parent, made.kv_end, none, none, T
    )


def inputs(T: int, H: int, K: int, E: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Not contiguous, as a model's heads are views of its projections."""
    torch.manual_seed(0)
    return tuple(
        torch.randn(h, T, E, dtype=torch.float64).to(dtype).transpose(0, 1).requires_grad_()
        for h in (H, K, K)
    )


def with_gradients(out: torch.Tensor, wanted: tuple[torch.Tensor, ...], seed: int = 1):
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return (out, *torch.autograd.grad(out, wanted, dout))


def error(seen: torch.Tensor, truth: torch.Tensor) -> float:
    seen, truth = seen.detach().double(), truth.detach()
    return float((seen - truth).norm() / truth.norm().clamp(min=1e-30))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("name", FORESTS)
def test_float64_is_the_dense_formula(name, H, K, window, backend):
    made = FORESTS[name]
    qkv = inputs(made.num_tokens, H, K, 16, torch.float64)
    truth, _ = dense_attention(*qkv, dense_mask(made, window), 0.25)
    seen = prefix_attention(*qkv, tree_of(made), scale=0.25, sliding_window=window, backend=backend)
    assert seen.dtype == torch.float64
    for ours, right in zip(with_gradients(seen, qkv), with_gradients(truth, qkv), strict=True):
        assert torch.allclose(ours, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("E", [64, 80, 128, 256])
def test_narrow_dtypes_are_as_exact_as_pytorch(E, window, dtype):
    """At most twice the error of PyTorch's own attention with a dense mask, in the same dtype."""
    made = FORESTS["two groups, four levels"]
    qkv = inputs(made.num_tokens, 6, 2, E, dtype)
    wide = tuple(x.detach().double().requires_grad_() for x in qkv)
    mask = dense_mask(made, window)
    truth, _ = dense_attention(*wide, mask, E**-0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in qkv), attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)
    ours = prefix_attention(*qkv, tree_of(made), sliding_window=window, backend="cpu")
    right = with_gradients(truth, wide)
    for seen, peer, truth in zip(
        with_gradients(ours, qkv), with_gradients(theirs, qkv), right, strict=True
    ):
        assert seen.dtype == dtype
        assert error(seen, truth) <= 2 * error(peer, truth) + 1e-7


@pytest.mark.parametrize("window", [None, 25])
def test_the_kernels_are_reached_by_name(window):
    made = FORESTS["feedback between"]
    qkv = inputs(made.num_tokens, 4, 2, 32, torch.float32)
    tree, options = tree_of(made), {"sliding_window": window}
    truth = with_gradients(prefix_attention(*qkv, tree, backend="cpu", **options), qkv)
    seen = with_gradients(prefix_attention(*qkv, tree, backend="triton", **options), qkv)
    for ours, right in zip(seen, truth, strict=True):
        assert error(ours, right.detach().double()) < 1e-5


def test_gradcheck():
    made = forest([5, 3, 4, 2, 6], [-1, 0, 1, 1, 0])
    for window in (None, 4):
        qkv = inputs(made.num_tokens, 4, 2, 8, torch.float64)
        assert gradcheck(
            lambda *x, w=window: prefix_attention(*x, tree_of(made), sliding_window=w), qkv
        )


def test_autograd_through_a_merge_of_parts_would_be_wrong():
    """Why there is a backward pass of our own: a merge outside it gives right outputs alone."""
    made = FORESTS["a prompt with completions"]
    q, k, v = qkv = inputs(made.num_tokens, 4, 4, 16, torch.float64)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def part(queries, keys, causal):
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q[queries], k[keys], v[keys]))
        out, lse = flash(*heads, 0.0, causal)
        return out[0].transpose(0, 1), lse[0].T.detach().unsqueeze(-1)

    outs = []
    for start, end, parent in made.nodes:
        out, lse = part(slice(start, end), slice(start, end), True)
        if parent >= 0:
            above, above_lse = part(slice(start, end), slice(0, 70), False)
            out = out + torch.sigmoid(above_lse - lse) * (above - out)
        outs.append(out)
    naive = torch.cat(outs)
    truth = with_gradients(dense_attention(*qkv, dense_mask(made), 0.25)[0], qkv)
    seen = with_gradients(naive, qkv)
    assert error(seen[0], truth[0]) < 1e-12
    assert error(seen[1], truth[1]) > 1e-2
    assert error(seen[2], truth[2]) > 1e-2


def test_no_gradient_leaks_into_another_branch():
    made = forest([40, 8, 16, 9, 20], [-1, 0, 1, 0, 3])
    qkv = inputs(made.num_tokens, 4, 2, 16, torch.float32)
    for backend in ("cpu", "reference"):
        out = prefix_attention(*qkv, tree_of(made), backend=backend)
        for gradient in torch.autograd.grad(out[48:64].square().sum(), qkv):
            assert gradient[64:].abs().max() == 0
            assert gradient[48:64].abs().max() > 0


def test_another_tree_is_no_other_program():
    """torch.compile compiles once, and gives what eager gives."""
    compiled = 0

    def count(graph, _example):
        nonlocal compiled
        compiled += 1
        return graph

    attend = torch.compile(prefix_attention, backend=count, fullgraph=True, dynamic=True)
    for seed in range(5):
        made = random_forest(random.Random(seed))
        qkv = inputs(made.num_tokens, 4, 2, 16, torch.float64)
        expected = prefix_attention(*qkv, tree_of(made))
        assert torch.equal(attend(*qkv, tree_of(made)), expected)
    assert compiled == 1


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"query": torch.zeros(3, 4)}, ValueError, r"query must be \(T, H, E\)"),
        ({"query": torch.zeros(3, 5, 8)}, ValueError, "heads that divides the query's"),
        ({"key": torch.zeros(3, 2, 8).double()}, TypeError, "one floating dtype"),
        ({"tree": tree_of(forest([2], [-1]))}, ValueError, "the query's 3 tokens; got 2"),
        ({"scale": 0.0}, ValueError, "scale must be positive; got 0.0"),
        ({"sliding_window": 0}, ValueError, "sliding_window must be positive; got 0"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, cpu, triton"),
        ({"backend": "flash"}, MachineError, "wants tensors on a CUDA GPU"),
    ],
)
def test_bad_input_is_named(change, error, said):
    good = {
        "query": torch.zeros(3, 4, 8),
        "key": torch.zeros(3, 2, 8),
        "value": torch.zeros(3, 2, 8),
        "tree": tree_of(forest([3], [-1])),
    }
    with pytest.raises(error, match=said):
        prefix_attention(**(good | change))
