"""policy_head, forward and backward with every gradient, against peers, plain PyTorch and the
GEMMs.

Run by `make bench`. Contenders take turns, one pass each, so that a busy neighbour hits all alike;
harness.py takes medians over the turns. Every contender first gets a small case right.
Legend: N tokens, D hidden, V vocabulary.
"""

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.shapes import SMOLLM2_135M, Shape
from fdfast import FeedbackDistillationLoss, GRPOLoss, TeacherHidden, policy_head, reference
from fdfast.cpu import gemm

Inputs = dict[str, Tensor]

TURNS = 3
SHAPE = SMOLLM2_135M
CHECKED = Shape("check", 64, 64, 1032)  # what every contender must get right before it is timed
SEQUENCES = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> Inputs:
    """Peaked logits and a teacher near the student: mean KL about 0.1, as feedback in a prompt
    makes it.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    weight = normal(shape.V, shape.D) / shape.D**0.5
    targets = torch.randint(0, shape.V, (shape.N,), generator=generator)
    hidden = 2.0 * normal(shape.N, shape.D) + 6.0 * weight[targets]
    teacher = hidden + 0.4 * normal(shape.N, shape.D)
    inputs = {"hidden": hidden, "weight": weight, "teacher": teacher}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    return inputs | {"targets": targets, "advantages": normal(SEQUENCES)}


def ours_kl(x: Inputs, grad_filter: float | None = None) -> Tensor:
    """FeedbackDistillationLoss: gradients taken on the way."""
    loss = FeedbackDistillationLoss(grad_filter=grad_filter, backend="cpu")
    teacher = TeacherHidden(x["teacher"], x["weight"])
    return loss(x["hidden"], x["weight"], x["targets"], teacher).loss


def recompute_kl(x: Inputs) -> Tensor:
    """policy_head with a loss after it: logits projected again in the backward pass."""
    teacher = TeacherHidden(x["teacher"], x["weight"])
    head = policy_head(x["hidden"], x["weight"], x["targets"], teacher=teacher, backend="cpu")
    return head.divergence.mean()


def naive_kl(x: Inputs) -> Tensor:
    """What one writes first, with float32 softmaxes; the logits have the dtype of the inputs."""
    s = (x["hidden"] @ x["weight"].T).float().log_softmax(-1)
    with torch.no_grad():
        t = (x["teacher"] @ x["weight"].T).float().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean()


def ours_grpo(x: Inputs) -> Tensor:
    """GRPOLoss with a differentiable entropy bonus."""
    shape = (SEQUENCES, len(x["targets"]) // SEQUENCES)
    loss = GRPOLoss(loss_type="bnpo", entropy_coef=1e-3, backend="cpu")
    hidden, targets = x["hidden"].view(*shape, -1), x["targets"].view(shape)
    return loss(hidden, x["weight"], targets, x["advantages"]).loss


def naive_grpo(x: Inputs) -> Tensor:
    """The same with stored float32 log-probabilities."""
    log_p = (x["hidden"] @ x["weight"].T).float().log_softmax(-1)
    logprobs = log_p.gather(1, x["targets"][:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    advantages = x["advantages"].repeat_interleave(len(logprobs) // SEQUENCES)
    per_token = -(logprobs - logprobs.detach()).exp() * advantages
    return (per_token - 1e-3 * entropy).mean()


def gemm_limit(x: Inputs, *, dual: bool) -> None:
    """The GEMMs that any exact loss needs: logits (of both), dhidden, dweight; blocks of 256
    tokens.
    """
    hidden, weight, teacher = (x[k].detach() for k in ("hidden", "weight", "teacher"))
    dweight = torch.zeros_like(weight)
    dlogits = torch.empty(256, len(weight), dtype=weight.dtype)
    for rows in torch.arange(len(hidden)).split(256):
        torch.mm(hidden[rows], weight.T, out=dlogits)
        if dual:
            torch.mm(teacher[rows], weight.T, out=dlogits)
        dlogits @ weight
        dweight.addmm_(dlogits.T, hidden[rows])


def _onednn_limit(x: Inputs, *, dual: bool) -> None:
    with gemm.fast_gemms(1):
        gemm_limit(x, dual=dual)


KL: dict[str, Callable[[Inputs], Tensor]] = {
    "ours": ours_kl,
    "ours, filter 0.03": functools.partial(ours_kl, grad_filter=0.03),
    "ours, filter 0.1": functools.partial(ours_kl, grad_filter=0.1),
    "ours, recompute": recompute_kl,
    "naive PyTorch": naive_kl,
    "Liger-Kernel": peers.liger_kl,
    "TRL": peers.trl_kl,
}
GRPO: dict[str, Callable[[Inputs], Tensor]] = {
    "ours": ours_grpo,
    "naive PyTorch": naive_grpo,
    "Liger-Kernel (no entropy)": peers.liger_grpo,
    "TRL (entropy without gradient)": peers.trl_grpo,
}
LIMITS = {"limit: GEMMs by MKL": gemm_limit, "limit: GEMMs by oneDNN": _onednn_limit}
CASES = {
    "forward KL, float32": (KL, "float32"),
    "forward KL, bfloat16": (KL, "bfloat16"),
    "GRPO, float32": (GRPO, "float32"),
}


def forward_backward(contender: Callable[[Inputs], Tensor], x: Inputs) -> Inputs:
    """One pass; the leaves with the gradients of hidden and weight."""
    leaves = x | {k: x[k].detach().requires_grad_() for k in ("hidden", "weight")}
    contender(leaves).backward()
    return leaves


def check(case: str) -> None:
    """Every contender's dhidden on a small case, against float64; loose, for peers round more than
    we do.
    """
    contenders, dtype = CASES[case]
    x = make_inputs(CHECKED, DTYPES[dtype])
    wide = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    truth_of = _reference_kl if contenders is KL else naive_grpo
    truth = forward_backward(truth_of, wide)["hidden"].grad
    for name, contender in contenders.items():
        grad = forward_backward(contender, x)["hidden"].grad
        error = (grad.double() - truth).norm() / truth.norm()
        assert error < 0.3, f"{case}: {name} is off by {error:.1%}"


def _reference_kl(x: Inputs) -> Tensor:
    with torch.no_grad():
        t = (x["teacher"] @ x["weight"].T).log_softmax(-1)
    s = (x["hidden"] @ x["weight"].T).log_softmax(-1)
    return reference.divergence("forward_kl", t, s).mean()


@pytest.fixture(scope="module")
def inputs() -> Callable[[str], Inputs]:
    """Inputs of a case, made once, after its contenders passed their check and a first full
    pass.
    """
    made: dict[str, Inputs] = {}

    def of(case: str) -> Inputs:
        if case not in made:
            check(case)
            made.clear()
            made[case] = make_inputs(SHAPE, DTYPES[CASES[case][1]])
            for name in ("Liger-Kernel", "Liger-Kernel (no entropy)"):  # torch.compile
                if name in CASES[case][0]:
                    forward_backward(CASES[case][0][name], made[case])
        return made[case]

    return of


def cases() -> list[tuple[str, int, str]]:
    """Case by case, turn by turn, all contenders."""
    return [
        (case, turn, name)
        for case, (contenders, _) in CASES.items()
        for turn in range(TURNS)
        for name in [*contenders, *LIMITS]
    ]


@pytest.mark.parametrize(("case", "turn", "contender"), cases())
def bench_policy_head(benchmark, inputs, case, turn, contender):
    x = inputs(case)
    contenders, _ = CASES[case]

    def run() -> None:
        start = time.process_time()
        if contender in LIMITS:
            LIMITS[contender](x, dual=contenders is KL)
        else:
            forward_backward(contenders[contender], x)
        benchmark.extra_info["cpu_s"] = time.process_time() - start

    benchmark.extra_info |= {"contender": contender, "shape": str(SHAPE), "case": case}
    benchmark.pedantic(run, rounds=1)
    if turn == 0 and contender in contenders:
        benchmark.extra_info |= measure_alone(case, contender)


def measure_alone(case: str, contender: str) -> dict[str, float]:
    """Peak MiB beyond inputs and gradients, and errors against float64, in a fresh process."""
    code = f"from benchmarks.bench_policy_head import alone; alone({case!r}, {contender!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peak_mib, dhidden, dweight = map(float, done.stdout.split()[-3:])
    return {"peak_mib": peak_mib, "dhidden_error": dhidden, "dweight_error": dweight}


def _kib(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def alone(case: str, contender: str) -> None:
    """Print them; the error is of a tenth of the tokens, for float64 takes long."""
    contenders, dtype = CASES[case]
    x = make_inputs(SHAPE, DTYPES[dtype])
    few = x | {k: x[k][: SHAPE.N // 8] for k in ("hidden", "teacher", "targets")}
    ours = forward_backward(contenders[contender], few)  # and torch.compile's memory is behind us
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    clear.write_text("5")  # the peak begins anew; ru_maxrss would be the parent's too
    before = _kib(status, "VmRSS")
    forward_backward(contenders[contender], x)
    gradients = sum(x[k].numel() * x[k].element_size() for k in ("hidden", "weight"))
    peak = _kib(status, "VmHWM") - before - gradients / 1024
    wide = {k: v.double() if v.is_floating_point() else v for k, v in few.items()}
    truth = forward_backward(_reference_kl if contenders is KL else naive_grpo, wide)
    errors = [
        ((ours[k].grad.double() - truth[k].grad).norm() / truth[k].grad.norm()).item()
        for k in ("hidden", "weight")
    ]
    print(peak / 1024, *errors)
