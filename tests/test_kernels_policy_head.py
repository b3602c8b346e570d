"""policy_head in Triton under the interpreter: every divergence, teacher and edge, forward and each
gradient, against the float64 reference.

Legend: N tokens, D hidden, V vocabulary, K top-k, S splits.
"""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fdfast import TeacherHidden, TeacherTopK, dispatch, policy_head
from fdfast.divergences import TABLE
from fdfast.errors import InputError, MachineError
from fdfast.kernels import launch, tiles
from fdfast.policy_head_loss import policy_head_loss
from tests.helpers import (
    BF16,
    DIVERGENCES_AND_TEACHERS,
    F16,
    F32,
    F64,
    TEACHERS,
    Case,
    assert_right,
    make_case,
    run,
)

# Small tiles with a tail each way: several splits of several blocks, in parts, over few columns.
SMALL = tiles.Tile(16, 64, 16, 4, 1, parts=2, split_v=128)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's tiles are small; a GPU has its own."""
    for key in tiles.INTERPRET:
        monkeypatch.setitem(tiles.INTERPRET, key, SMALL)


@pytest.mark.parametrize("dtype", [F32, pytest.param(F16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("divergence", "teacher"), DIVERGENCES_AND_TEACHERS)
def test_every_divergence_and_teacher_is_right(
    dtype: torch.dtype, divergence: str, teacher: str
) -> None:
    # V = 311 is prime: 3 splits, 5 blocks, a tail; D = 24 is a block and a half.
    case = make_case(
        1, (7,), 24, 311, dtype=dtype, teacher=teacher, divergence=divergence, alpha=0.3
    )
    assert_right(case, "triton")


@pytest.mark.parametrize(
    "dtype", [*(pytest.param(d, marks=pytest.mark.slow) for d in (F32, F16)), BF16]
)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_option_at_once_is_right(dtype: torch.dtype, teacher: str) -> None:
    # A third masked, both temperatures, softcap, bias, another hidden size of the teacher, and a
    # workspace that cuts the vocabulary in the backward.
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
        divergence="reverse_kl",
        temperature=0.7,
        logit_softcap=5.0,
        workspace_mb=0.06,
    )
    if isinstance(case.options.get("teacher"), TeacherHidden):
        theirs = case.options["teacher"]
        case = case.having(teacher=TeacherHidden(theirs.hidden, theirs.weight, theirs.bias, 1.3))
    assert_right(case, "triton")


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 64), (33, 32, 128), (2, 3, 65)])
@pytest.mark.parametrize("teacher", ["none", "hidden", "topk-bucket"])
def test_every_shape_is_right(shape: tuple[int, int, int], teacher: str) -> None:
    # One of everything; exactly one tile; whole tiles and splits; one column more than a tile.
    N, D, V = shape
    assert_right(make_case(2, (N,), D, V, teacher=teacher, K=min(5, V), spread=2.0), "triton")


@pytest.mark.slow
def test_a_real_vocabulary_with_the_interpreter_s_own_tiles_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(tiles.INTERPRET, ("pair", 4), tiles.Tile(64, 1024, 256, 4, 1))
    monkeypatch.setitem(tiles.INTERPRET, ("grad_pair", 4), tiles.Tile(64, 1024, 256, 4, 1))
    assert_right(make_case(4, (5,), 8, 50_257, teacher="hidden", spread=3.0), "triton")


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize(
    "closeness",
    [pytest.param(0.1, marks=pytest.mark.slow), pytest.param(1e-2, marks=pytest.mark.slow), 1e-3],
)
def test_a_near_teacher_keeps_its_digits(divergence: str, closeness: float) -> None:
    case = make_case(
        5, (9,), 16, 311, teacher="hidden", closeness=closeness, divergence=divergence, spread=3.0
    )
    assert_right(case, "triton")


@pytest.mark.parametrize("divergence", TABLE)
def test_identical_student_and_teacher_give_exactly_zero(divergence: str) -> None:
    case = make_case(6, (9,), 16, 311, teacher="hidden", closeness=0.0, divergence=divergence)
    zero = torch.zeros(9, dtype=F64)
    case.upstream = (zero, zero, torch.ones(9, dtype=F64))
    ours = run(case, "triton")
    assert torch.equal(ours["divergence"], torch.zeros(9))
    for name in ("dhidden", "dweight", "dbias"):
        assert torch.equal(ours[name], torch.zeros_like(ours[name])), name


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("teacher", ["hidden", pytest.param("topk-bucket", marks=pytest.mark.slow)])
def test_logits_of_ten_thousand_are_right(divergence: str, teacher: str) -> None:
    # Peaked: the divergence is thousands of nats, or the students' and teachers' peaks meet.
    case = make_case(7, (6,), 16, 200, teacher=teacher, divergence=divergence, bias=False)
    case.weight *= 3e3
    if teacher == "hidden":
        theirs = case.options["teacher"]
        case = case.having(teacher=TeacherHidden(theirs.hidden, case.weight))
    ours, truth = run(case, "triton"), run(case.double(), "reference")
    plain = run(case, "reference")
    for name in ("logprobs", "entropy", "divergence"):
        assert ours[name].isfinite().equal(truth[name].isfinite()), name
        kept = truth[name].isfinite()
        off = (ours[name].double() - truth[name])[kept].abs().max()
        plain_off = (plain[name].double() - truth[name])[kept].abs().max()
        assert off <= 2 * plain_off + 1e-6 * truth[name][kept].abs().max(), (name, off, plain_off)
    assert torch.equal(ours["argmax"], truth["argmax"])


@pytest.mark.parametrize("teacher", ["none", "hidden", "topk-bucket"])
def test_a_forbidden_token_is_right(teacher: str) -> None:
    # Both heads forbid every third token: -inf on both sides is no NaN.
    case = make_case(8, (6,), 16, 200, teacher=teacher, K=5)
    bias = case.options["bias"].clone()
    bias[::3] = float("-inf")
    case.targets = case.targets // 3 * 3 + 1
    if teacher == "hidden":
        theirs = case.options["teacher"]
        case = case.having(teacher=TeacherHidden(theirs.hidden, theirs.weight, bias))
    if teacher == "topk-bucket":
        allowed = torch.arange(200)[torch.arange(200) % 3 != 0]
        z = (case.hidden @ case.weight.T + 0.3)[:, allowed]
        top = z.log_softmax(-1).topk(5)
        case = case.having(teacher=TeacherTopK(allowed[top.indices], top.values))
    assert_right(case.having(bias=bias), "triton")


def test_a_student_that_forbids_what_the_teacher_does_gives_infinity() -> None:
    case = make_case(8, (6,), 16, 200, teacher="hidden", bias=False)
    bias = torch.zeros(200)
    bias[150:] = float("-inf")
    case.targets = case.targets % 150
    ours = run(case.having(bias=bias), "triton", frozen=("hidden", "weight", "bias"))
    assert (ours["divergence"] == float("inf")).all()
    assert ours["logprobs"].isfinite().all()


def test_nan_in_a_masked_row_does_not_leak() -> None:
    case = make_case(9, (8,), 16, 200, teacher="hidden", masked=0.5)
    mask = case.options["mask"]
    assert 0 < mask.sum() < 8
    whole = run(case, "triton")
    case.hidden[~mask] = float("nan")
    spoiled = run(case, "triton")
    for name, value in whole.items():
        assert torch.equal(value, spoiled[name]), name


@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_token_is_no_work_and_no_error(teacher: str) -> None:
    case = make_case(10, (0,), 16, 70, teacher=teacher)
    ours = run(case, "triton")
    assert ours["logprobs"].shape == (0,)
    assert torch.equal(ours["dweight"], torch.zeros_like(ours["dweight"]))
    masked = make_case(10, (4,), 16, 70, teacher=teacher, mask=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(run(masked, "triton")["logprobs"], torch.zeros(4))


def test_strides_do_not_matter() -> None:
    case = make_case(11, (9,), 16, 200, teacher="hidden")
    plain = run(case, "triton")
    strided = make_case(11, (9,), 16, 200, teacher="hidden")
    strided.hidden = case.hidden.T.contiguous().T
    strided.weight = torch.stack([case.weight, case.weight], 1)[:, 0]
    for name, value in run(strided, "triton").items():
        assert torch.equal(value, plain[name]), name


def test_the_strides_of_a_bias_do_not_matter() -> None:
    case = make_case(11, (9,), 16, 200, teacher="hidden")
    plain = run(case, "triton")
    theirs = case.options["teacher"]
    # Every second number of a tensor, and one number over the whole vocabulary.
    bias = torch.stack([case.options["bias"], torch.full((200,), 9.0)], 1)[:, 0]
    case = case.having(bias=bias, teacher=TeacherHidden(theirs.hidden, theirs.weight, bias))
    strided = policy_head(case.hidden, case.weight, case.targets, backend="triton", **case.options)
    assert torch.equal(strided.logprobs, plain["logprobs"])
    assert torch.equal(strided.divergence, plain["divergence"])
    one = torch.ones(1).expand(200)
    even = policy_head(
        case.hidden, case.weight, case.targets, backend="triton", **case.options | {"bias": one}
    )
    ones = case.options | {"bias": one.contiguous()}
    flat = policy_head(case.hidden, case.weight, case.targets, backend="triton", **ones)
    assert torch.equal(even.logprobs, flat.logprobs)


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("teacher", ["hidden", pytest.param("topk-bucket", marks=pytest.mark.slow)])
def test_nan_in_a_trained_row_is_seen_and_stays_in_it(divergence: str, teacher: str) -> None:
    # A maximum or a clamp that drops NaN would give a finite loss of a broken model.
    case = make_case(
        18, (4,), 12, 200, dtype=F16, teacher=teacher, divergence=divergence, alpha=0.8
    ).having(logit_softcap=5.0, grad_filter=0.1)
    clean = run(case, "triton", frozen=("weight", "bias"))
    case.hidden[1] = float("nan")
    ours = run(case, "triton", frozen=("weight", "bias"))
    others = torch.tensor([0, 2, 3])
    for name in ("logprobs", "entropy", "divergence", "dhidden"):
        assert ours[name][1].isnan().all(), name
        assert ours[name][others].isfinite().all(), name
    for name in ("logprobs", "entropy", "divergence"):
        assert torch.equal(ours[name][others], clean[name][others]), name
    assert ((ours["argmax"] >= 0) & (ours["argmax"] < 200)).all()


@pytest.mark.parametrize("divergence", ["jsd", "skew_kl"])
@pytest.mark.parametrize("alpha", [1e-7, pytest.param(1 - 1e-7, marks=pytest.mark.slow)])
def test_a_mixture_of_nearly_one_side_is_right(divergence: str, alpha: float) -> None:
    # A far teacher: log(alpha + (1 - alpha) e^-d) is log(alpha), which 1 + (1 - alpha) y loses.
    case = make_case(70, (5,), 16, 200, teacher="hidden", spread=6.0, closeness=1.0)
    assert_right(case.having(divergence=divergence, alpha=alpha), "triton")


@pytest.mark.parametrize(
    "frozen", [("weight",), ("hidden",), pytest.param(("weight", "bias"), marks=pytest.mark.slow)]
)
def test_frozen_leaves_get_no_gradient_and_change_no_other(frozen: tuple[str, ...]) -> None:
    case = make_case(12, (9,), 16, 200, teacher="hidden")
    all_of_them, ours = run(case, "triton"), run(case, "triton", frozen=frozen)
    for name in frozen:
        assert f"d{name}" not in ours
    for name, value in ours.items():
        assert torch.equal(value, all_of_them[name]), name


def test_a_token_s_result_does_not_depend_on_the_tokens_beside_it() -> None:
    for teacher in ("hidden", "topk-bucket"):
        case = make_case(13, (40,), 16, 311, teacher=teacher, divergence="jsd")
        # Eighths, so that the logits are exact: the interpreter's tl.dot is a BLAS, whose order of
        # sums depends on where a row lies in the tile; tensor cores treat all rows alike.
        _to_eighths(case)
        whole = run(case, "triton", frozen=("hidden", "weight", "bias"))
        for chosen in (slice(17, 18), slice(5, 38)):
            few = _rows(case, chosen)
            part = run(few, "triton", frozen=("hidden", "weight", "bias"))
            for name in ("logprobs", "entropy", "divergence"):
                assert torch.equal(part[name], whole[name][chosen]), (name, teacher)


def _to_eighths(case: Case) -> None:
    case.hidden, case.weight = (case.hidden * 8).round() / 8, (case.weight * 8).round() / 8
    theirs = case.options["teacher"]
    if isinstance(theirs, TeacherHidden):
        hidden = (theirs.hidden * 8).round() / 8
        case.options["teacher"] = TeacherHidden(hidden, case.weight, theirs.bias)


def _rows(case: Case, rows: slice) -> Case:
    theirs = case.options["teacher"]
    if isinstance(theirs, TeacherTopK):
        teacher: Any = TeacherTopK(theirs.ids[rows], theirs.logprobs[rows])
    else:
        teacher = TeacherHidden(theirs.hidden[rows], theirs.weight, theirs.bias)
    upstream = tuple(u[rows] for u in case.upstream)
    options = case.options | {"teacher": teacher}
    return Case(case.hidden[rows], case.weight, case.targets[rows], options, upstream)  # type: ignore[arg-type]


def test_a_small_workspace_changes_nothing_but_rounding_and_a_smaller_one_says_what_it_wants() -> (
    None
):
    case = make_case(14, (40,), 16, 311, teacher="hidden")
    wide, narrow = run(case, "triton"), run(case, "triton", workspace_mb=0.045)
    for name in ("logprobs", "entropy", "divergence"):
        assert torch.equal(wide[name], narrow[name]), name
    for name in ("dhidden", "dweight", "dbias"):
        assert (wide[name] - narrow[name]).norm() <= 1e-6 * wide[name].norm(), name
    with pytest.raises(InputError, match="workspace_mb="):
        run(case, "triton", workspace_mb=1e-4)


@pytest.mark.parametrize("D", [8, pytest.param(37, marks=pytest.mark.slow)])
def test_the_workspace_that_an_error_advises_is_enough(D: int) -> None:
    case = make_case(57, (20,), D, 600, teacher="hidden", masked=0.2, grad_filter=0.1)
    with pytest.raises(InputError, match=r"workspace_mb=0\.01 holds not") as seen:
        run(case, "triton", workspace_mb=0.01)
    advised = str(seen.value).split("give workspace_mb=")[1].split()[0]
    assert run(case, "triton", workspace_mb=float(advised))["logprobs"].isfinite().all()


@pytest.mark.parametrize(
    "share",
    [pytest.param(0.0, marks=pytest.mark.slow), pytest.param(0.03, marks=pytest.mark.slow), 0.3],
)
@pytest.mark.parametrize("teacher", ["hidden", "topk-bucket"])
def test_the_filter_drops_no_more_than_it_may(share: float, teacher: str) -> None:
    case = make_case(15, (4,), 16, 1009, teacher=teacher, spread=4.0, workspace_mb=0.05)
    exact, ours = run(case, "triton"), run(case, "triton", grad_filter=share)
    assert (ours["dropped_mass"] <= share).all()
    assert share == 0.0 or ours["dropped_mass"].max() > 0.0
    assert torch.equal(exact["dropped_mass"], torch.zeros(4))
    for name in ("dhidden", "dweight"):
        off = (ours[name] - exact[name]).norm() / exact[name].norm()
        assert off <= 1e-6 + 2 * share, name
    assert torch.equal(ours["logprobs"], exact["logprobs"])


def test_float64_is_refused_in_any_tensor() -> None:
    case = make_case(16, dtype=F64)
    with pytest.raises(TypeError, match=r"policy_head: .*float32; got a float64 tensor"):
        run(case, "triton")
    case = make_case(16, teacher="hidden")
    theirs = case.options["teacher"]
    wide = TeacherHidden(theirs.hidden.double(), theirs.weight.double())
    with pytest.raises(TypeError, match=r"policy_head: .*float32; got a float64 tensor"):
        run(case.having(teacher=wide), "triton")


def test_a_cpu_without_the_interpreter_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case(16)
    with pytest.raises(MachineError, match="wants tensors on a CUDA GPU; got one on cpu") as error:
        policy_head(case.hidden, case.weight, case.targets, backend="triton")
    assert "\n" not in str(error.value)


def test_the_interpreter_asked_for_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "INTERPRETING", False)
    dispatch._triton_module.cache_clear()
    case = make_case(16)
    with pytest.raises(MachineError, match="before Python starts"):
        policy_head(case.hidden, case.weight, case.targets, backend="triton")


def test_without_triton_the_command_that_mends_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "fdfast.kernels", None)
    dispatch._triton_module.cache_clear()
    case = make_case(16)
    with pytest.raises(MachineError, match="pip install triton"):
        policy_head(case.hidden, case.weight, case.targets, backend="triton")


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "chosen"),
    [
        ("cpu", F32, None, "cpu"),
        ("cpu", F64, None, "cpu"),
        ("cuda", BF16, (9, 0), "triton"),
        ("cuda", F32, (8, 0), "triton"),
        ("cuda", F64, (9, 0), "reference"),
        ("cuda", BF16, (7, 5), "reference"),
        ("mps", F32, None, "reference"),
    ],
)
def test_auto_takes_the_fast_backend_that_can_run(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    name, reason = dispatch._automatic(torch.device(device), dtype)
    assert name == chosen
    assert bool(reason) == (chosen == "reference")


def test_the_loss_of_each_token_takes_the_kernels_too() -> None:
    case = make_case(17, (9,), 16, 200, teacher="hidden").on("triton")
    hidden = case.hidden.requires_grad_()

    def token_loss(
        logprobs: Tensor, entropy: Tensor, divergence: Tensor, positions: Tensor
    ) -> Tensor:
        return divergence - 0.1 * entropy - 0.2 * logprobs * positions

    loss, _ = policy_head_loss(
        hidden, case.weight, case.targets, token_loss, backend="triton", **case.options
    )
    (ours,) = torch.autograd.grad(loss, hidden)
    wanted, _ = policy_head_loss(
        hidden, case.weight, case.targets, token_loss, backend="reference", **case.options
    )
    (truth,) = torch.autograd.grad(wanted, hidden)
    assert (ours - truth).norm() <= 1e-5 * truth.norm()
