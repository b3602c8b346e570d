"""policy_head under what people wrap around it: checkpoints, compile, autocast, threads."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fdfast import _cpu, policy_head
from fdfast.cpu.blocks import call
from fdfast.divergences import TABLE, Divergence
from tests.helpers import (
    BACKENDS,
    BACKENDS_TRITON_SLOW,
    BF16,
    F32,
    F64,
    FAST_BACKENDS_TRITON_SLOW,
    TEACHERS,
    assert_close_to_truth,
    generator,
    make_case,
    mixed,
    run,
)

INF = float("inf")


@pytest.mark.parametrize("backend", BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    backend: str, teacher: str, use_reentrant: bool
) -> None:
    case = make_case(30, teacher=teacher, grad_filter=0.05, masked=0.2)
    plain = run(case, backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    bias = case.options.pop("bias").requires_grad_()

    def head(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return tuple(
            policy_head(hidden, weight, case.targets, bias=bias, backend=backend, **case.options)[
                :3
            ]
        )

    outputs = checkpoint(head, hidden, weight, bias, use_reentrant=use_reentrant)
    sum((u.to(x) * x).sum() for u, x in zip(case.upstream, outputs, strict=True)).backward()
    for name, grad in (("dhidden", hidden.grad), ("dweight", weight.grad), ("dbias", bias.grad)):
        assert plain[name].equal(grad), name


# Dynamo looks at .grad of whatever crosses a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_around_it_changes_nothing(backend: str) -> None:
    case = make_case(31, teacher="hidden", masked=0.3)
    plain = run(case, backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    @torch.compile(backend="eager")
    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        head = policy_head(hidden * 1.0, weight, case.targets, backend=backend, **case.options)
        return mixed(head, case.upstream) * 1.0

    step(hidden, weight).backward()
    assert plain["dhidden"].equal(hidden.grad)
    assert plain["dweight"].equal(weight.grad)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_autocast_around_it_changes_nothing(backend: str, teacher: str) -> None:
    case = make_case(32, teacher=teacher)
    plain = run(case, backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        head = policy_head(hidden, weight, case.targets, backend=backend, **case.options)
        total = mixed(head, case.upstream)
    total.backward()
    for name, value in head._asdict().items():
        assert plain[name].dtype == value.dtype
        assert plain[name].equal(value), name
    assert plain["dhidden"].equal(hidden.grad)
    assert plain["dweight"].equal(weight.grad)


@pytest.mark.parametrize("backend", FAST_BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_backward_within_autocast_changes_nothing(backend: str, teacher: str) -> None:
    # PyTorch advises against it and people do it; plain autograd's GEMMs then run in bfloat16.
    case = make_case(32, teacher=teacher)
    plain = run(case, backend)
    with torch.autocast("cpu", dtype=BF16):
        ours = run(case, backend)
    for name, value in plain.items():
        assert value.equal(ours[name]), name


@pytest.mark.parametrize("backend", BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("grad_filter", [None, 0.05])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_call_gives_the_same_bits(
    backend: str, teacher: str, grad_filter: float | None, threads: int
) -> None:
    torch.use_deterministic_algorithms(False)  # as users have it
    torch.set_num_threads(threads)
    case = make_case(33, (9,), 8, 257, teacher=teacher, grad_filter=grad_filter, workspace_mb=0.05)
    first, second = run(case, backend), run(case, backend)
    for name, value in first.items():
        assert value.equal(second[name]), name


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_number_of_threads_changes_nothing_but_the_rounding_of_the_gemm(teacher: str) -> None:
    # The loops of csrc give one row to one thread; MKL may split an odd GEMM otherwise.
    case = make_case(33, (9,), 8, 257, teacher=teacher, workspace_mb=0.05)
    one = run(case, "cpu")
    torch.set_num_threads(2)
    for name, value in run(case, "cpu").items():
        assert_close_to_truth(value, one[name], one[name], 1e-5, name)


@pytest.mark.parametrize("divergence", TABLE.values(), ids=lambda row: row.name)
def test_the_rows_of_csrc_are_the_same_bits_with_any_number_of_threads(
    divergence: Divergence,
) -> None:
    R, V = 7, 331  # two blocks of columns
    math = _cpu.HeadMath(
        divergence=divergence.code, alpha=0.5, temperature=0.8, teacher_temperature=1.2, softcap=9.0
    )
    targets_R = torch.randint(V, (R,), generator=generator(37))
    hidden_RD, weight_VD = torch.ones(R, 5), torch.randn(V, 5, generator=generator(39))

    def statistics_and_gradients(threads: int) -> list[torch.Tensor]:
        logits_RV = torch.randn(2, R, V, generator=generator(38))
        raw_RV = logits_RV.clone()
        pairs_R2, rows_R = torch.zeros(2, R, 2, dtype=F64), torch.ones(8, R, dtype=F64)
        argmax_R, needed_R = torch.zeros(2, R, dtype=torch.int64)
        outputs = (*rows_R[:4], argmax_R)
        shape = (R, V, targets_R, math, threads)
        call("head_stats", F32, *logits_RV, *shape, *pairs_R2, *outputs)
        shape = (R, V, 0, False, False, math, threads)
        given = (*pairs_R2, rows_R[3], *rows_R[4:7], targets_R, rows_R[7], None, None, 0)
        call("head_grads", F32, *raw_RV, *shape, *given)
        given = (0.05, threads, rows_R[4], rows_R[5], needed_R)
        call("row_thresholds", F32, raw_RV[0], R, V, *given)
        sums_RD, sums_VD = torch.zeros(R, 5), torch.zeros(V, 5)
        given = (rows_R[4], weight_VD, False, hidden_RD, False, 5, threads)
        call("sparse_grads", F32, raw_RV[0], R, V, *given, sums_RD, sums_VD, rows_R[6])
        return [logits_RV, pairs_R2, rows_R, argmax_R, raw_RV, needed_R, sums_RD, sums_VD]

    one = statistics_and_gradients(1)
    for threads in (2, 3, 16):
        more = statistics_and_gradients(threads)
        assert all(x.equal(y) for x, y in zip(one, more, strict=True))
