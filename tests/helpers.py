"""Seeded inputs, one run of an operation on a backend, and the one tolerance rule.

Legend: ... any leading shape, N tokens, D hidden, V vocabulary, K top-k.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fdfast import PolicyHead, TeacherHidden, TeacherTopK, policy_head
from fdfast.divergences import TABLE, TAILS

_CPU = torch.profiler.ProfilerActivity.CPU
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Backend -> the dtypes it is tested in, the widest first. Triton's interpreter computes bfloat16
# wrongly: what can be shown of it is in test_kernels_*.py.
BACKEND_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (F64, F32, BF16, F16),
    "reference": (F64, F32, BF16, F16),
}
if importlib.util.find_spec("triton") is not None:
    BACKEND_DTYPES["triton"] = (F32, F16)
BACKENDS = tuple(BACKEND_DTYPES)
# Where a backend's tensors lie: on the GPU if there is one, else the kernels are interpreted.
DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu"}
# The other rows of that table: those that compute with blocks and their own backward pass.
FAST_BACKENDS = tuple(name for name in BACKENDS if name != "reference")
FLOAT64_BACKENDS = tuple(name for name, kinds in BACKEND_DTYPES.items() if F64 in kinds)
BACKENDS_AND_DTYPES = [(name, dtype) for name, kinds in BACKEND_DTYPES.items() for dtype in kinds]

# What a teacher may be: none, hidden states, or its top-k with each tail.
TEACHERS = ("none", "hidden", *(f"topk-{tail}" for tail in TAILS))
# Every divergence to every teacher; without a teacher the divergence is not looked at.
DIVERGENCES_AND_TEACHERS = [("forward_kl", "none")] + [
    (name, teacher) for name in TABLE for teacher in TEACHERS[1:]
]
GRADIENTS = ("dhidden", "dweight", "dbias")


# Where a case takes the interpreter many programs, that of triton is slow.
FAST_BACKENDS_TRITON_SLOW = tuple(
    pytest.param(name, marks=pytest.mark.slow) if name == "triton" else name
    for name in FAST_BACKENDS
)
BACKENDS_TRITON_SLOW = ("reference", *FAST_BACKENDS_TRITON_SLOW)
# Where float16 takes triton the way of float32, and another test shows what it rounds.
BACKENDS_AND_DTYPES_F16_SLOW = [
    pytest.param(*row, marks=pytest.mark.slow) if row == ("triton", F16) else row
    for row in BACKENDS_AND_DTYPES
]


def backends_in(
    *dtypes: torch.dtype, among: tuple[str, ...] = BACKENDS, triton_slow: bool = False
) -> list[Any]:
    """(backend, dtype) of those backends and dtypes that go together."""
    return [
        pytest.param(b, dtype, marks=pytest.mark.slow)
        if triton_slow and b == "triton"
        else (b, dtype)
        for b, dtype in BACKENDS_AND_DTYPES
        if b in among and dtype in dtypes
    ]


def widest_of(backend: str) -> torch.dtype:
    """The widest dtype that the backend takes."""
    return BACKEND_DTYPES[backend][0]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def widest(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and statistics for inputs of `dtype`."""
    return F64 if dtype == F64 else F32


@dataclasses.dataclass
class Case:
    """Arguments of `policy_head`, and the upstream gradients of its three outputs."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    options: dict[str, Any]
    upstream: tuple[Tensor, Tensor, Tensor]

    def double(self) -> "Case":
        """The same numbers in float64: what the truth is computed from."""
        options = {name: _double(value) for name, value in self.options.items()}
        return Case(
            self.hidden.double(), self.weight.double(), self.targets, options, self.upstream
        )

    def on(self, backend: str) -> "Case":
        """The same case where the backend's tensors lie."""
        device = DEVICES.get(backend, "cpu")
        options = {name: _moved(value, device) for name, value in self.options.items()}
        upstream = tuple(u.to(device) for u in self.upstream)
        hidden, weight, targets = (x.to(device) for x in (self.hidden, self.weight, self.targets))
        return Case(hidden, weight, targets, options, upstream)  # type: ignore[arg-type]

    def having(self, **options: Any) -> "Case":
        """The same case with other options."""
        return dataclasses.replace(self, options=self.options | options)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (TeacherHidden, TeacherTopK)):
        return type(value)(**{k: _double(v) for k, v in vars(value).items()})
    return value


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (TeacherHidden, TeacherTopK)):
        return type(value)(**{k: _moved(v, device) for k, v in vars(value).items()})
    return value


def make_case(
    seed: int,
    shape: tuple[int, ...] = (7,),
    D: int = 24,
    V: int = 83,
    *,
    dtype: torch.dtype = F32,
    teacher: str = "none",
    D_teacher: int | None = None,
    K: int = 5,
    bias: bool = True,
    masked: float = 0.0,
    spread: float = 1.0,
    closeness: float = 0.3,
    **options: Any,
) -> Case:
    """Random inputs of `policy_head`.

    Args:
        seed: of everything.
        shape: the leading shape.
        D: hidden.
        V: vocabulary.
        dtype: of hidden, weight and bias, student's and teacher's.
        teacher: a name in TEACHERS.
        D_teacher: the teacher's hidden size; None: its head is the student's, its hidden states are
            near.
        K: of a top-k.
        bias: whether there is one.
        masked: the share of masked positions.
        spread: the standard deviation of the logits.
        closeness: of the teacher's hidden states to the student's, 0 for the same.
        options: more arguments of `policy_head`.
    """
    g = generator(seed)
    hidden = torch.randn(*shape, D, generator=g, dtype=F64)
    weight = torch.randn(V, D, generator=g, dtype=F64) * spread / D**0.5
    bias_V = torch.randn(V, generator=g, dtype=F64) * 0.5 if bias else None
    targets = torch.randint(V, shape, generator=g)
    upstream = tuple(torch.randn(shape, generator=g, dtype=F64) for _ in range(3))
    if teacher != "none":
        noise = torch.randn(*shape, D_teacher or D, generator=g, dtype=F64)
        their_hidden = noise if D_teacher else hidden + closeness * noise
        their_weight, their_bias = weight, bias_V
        if D_teacher:
            their_weight = torch.randn(V, D_teacher, generator=g, dtype=F64) * spread / D**0.5
            their_bias = torch.randn(V, generator=g, dtype=F64)
        options["teacher"] = TeacherHidden(
            their_hidden.to(dtype), their_weight.to(dtype), _cast(their_bias, dtype)
        )
    if teacher.startswith("topk"):
        z = their_hidden @ their_weight.T + (0.0 if their_bias is None else their_bias)
        top = z.log_softmax(-1).topk(K, -1)
        options["teacher"] = TeacherTopK(top.indices, top.values.to(widest(dtype)))
        options["tail"] = teacher.removeprefix("topk-")
    if masked:
        options["mask"] = torch.rand(shape, generator=g) >= masked
    if bias_V is not None:
        options["bias"] = bias_V.to(dtype)
    upstream = tuple(u.to(F32).to(F64) for u in upstream)  # the same numbers in every run
    return Case(hidden.to(dtype), weight.to(dtype), targets, options, upstream)  # type: ignore[arg-type]


def draw_case(backend: str, draw: Callable[..., Any]) -> Case:
    """Any shape and options of `policy_head`, by hypothesis's `draw`."""
    V = draw(st.integers(1, 300), "V")
    teacher = draw(st.sampled_from(TEACHERS), "teacher")
    D_teacher = draw(st.sampled_from([None, 1, 5]), "D_teacher")
    return make_case(
        draw(st.integers(0, 999), "seed"),
        tuple(draw(st.lists(st.integers(0, 6), max_size=2), "shape")),
        draw(st.integers(1, 20), "D"),
        V,
        dtype=draw(
            st.sampled_from([d for d in (F64, F32) if d in BACKEND_DTYPES[backend]]), "dtype"
        ),
        teacher=teacher,
        D_teacher=D_teacher if teacher != "none" else None,
        K=draw(st.integers(1, V), "K"),
        bias=draw(st.booleans(), "bias"),
        masked=draw(st.sampled_from([0.0, 0.4]), "masked"),
        spread=draw(st.sampled_from([0.1, 1.0, 5.0]), "spread"),
        divergence=draw(st.sampled_from(sorted(TABLE)), "divergence"),
        alpha=draw(st.floats(0.05, 0.95), "alpha"),
        temperature=draw(st.floats(0.3, 2.0), "temperature"),
        logit_softcap=draw(st.sampled_from([None, 2.0, 30.0]), "logit_softcap"),
        workspace_mb=draw(st.sampled_from([0.03, 64.0]), "workspace_mb"),
    )


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def run(
    case: Case, backend: str, *, frozen: tuple[str, ...] = (), **options: Any
) -> dict[str, Tensor]:
    """Every output, and the gradients of hidden, weight and bias of sum(upstream * output), on the
    CPU.
    """
    case = case.having(**options).on(backend)
    arguments = case.options
    leaves = {"hidden": case.hidden, "weight": case.weight}
    if arguments.get("bias") is not None:
        leaves["bias"] = arguments["bias"]
    leaves = {
        name: leaf.detach().clone().requires_grad_(name not in frozen)
        for name, leaf in leaves.items()
    }
    arguments = arguments | {"bias": leaves.get("bias")}
    head: PolicyHead = policy_head(
        leaves["hidden"], leaves["weight"], case.targets, backend=backend, **arguments
    )
    if len(frozen) < len(leaves):
        mixed(head, case.upstream).backward()
    seen = {name: value.detach().cpu() for name, value in head._asdict().items()}
    return seen | {f"d{name}": v.grad.cpu() for name, v in leaves.items() if v.grad is not None}


def mixed(head: PolicyHead, upstream: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One scalar out of the three differentiable outputs."""
    outputs = (head.logprobs, head.entropy, head.divergence)
    return sum(((u.to(x) * x).sum() for u, x in zip(upstream, outputs, strict=True)), start=0.0)  # type: ignore[return-value]


def assert_close_to_truth(
    ours: Tensor, same_dtype: Tensor, truth: Tensor, floor: float, name: str
) -> None:
    """max|ours - truth| <= 2 max|same_dtype - truth| + floor * max(1, max|truth|), and the same of
    the Frobenius norm relative to the truth's, which an all-zero gradient cannot pass.

    Args:
        ours: what a backend gives.
        same_dtype: what plain PyTorch gives from the same inputs, in their dtype, with logits in
            float32.
        truth: what plain PyTorch gives from the same inputs in float64.
        floor: how far off anything may be, of the largest element, and of the norm.
        name: of the tensor.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    if not truth.numel():
        return
    ours, same_dtype, truth = ours.double(), same_dtype.double(), truth.double()
    finite = truth.isfinite()
    same_elsewhere = torch.where(finite, 0.0, ours).equal(torch.where(finite, 0.0, truth))
    assert same_elsewhere, f"{name}: infinities differ: {ours[~finite]}, not {truth[~finite]}"
    truth = torch.where(finite, truth, 0.0)
    error = torch.where(finite, ours - truth, 0.0)
    their_error = torch.where(finite, same_dtype - truth, 0.0)
    worst = int(error.abs().nan_to_num(nan=float("inf")).argmax())
    allowed = 2 * their_error.abs().max() + floor * truth.abs().max().clamp(min=1.0)
    # A float64 truth has its own rounding, relatively large where it is a small difference.
    allowed_norm = 2 * their_error.norm() + max(floor, 1e-6) * truth.norm()
    absolute, norm = error.abs().max(), error.norm()
    close = absolute <= allowed
    if truth.abs().max() > floor:  # a truth that is nothing but rounding has no digits to compare
        close = close & (norm <= allowed_norm)
    assert close, (
        f"{name}: off by {absolute:.3e} (allowed {allowed:.3e}), norm {norm:.3e} of "
        f"{truth.norm():.3e} (allowed {allowed_norm:.3e}); worst element {worst}: ours "
        f"{ours.flatten()[worst]:.9e}, torch in the same dtype {same_dtype.flatten()[worst]:.9e}, "
        f"truth {truth.flatten()[worst]:.9e}"
    )


def floor_of(dtype: torch.dtype) -> float:
    """Rounding of a sum in the statistics dtype: a few dozen units in the last place; twice that in
    float64, where the truth has as much of its own.
    """
    return (64 if dtype == F64 else 32) * torch.finfo(widest(dtype)).eps


def assert_right(
    case: Case, backend: str, *, ours: dict[str, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    """`run` on the backend (or `ours`, from elsewhere), held against the reference in float64,
    every output and gradient.
    """
    ours = run(case, backend, **options) if ours is None else ours
    same_dtype = run(case, "reference", **options)
    truth = run(case.double(), "reference", **options)
    assert ours.keys() == truth.keys()
    floor = floor_of(case.hidden.dtype)
    for name in truth:
        if name in ("argmax", "dropped_mass"):
            continue
        # A gradient is returned in the dtype of its input: half a unit of that is rounding.
        lost = torch.finfo(case.hidden.dtype).eps if name in GRADIENTS else 0.0
        assert_close_to_truth(ours[name], same_dtype[name], truth[name], floor + lost, name)
    return ours


def peak_bytes(work: Callable[[], Any]) -> tuple[int, Any]:
    """The most that `work` holds at once of new CPU tensors, by the allocator's own record; and its
    result.
    """
    with torch.profiler.profile(activities=[_CPU], profile_memory=True) as profile:
        result = work()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result
