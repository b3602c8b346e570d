"""topk_head against torch.topk of stored logits, on every backend.

Legend: N tokens, D hidden, V vocabulary, K top-k.
"""

import re
from typing import Any

import pytest
import torch

from fdfast import InputError, TeacherHidden, TeacherTopK, policy_head, topk_head
from tests.helpers import (
    BACKENDS,
    BACKENDS_AND_DTYPES,
    BF16,
    F32,
    F64,
    FAST_BACKENDS,
    assert_close_to_truth,
    backends_in,
    floor_of,
    make_case,
    widest,
    widest_of,
)


def stored(hidden: torch.Tensor, weight: torch.Tensor, k: int, **options: Any) -> Any:
    """ids, logprobs and mass the plain way, in float64."""
    z = hidden.double() @ weight.double().T
    if options.get("bias") is not None:
        z = z + options["bias"].double()
    top = (z / options.get("temperature", 1.0)).log_softmax(-1).topk(k, -1)
    return top.indices, top.values, top.values.exp().sum(-1)


# (...), D, V, k, workspace: odd; one; every token; many chunks and blocks; a real vocabulary.
SHAPES = {
    "odd": ((7,), 13, 101, 5, 64.0),
    "one": ((1,), 1, 1, 1, 64.0),
    "whole vocabulary": ((3,), 8, 37, 37, 64.0),
    "first": ((5,), 8, 37, 1, 64.0),
    "blocks": ((3, 17), 8, 1009, 25, 0.07),
    "no leading": ((), 8, 37, 4, 64.0),
    "gpt2": ((3,), 8, 50_257, 25, 0.5),
}
SHAPES_AND_BACKENDS = [
    pytest.param(
        shape, *row, marks=[pytest.mark.slow] if (shape, row[0]) == ("gpt2", "triton") else []
    )
    for shape in SHAPES
    for row in BACKENDS_AND_DTYPES
]


@pytest.mark.parametrize(("shape", "backend", "dtype"), SHAPES_AND_BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_is_torchs_topk_of_stored_logits(
    backend: str, dtype: torch.dtype, shape: str, bias: bool, temperature: float
) -> None:
    leading, D, V, k, workspace_mb = SHAPES[shape]
    case = make_case(70, leading, D, V, dtype=dtype, bias=bias, spread=2.0)
    options = {"bias": case.options.get("bias"), "temperature": temperature}
    ids, logprobs, mass = stored(case.hidden, case.weight, k, **options)
    same = topk_head(case.hidden, case.weight, k, backend="reference", **options)
    ours = topk_head(
        case.hidden, case.weight, k, backend=backend, workspace_mb=workspace_mb, **options
    )
    assert ours.ids.shape == ours.logprobs.shape == (*leading, k)
    assert ours.mass.shape == leading
    assert ours.logprobs.dtype == ours.mass.dtype == widest(dtype)
    floor = floor_of(dtype)
    assert_close_to_truth(ours.logprobs, same.logprobs, logprobs, floor, "logprobs")
    assert_close_to_truth(ours.mass, same.mass, mass, floor, "mass")
    if dtype == F64:
        assert ours.ids.equal(ids)
    # Near ties may fall either way in float32: what matters is that the ids bear these logprobs.
    every = stored(case.hidden, case.weight, V, **options)
    of_all = torch.zeros(*leading, V, dtype=F64).scatter(-1, every[0], every[1])
    at_ids = of_all.gather(-1, ours.ids)
    assert_close_to_truth(ours.logprobs, same.logprobs, at_ids, floor, "logprobs at ids")
    assert (ours.logprobs.diff(dim=-1) <= 0).all()
    assert (ours.ids.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_empty_results(backend: str) -> None:
    for leading in ((0,), (2, 0), (0, 3)):
        case = make_case(71, leading)
        top = topk_head(case.hidden, case.weight, 4, backend=backend)
        assert top.ids.shape == top.logprobs.shape == (*leading, 4)
        assert top.mass.shape == leading


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_vocabulary_has_all_the_mass_and_one_token_its_own(backend: str) -> None:
    dtype = widest_of(backend)
    case = make_case(72, dtype=dtype)
    every = topk_head(case.hidden, case.weight, 83, backend=backend)
    assert (every.mass - 1).abs().max() < 64 * torch.finfo(dtype).eps
    one = topk_head(case.hidden, case.weight, 1, backend=backend)
    torch.testing.assert_close(
        one.mass, one.logprobs.squeeze(-1).exp(), rtol=4 * torch.finfo(dtype).eps, atol=0.0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_ten_thousand_and_forbidden_tokens_are_right(backend: str) -> None:
    z = (make_case(73, (4,), 32, 2).hidden * 64).round() / 64
    z = z + torch.where(torch.arange(32) % 2 == 0, 1e4, -1e4)
    bias = torch.zeros(32).masked_fill(torch.arange(32) < 6, -torch.inf)
    ours = topk_head(z, torch.eye(32), 13, bias=bias, backend=backend)
    ids, logprobs, mass = stored(z, torch.eye(32), 13, bias=bias)
    assert ours.ids.equal(ids)
    assert_close_to_truth(ours.logprobs, logprobs.float(), logprobs, floor_of(F32), "logprobs")
    assert_close_to_truth(ours.mass, mass.float(), mass, floor_of(F32), "mass")
    assert not (ours.ids < 6).any()


@pytest.mark.parametrize(("backend", "dtype"), backends_in(F64, F32, BF16, triton_slow=True))
def test_its_result_is_a_teacher(backend: str, dtype: torch.dtype) -> None:
    # The whole vocabulary of it is the divergence to the hidden states themselves.
    case = make_case(74, (2, 5), dtype=dtype, teacher="hidden")
    theirs: TeacherHidden = case.options["teacher"]
    top = topk_head(theirs.hidden, theirs.weight, 83, bias=theirs.bias, backend=backend)
    options = {"bias": case.options["bias"], "backend": backend}
    for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        one, other = (
            policy_head(
                case.hidden,
                case.weight,
                case.targets,
                teacher=teacher,
                divergence=divergence,
                **options,
            ).divergence
            for teacher in (theirs, TeacherTopK(top.ids, top.logprobs))
        )
        assert torch.allclose(one, other, rtol=1e-4 if dtype != F64 else 1e-12, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_gives_no_gradient_and_changes_no_input(backend: str) -> None:
    case = make_case(75)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    before = hidden.detach().clone(), weight.detach().clone()
    top = topk_head(hidden, weight, 3, temperature=0.5, backend=backend)
    assert not any(x.requires_grad for x in top)
    assert hidden.equal(before[0])
    assert weight.equal(before[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_strides_change_nothing(backend: str) -> None:
    case = make_case(76, (4, 5))
    plain = topk_head(case.hidden, case.weight, 3, backend=backend)
    with torch.autocast("cpu", dtype=BF16):
        other = topk_head(case.hidden, case.weight, 3, backend=backend)
    assert all(a.equal(b) for a, b in zip(plain, other, strict=True))
    hidden = case.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    weight = case.weight.T.contiguous().T
    strided = topk_head(hidden, weight, 3, backend=backend)
    assert strided.ids.equal(plain.ids)
    assert torch.allclose(strided.logprobs, plain.logprobs, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must lie in [1, 83]"),
        ({"k": 84}, "got 84"),
        ({"temperature": 0.0}, "temperature must be positive and finite; got 0.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"workspace_mb": -1.0}, "workspace_mb must be positive"),
        ({"bias": torch.zeros(3)}, "bias must have shape (83,); got (3,)"),
        ({"weight": torch.zeros(83, 3)}, "got (83, 3)"),
        ({"weight": torch.zeros(24)}, "weight must have shape (V, D)"),
        ({"hidden": torch.zeros(())}, "weight must have shape (V, D)"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(backend: str, change: dict[str, Any], message: str) -> None:
    case = make_case(77)
    arguments = {"hidden": case.hidden, "weight": case.weight, "k": 3, "backend": backend}
    with pytest.raises(ValueError, match=re.escape(message)) as seen:
        topk_head(**arguments | change)
    assert str(seen.value).startswith("topk_head: ")


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_workspace_too_small_says_what_would_do(backend: str) -> None:
    case = make_case(78, V=5_000)
    with pytest.raises(InputError, match=r"topk_head: .* holds not even one") as seen:
        topk_head(case.hidden, case.weight, 3, workspace_mb=0.004, backend=backend)
    advice = re.search(r"give workspace_mb=(\S+) or more", str(seen.value))
    assert advice is not None
    topk_head(case.hidden, case.weight, 3, workspace_mb=float(advice[1]), backend=backend)
