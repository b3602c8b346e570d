"""policy_head against the reference in float64: every backend, output, gradient and dtype.

Legend: N tokens, D hidden, V vocabulary, K top-k.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdfast import TeacherHidden, TeacherTopK, policy_head, topk_head
from fdfast.divergences import TABLE, TAILS
from tests.helpers import (
    BACKENDS,
    BACKENDS_AND_DTYPES,
    BACKENDS_AND_DTYPES_F16_SLOW,
    BACKENDS_TRITON_SLOW,
    DIVERGENCES_AND_TEACHERS,
    F32,
    F64,
    FAST_BACKENDS,
    FLOAT64_BACKENDS,
    TEACHERS,
    Case,
    assert_close_to_truth,
    assert_right,
    draw_case,
    floor_of,
    make_case,
    run,
    widest_of,
)

TINY_MB = 0.03  # 30 KiB: a few tokens of V = 1,000 a chunk, and many vocabulary blocks

# N, D, V, workspace.
SHAPES = {
    "aligned": (16, 32, 128, 64.0),  # powers of two: no tail anywhere
    "odd": (7, 13, 101, 64.0),  # primes: a tail of every loop and vector
    "one": (1, 1, 1, 64.0),  # the smallest: one token of a vocabulary of one
    "two": (2, 3, 2, 64.0),
    "tall": (1500, 4, 9, 64.0),  # more tokens than a chunk (1024)
    "blocks": (33, 8, 1009, TINY_MB),  # many chunks, many vocabulary blocks, none even
    "strips": (3, 4, 4097, 64.0),  # one more than a strip of the float sums (4096)
    "smollm2": (5, 8, 49_152, 64.0),  # a real vocabulary
    "gpt2": (3, 8, 50_257, 0.5),  # a real odd one, a token at a time
}


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize(("divergence", "teacher"), DIVERGENCES_AND_TEACHERS)
def test_every_divergence_teacher_and_dtype_is_right(
    backend: str, dtype: torch.dtype, divergence: str, teacher: str
) -> None:
    case = make_case(1, dtype=dtype, teacher=teacher, divergence=divergence, alpha=0.3)
    assert_right(case, backend)


@pytest.mark.parametrize("backend", BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("teacher", ["none", "hidden", "topk-bucket"])
def test_every_shape_is_right(backend: str, shape: str, teacher: str) -> None:
    N, D, V, workspace_mb = SHAPES[shape]
    case = make_case(2, (N,), D, V, teacher=teacher, K=min(5, V), spread=2.0)
    assert_right(case, backend, workspace_mb=workspace_mb)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES_F16_SLOW)
@pytest.mark.parametrize(("divergence", "teacher"), DIVERGENCES_AND_TEACHERS)
def test_many_blocks_with_every_option_at_once_are_right(
    backend: str, dtype: torch.dtype, divergence: str, teacher: str
) -> None:
    # Two leading dimensions, a third masked, both temperatures, softcap, bias, a workspace that
    # cuts tokens and vocabulary (V = 311 is prime).
    case = make_case(
        3,
        (3, 9),
        10,
        311,
        dtype=dtype,
        teacher=teacher,
        D_teacher=6 if teacher != "none" else None,
        masked=0.3,
        spread=3.0,
        divergence=divergence,
        alpha=0.7,
        temperature=0.7,
        logit_softcap=5.0,
        workspace_mb=0.04,
    )
    if isinstance(case.options.get("teacher"), TeacherHidden):
        case = case.having(teacher=_tempered(case.options["teacher"], 1.3))
    ours = assert_right(case, backend)
    masked = ~case.options["mask"]
    for name in ("logprobs", "entropy", "divergence", "teacher_mass", "argmax"):
        assert (ours[name][masked] == 0).all(), name
    assert (ours["dhidden"][masked] == 0).all()


def _tempered(teacher: TeacherHidden, temperature: float) -> TeacherHidden:
    return TeacherHidden(teacher.hidden, teacher.weight, teacher.bias, temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("only", [0, 1, 2])
@pytest.mark.parametrize("teacher", TEACHERS[1:])
def test_each_output_alone_has_its_own_gradient(backend: str, only: int, teacher: str) -> None:
    case = make_case(4, teacher=teacher, dtype=widest_of(backend))
    zero = torch.zeros_like(case.upstream[0])
    upstream = [zero, zero, zero]
    upstream[only] = case.upstream[only]
    case.upstream = (upstream[0], upstream[1], upstream[2])
    assert_right(case, backend)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", TABLE)
def test_gradcheck_in_float64(backend: str, teacher: str, divergence: str) -> None:
    case = make_case(
        5,
        (3,),
        3,
        11,
        dtype=F64,
        teacher=teacher,
        K=4,
        divergence=divergence,
        alpha=0.4,
        temperature=1.4,
        logit_softcap=3.0,
    )
    options = case.options | {"mask": torch.tensor([True, False, True]), "backend": backend}

    def outputs(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, weight, bias = leaves
        return policy_head(hidden, weight, case.targets, **options | {"bias": bias})[:3]

    leaves = [case.hidden, case.weight, case.options["bias"]]
    assert torch.autograd.gradcheck(outputs, [x.clone().requires_grad_() for x in leaves])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("closeness", [1e-2, 1e-4])
def test_a_small_divergence_keeps_its_relative_accuracy(
    backend: str, divergence: str, closeness: float
) -> None:
    # Teacher and student differ by one paragraph of prompt: the divergence is a small difference of
    # large numbers. At a distance of 1e-4 its value is 1e-8, below the rounding of sum p (t - s),
    # which gives 20 times the truth in float32. The bound is the conditioning of the logits alone,
    # eps * |logit| / closeness.
    case = make_case(6, (8,), 16, 503, teacher="hidden", closeness=closeness, divergence=divergence)
    case.upstream = (torch.zeros(8).double(), torch.zeros(8).double(), torch.ones(8).double())
    ours, truth = run(case, backend), run(case.double(), "reference")
    bound = 2e-5 + 3e-7 / closeness
    for name in ("divergence", "dhidden", "dweight"):
        off = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert off <= bound, f"{name}: relative error {off:.2e}, bound {bound:.2e}"
    assert (ours["divergence"] >= 0).all()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("divergence", TABLE)
def test_an_identical_teacher_is_at_zero(backend: str, dtype: torch.dtype, divergence: str) -> None:
    case = make_case(
        7, (9,), 16, 211, dtype=dtype, teacher="hidden", closeness=0.0, divergence=divergence
    )
    case.upstream = (torch.zeros(9).double(), torch.zeros(9).double(), torch.ones(9).double())
    rounding = floor_of(dtype)
    ours = run(case, backend)
    for name in ("dhidden", "dweight", "dbias"):
        assert ours[name].abs().max() <= rounding, name
    if backend in FAST_BACKENDS:  # not a rounding: the same rows give nothing at all
        assert (ours["divergence"] == 0.0).all()
        assert all((ours[name] == 0.0).all() for name in ("dhidden", "dweight", "dbias"))
    else:
        assert ours["divergence"].abs().max() <= rounding

    top = topk_head(case.hidden, case.weight, 6, bias=case.options["bias"])
    ours = run(case, backend, teacher=TeacherTopK(top.ids, top.logprobs), tail="bucket")
    for name in ("divergence", "dhidden", "dweight", "dbias"):
        assert ours[name].abs().max() <= 4 * rounding, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("K", [1, 83])
def test_a_top_k_of_one_and_of_the_whole_vocabulary_are_right(
    backend: str, tail: str, divergence: str, K: int
) -> None:
    case = make_case(8, V=83, teacher=f"topk-{tail}", K=K, divergence=divergence)
    ours = assert_right(case, backend)
    if K == 1 and tail == "renormalize":  # one outcome: nothing to tell apart
        assert (ours["divergence"] == 0).all()
    if K == 83:  # whatever the tail, this is the divergence to the whole teacher
        full = make_case(8, V=83, teacher="hidden", divergence=divergence)
        whole = run(full, "reference")
        for name in ("divergence", "dhidden", "dweight", "dbias"):
            assert_close_to_truth(ours[name], whole[name], whole[name], 1e-5, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", TABLE)
def test_a_peaked_teacher_has_a_finite_bucket(backend: str, divergence: str) -> None:
    # Its K float32 probabilities sum to 1 and a rounding: the tail's log must not be -inf.
    case = make_case(9, (1,), V=20, divergence=divergence, tail="bucket")
    logprobs = torch.tensor([[0.0, -19.0, -21.0]])
    case = case.having(teacher=TeacherTopK(torch.tensor([[3, 1, 2]]), logprobs))
    for name, value in run(case, backend).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES_F16_SLOW)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_masked_rows_may_hold_nan(backend: str, dtype: torch.dtype, teacher: str) -> None:
    case = make_case(10, (4, 5), dtype=dtype, teacher=teacher, masked=0.5)
    mask = case.options["mask"]
    clean = run(case, backend)
    junk = _with_junk(case, mask)
    ours = run(junk, backend)
    for name, value in clean.items():
        assert value.equal(ours[name]), name
    for numbers in (mask.long(), mask.to(F32)):
        assert run(junk, backend, mask=numbers)["dhidden"].equal(clean["dhidden"])


def _with_junk(case: Case, mask: torch.Tensor) -> Case:
    nan = float("nan")
    hidden = case.hidden.masked_fill(~mask[..., None], nan)
    targets = case.targets.masked_fill(~mask, -100)
    teacher: Any = case.options.get("teacher")
    if isinstance(teacher, TeacherHidden):
        theirs = teacher.hidden.masked_fill(~mask[..., None], nan)
        teacher = TeacherHidden(theirs, teacher.weight, teacher.bias)
    elif isinstance(teacher, TeacherTopK):
        teacher = TeacherTopK(
            teacher.ids.masked_fill(~mask[..., None], -1),
            teacher.logprobs.masked_fill(~mask[..., None], nan),
        )
    upstream = tuple(u.masked_fill(~mask, 1e30) for u in case.upstream)
    return Case(hidden, case.weight, targets, case.options | {"teacher": teacher}, upstream)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("grad_filter", [None, 0.1])
def test_no_tokens_give_empty_outputs_and_zero_gradients(
    backend: str, teacher: str, shape: tuple[int, ...], grad_filter: float | None
) -> None:
    ours = run(make_case(11, shape, teacher=teacher), backend, grad_filter=grad_filter)
    assert ours["logprobs"].shape == ours["argmax"].shape == shape
    assert ours["dhidden"].shape == (*shape, 24)
    assert (ours["dweight"] == 0).all()
    assert (ours["dbias"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("grad_filter", [None, 0.1])
def test_all_masked_give_zeros_everywhere(
    backend: str, teacher: str, grad_filter: float | None
) -> None:
    case = make_case(12, (2, 3), teacher=teacher)
    case = _with_junk(case, torch.zeros(2, 3, dtype=torch.bool))
    ours = run(case, backend, mask=torch.zeros(2, 3), grad_filter=grad_filter)
    for name, value in ours.items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_single_hidden_state_has_scalar_outputs(backend: str, teacher: str) -> None:
    one = make_case(13, (), teacher=teacher)
    ours = assert_right(one, backend)
    assert ours["logprobs"].shape == ()


@settings(max_examples=150)
@given(data=st.data())
def test_random_shapes_and_options_are_right_on_the_cpu(data: st.DataObject) -> None:
    assert_right(draw_case("cpu", data.draw), "cpu")


@settings(max_examples=12)  # the interpreter takes a second each
@given(data=st.data())
def test_random_shapes_and_options_are_right_in_triton(data: st.DataObject) -> None:
    pytest.importorskip("triton")
    assert_right(draw_case("triton", data.draw), "triton")
