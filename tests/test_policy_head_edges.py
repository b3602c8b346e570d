"""policy_head at the edges: extreme logits, layouts, frozen leaves, what is left alone.

Legend: N tokens, D hidden, V vocabulary, K top-k.
"""

from typing import Any

import pytest
import torch

from fdfast import TeacherHidden, TeacherTopK, policy_head
from fdfast.divergences import TABLE
from tests.helpers import (
    BACKEND_DTYPES,
    BACKENDS,
    BACKENDS_TRITON_SLOW,
    BF16,
    F32,
    F64,
    GRADIENTS,
    TEACHERS,
    Case,
    assert_close_to_truth,
    assert_right,
    backends_in,
    make_case,
    mixed,
    run,
    widest,
    widest_of,
)

INF = float("inf")


@pytest.mark.parametrize(("backend", "dtype"), backends_in(F64, F32))
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", TABLE)
def test_logits_of_ten_thousand_are_right(
    backend: str, teacher: str, divergence: str, dtype: torch.dtype
) -> None:
    # Half of the vocabulary near +1e4, half near -1e4. Multiples of 2^-6 leave no rounding in the
    # float32 logits, so what is seen is the statistics: a log-sum-exp of 1e4 has float32 steps of
    # 1e-3.
    N, V = 6, 64
    z = (make_case(20, (N,), V, 2).hidden * 64).round() / 64
    z = z + torch.where(torch.arange(V) % 2 == 0, 1e4, -1e4)
    near = (make_case(21, (N,), V, 2).hidden * 16).round() / 64
    case = _of_logits(z.to(dtype), teacher, (z + near).to(dtype), divergence)
    ours = assert_right(case, backend)
    assert all(value.isfinite().all() for value in ours.values())


def _of_logits(z: torch.Tensor, teacher: str, t: torch.Tensor, divergence: str) -> Case:
    """A case whose student has logits z and whose teacher t, through an identity for a weight."""
    N, V = z.shape
    eye = torch.eye(V, dtype=z.dtype)
    base = make_case(22, (N,), 1, V)
    options: dict[str, Any] = {"divergence": divergence, "alpha": 0.25}
    if teacher == "hidden":
        options["teacher"] = TeacherHidden(t, eye)
    elif teacher != "none":
        top = t.double().log_softmax(-1).topk(5, -1)
        options["teacher"] = TeacherTopK(top.indices, top.values.to(z.dtype))
        options["tail"] = teacher.removeprefix("topk-")
    return Case(z, eye, base.targets, options, base.upstream)


@pytest.mark.parametrize(("backend", "dtype"), backends_in(F64, F32))
@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("far", [95.0, 720.0, 800.0])
def test_teacher_and_student_may_disagree_utterly(
    backend: str, divergence: str, far: float, dtype: torch.dtype
) -> None:
    # e^-95 leaves float32, e^-720 is a subnormal float64 whose inverse is infinite, e^-800 is 0.
    z = torch.tensor([[0.0, -far, -3.0], [-far, 0.0, -1.0]], dtype=dtype)
    t = torch.tensor([[-far, 0.0, -2.0], [0.0, -5.0, -far]], dtype=dtype)
    case = _of_logits(z, "hidden", t, divergence)
    case.targets = torch.tensor([0, 2])
    ours = assert_right(case, backend)
    assert all(value.isfinite().all() for value in ours.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", TABLE)
def test_forbidden_tokens_are_right(backend: str, teacher: str, divergence: str) -> None:
    # A bias of -inf: the same tokens for both, none of them a target.
    dtype = widest_of(backend)
    case = make_case(23, (6,), 8, 41, dtype=dtype, teacher="hidden", divergence=divergence)
    forbidden = torch.zeros(41, dtype=torch.bool)
    forbidden[[3, 17, 40]] = True
    case.targets = torch.tensor([0, 5, 6, 7, 39, 38])
    bias = case.options["bias"].masked_fill(forbidden, -INF)
    their = case.options["teacher"]
    their_head = TeacherHidden(their.hidden, their.weight, bias)
    if teacher == "none":
        case = case.having(teacher=None)
    elif teacher == "hidden":
        case = case.having(teacher=their_head)
    else:
        z = their.hidden @ their.weight.T + bias
        top = z.log_softmax(-1).topk(5, -1)
        tail = teacher.removeprefix("topk-")
        case = case.having(teacher=TeacherTopK(top.indices, top.values), tail=tail)
    case = case.having(bias=bias)
    ours = assert_right(case, backend)
    assert all(value.isfinite().all() for value in ours.values())
    assert (ours["dweight"][forbidden] == 0).all()
    assert (ours["dbias"][forbidden] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_the_student_may_not_say_is_infinitely_far(backend: str) -> None:
    dtype = widest_of(backend)
    z = torch.tensor([[0.0, -INF, 1.0]], dtype=dtype)
    t = torch.tensor([[0.5, 0.0, 1.0]], dtype=dtype)
    head = {}
    for divergence in TABLE:
        case = _of_logits(z.nan_to_num(neginf=0.0), "hidden", t, divergence)
        case = case.having(bias=torch.tensor([0.0, -INF, 0.0], dtype=dtype))
        case.targets = torch.tensor([1])
        head[divergence] = policy_head(
            case.hidden, case.weight, case.targets, backend=backend, **case.options
        )
    assert head["forward_kl"].divergence.item() == INF
    assert head["forward_kl"].logprobs.item() == -INF
    assert head["forward_kl"].entropy.isfinite().all()
    for finite in ("reverse_kl", "jsd", "skew_kl"):
        assert 0 < head[finite].divergence.item() < INF


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_strides_change_nothing(backend: str, teacher: str) -> None:
    case = make_case(24, (4, 5), 12, 37, teacher=teacher, masked=0.3)
    plain = run(case, backend)

    def strided(x: torch.Tensor) -> torch.Tensor:
        """The same numbers, every second of a larger tensor, its dimensions the other way round."""
        backwards = x.permute(*reversed(range(x.dim())))
        wide = backwards.repeat_interleave(2, 0)
        return wide[::2].permute(*reversed(range(x.dim())))

    hidden = strided(case.hidden).requires_grad_()
    weight = strided(case.weight).requires_grad_()
    bias = strided(case.options["bias"]).requires_grad_()
    assert not any(x.is_contiguous() for x in (hidden, weight, bias))
    options = case.options | {"bias": bias, "mask": strided(case.options["mask"])}
    theirs = options.get("teacher")
    if theirs is not None:
        options["teacher"] = type(theirs)(
            **{k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in vars(theirs).items()}
        )
    head = policy_head(hidden, weight, strided(case.targets), backend=backend, **options)
    mixed(head, case.upstream).backward()
    ours = head._asdict() | {"dhidden": hidden.grad, "dweight": weight.grad, "dbias": bias.grad}
    for name, value in plain.items():
        assert_close_to_truth(ours[name].detach(), value, value, 1e-5, name)


@pytest.mark.parametrize("backend", BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("grad_filter", [None, 0.05])
@pytest.mark.parametrize(
    "frozen",
    [("weight",), ("hidden",), ("bias",), ("weight", "bias"), ("hidden", "bias")],
    ids="+".join,
)
def test_frozen_leaves_get_no_gradient_and_change_no_other(
    backend: str, teacher: str, grad_filter: float | None, frozen: tuple[str, ...]
) -> None:
    case = make_case(25, teacher=teacher, masked=0.3, grad_filter=grad_filter)
    full, part = run(case, backend), run(case, backend, frozen=frozen)
    assert full.keys() - part.keys() == {f"d{name}" for name in frozen}
    for name, value in part.items():
        assert value.equal(full[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_grad_gives_the_same_values(backend: str, teacher: str) -> None:
    case = make_case(26, teacher=teacher)
    with_grad = run(case, backend)
    with torch.no_grad():
        head = policy_head(
            case.hidden.clone().requires_grad_(),
            case.weight,
            case.targets,
            backend=backend,
            **case.options,
        )
    for name, value in head._asdict().items():
        assert not value.requires_grad
        assert value.equal(with_grad[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_three_outputs_are_differentiable_and_the_teacher_is_not(backend: str) -> None:
    case = make_case(27, teacher="hidden")
    hidden = case.hidden.requires_grad_()
    theirs = case.options["teacher"]
    for tensor in (theirs.hidden, theirs.weight, theirs.bias):
        tensor.requires_grad_()
    head = policy_head(hidden, case.weight, case.targets, backend=backend, **case.options)
    differentiable = [name for name, value in head._asdict().items() if value.requires_grad]
    assert differentiable == ["logprobs", "entropy", "divergence"]
    head.divergence.sum().backward()
    assert hidden.grad is not None
    assert theirs.hidden.grad is None
    assert theirs.weight.grad is None
    assert theirs.bias.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_argmax_is_the_most_likely_token_and_dtypes_are_as_stated(
    backend: str, teacher: str
) -> None:
    for dtype in BACKEND_DTYPES[backend]:
        stated = widest(dtype)
        case = make_case(28, teacher=teacher, dtype=dtype)
        ours = run(case, backend)
        z = case.hidden.double() @ case.weight.double().T + case.options["bias"].double()
        assert ours["argmax"].equal(z.argmax(-1))
        assert ours["argmax"].dtype == torch.int64
        for name in ("logprobs", "entropy", "divergence", "teacher_mass", "dropped_mass"):
            assert ours[name].dtype == stated, name
        for name in GRADIENTS:
            assert ours[name].dtype == dtype, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_stays_in_its_row(backend: str) -> None:
    case = make_case(29, (4,))
    clean = run(case, backend)
    case.hidden[1] = float("nan")
    ours = run(case, backend)
    others = torch.tensor([0, 2, 3])
    for name in ("logprobs", "entropy", "argmax", "dhidden"):
        assert ours[name][others].equal(clean[name][others])
    assert ours["logprobs"][1].isnan()
    assert 0 <= ours["argmax"][1] < len(case.weight)


@pytest.mark.parametrize("backend", BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("grad_filter", [None, 0.05])
def test_no_input_is_changed(
    backend: str, teacher: str, dtype: torch.dtype, grad_filter: float | None
) -> None:
    case = make_case(34, teacher=teacher, dtype=dtype, masked=0.3, grad_filter=grad_filter)
    inputs = [case.hidden, case.weight, case.targets, case.options["bias"], case.options["mask"]]
    if teacher != "none":
        inputs += [x for x in vars(case.options["teacher"]).values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in inputs]
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_(), case.options["bias"]]
    head = policy_head(leaves[0], leaves[1], case.targets, backend=backend, **case.options)
    upstream = [u.to(head.logprobs) for u in case.upstream]
    kept = [u.clone() for u in upstream]
    given = 2 if teacher == "none" else 3  # reference: no teacher, no gradient of the divergence
    torch.autograd.backward(list(head[:given]), upstream[:given])
    versions = [x._version for x in inputs]
    assert all(x.equal(y) for x, y in zip(inputs, before, strict=True))
    assert all(x.equal(y) for x, y in zip(upstream, kept, strict=True))
    assert versions == [0] * len(inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_may_be_taken_twice_with_retain_graph(backend: str) -> None:
    case = make_case(35, teacher="topk-bucket")
    hidden = case.hidden.requires_grad_()
    head = policy_head(hidden, case.weight, case.targets, backend=backend, **case.options)
    (first,) = torch.autograd.grad(head.divergence.sum(), hidden, retain_graph=True)
    (entropy,) = torch.autograd.grad(head.entropy.sum(), hidden, retain_graph=True)
    (again,) = torch.autograd.grad(head.divergence.sum(), hidden)
    assert first.equal(again)
    assert not first.equal(entropy)
