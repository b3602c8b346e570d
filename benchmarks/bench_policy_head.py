"""policy_head, forward and backward with every gradient, against plain PyTorch and the GEMMs alone.

Run by `make bench`. Contenders take turns, one pass each, so that a busy neighbour hits all alike;
harness.py takes
medians over the turns. Legend: N tokens, D hidden, V vocabulary.
"""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import SMOLLM2_135M, Shape
from fdfast import TeacherHidden, policy_head, reference

TURNS = 5
SHAPE = SMOLLM2_135M
CHECKED = Shape("check", 64, 64, 1032)  # what every contender must get right before it is timed


def make_inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Peaked logits and a teacher near the student: mean KL 0.1 to 0.3."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    weight = normal(shape.V, shape.D) / shape.D**0.5
    targets = torch.randint(0, shape.V, (shape.N,), generator=generator)
    hidden = 2.0 * normal(shape.N, shape.D) + 6.0 * weight[targets]
    teacher = hidden + 0.5 * normal(shape.N, shape.D)
    inputs = {"hidden": hidden, "weight": weight, "teacher": teacher}
    return {name: x.to(dtype) for name, x in inputs.items()} | {"targets": targets}


def ours(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """fdfast on the CPU backend, 64 MiB of workspace."""
    teacher = TeacherHidden(x["teacher"], x["weight"])
    return policy_head(
        x["hidden"], x["weight"], x["targets"], teacher=teacher, backend="cpu"
    ).divergence.mean()


def filtered(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same with at most 3 % of each token's |dlogits| dropped."""
    teacher = TeacherHidden(x["teacher"], x["weight"])
    return policy_head(
        x["hidden"], x["weight"], x["targets"], teacher=teacher, backend="cpu", grad_filter=0.03
    ).divergence.mean()


def naive(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """What one writes first: float32 logits of both, stored."""
    s = (x["hidden"].float() @ x["weight"].float().T).log_softmax(-1)
    with torch.no_grad():
        t = (x["teacher"].float() @ x["weight"].float().T).log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean()


CONTENDERS: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]] = {
    "ours": ours,
    "ours, filter 0.03": filtered,
    "naive PyTorch": naive,
}


def forward_backward(contender: str, x: dict[str, torch.Tensor]) -> None:
    """One pass with the gradients of hidden and weight."""
    leaves = x | {k: x[k].detach().requires_grad_() for k in ("hidden", "weight")}
    CONTENDERS[contender](leaves).backward()


def gemm_limit(x: dict[str, torch.Tensor]) -> None:
    """The four GEMMs that any exact loss with logits kept needs: two of logits, dhidden,
    dweight.
    """
    for rows in torch.arange(len(x["hidden"])).split(256):
        hidden, weight = x["hidden"][rows], x["weight"]
        dlogits = hidden @ weight.T
        x["teacher"][rows] @ weight.T
        dlogits @ weight
        dlogits.T @ hidden


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Made once, after every contender passed the check: no number is printed for a wrong one."""
    small = make_inputs(CHECKED)
    truth = reference.divergence(
        "forward_kl",
        (small["teacher"].double() @ small["weight"].double().T).log_softmax(-1),
        (small["hidden"].double() @ small["weight"].double().T).log_softmax(-1),
    ).mean()
    for name, contender in CONTENDERS.items():
        assert contender(small).item() == pytest.approx(truth.item(), rel=1e-4), name
    return make_inputs(SHAPE)


@pytest.mark.parametrize("contender", [*CONTENDERS, "limit: 4 GEMMs"])
@pytest.mark.parametrize("turn", range(TURNS))
def bench_forward_kl_float32(benchmark, inputs, contender, turn):
    def run() -> None:
        start = time.process_time()
        if contender in CONTENDERS:
            forward_backward(contender, inputs)
        else:
            gemm_limit(inputs)
        benchmark.extra_info["cpu_s"] = time.process_time() - start

    benchmark.extra_info |= {
        "contender": contender,
        "shape": str(SHAPE),
        "case": "forward KL, float32",
    }
    benchmark.pedantic(run, rounds=1)
    if turn == 0 and contender in CONTENDERS:
        benchmark.extra_info["peak_mib"] = peak_mib(contender)


def peak_mib(contender: str) -> float:
    """MiB beyond inputs and gradients at the peak of one pass, in a fresh process."""
    code = (
        "import resource, torch; from benchmarks.bench_policy_head import *;"
        "x = make_inputs(SHAPE); forward_backward('ours', make_inputs(CHECKED));"
        "held = [torch.ones_like(x[k]) for k in ('hidden', 'weight')];"  # room of the gradients
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; del held;"
        f"forward_backward({contender!r}, x);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024
