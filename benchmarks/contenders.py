"""Ours, plain PyTorch and the GEMMs alone: the losses of the benchmark, each from the same inputs.

A loss takes the inputs of data.py and returns a scalar; autograd does the rest.
Legend: N tokens, D hidden, V vocabulary, R tokens and B columns of a block.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.data import Inputs, first_tokens
from fdfast import FeedbackDistillationLoss, GRPOLoss, TeacherHidden, policy_head, reference
from fdfast.cpu import gemm
from fdfast.types import DEFAULT_WORKSPACE_MB

ENTROPY_COEF = 1e-3
Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss and its gradients.

    Attributes:
        name: in the tables.
        loss: from inputs to a scalar.
        truth: the same loss by the obvious formula, for float64.
        backend: who computes: `fdfast cpu`, `torch`, a peer's package.
        tolerance: relative error of dhidden and dweight that a small case may show.
        compiled: torch.compile is in it, so that a new shape costs seconds once.
        fewer_turns: it takes so long that it gets a turn less.
        lacks: why it cannot run here; "" if it can.
    """

    name: str
    loss: Loss
    truth: Loss
    backend: str
    tolerance: float
    compiled: bool = False
    fewer_turns: bool = False
    lacks: str = ""

    def run(self, x: Inputs) -> dict[str, Tensor]:
        """One pass; dhidden and dweight."""
        return gradients(self.loss, x)


def gradients(loss: Loss, x: Inputs) -> dict[str, Tensor]:
    """dhidden (N, D) and dweight (V, D) of a loss."""
    leaves = {k: x[k].detach().requires_grad_() for k in ("hidden", "weight")}
    loss(x | leaves).backward()
    return {f"d{k}": leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}


def backend_of(x: Inputs) -> str:
    """Ours, for the device on which the inputs lie."""
    return "triton" if x["hidden"].is_cuda else "cpu"


def ours_kl(
    x: Inputs, *, grad_filter: float | None = None, workspace_mb: float = DEFAULT_WORKSPACE_MB
) -> Tensor:
    """FeedbackDistillationLoss: gradients taken on the way where that fits the workspace."""
    loss = FeedbackDistillationLoss(
        grad_filter=grad_filter, workspace_mb=workspace_mb, backend=backend_of(x)
    )
    teacher = TeacherHidden(x["teacher"], x["weight"])
    return loss(x["hidden"], x["weight"], x["targets"], teacher).loss


def recompute_kl(x: Inputs) -> Tensor:
    """policy_head with a loss after it: logits projected again in the backward pass."""
    teacher = TeacherHidden(x["teacher"], x["weight"])
    head = policy_head(
        x["hidden"], x["weight"], x["targets"], teacher=teacher, backend=backend_of(x)
    )
    return head.divergence.mean()


def naive_kl(x: Inputs) -> Tensor:
    """What one writes first, with float32 softmaxes; the logits have the dtype of the inputs."""
    s = _log_softmax(x["hidden"] @ x["weight"].T)
    with torch.no_grad():
        t = _log_softmax(x["teacher"] @ x["weight"].T)
    return (t.exp() * (t - s)).sum(-1).mean()


def true_kl(x: Inputs) -> Tensor:
    """The reference's formula: the truth, given float64."""
    with torch.no_grad():
        t = (x["teacher"] @ x["weight"].T).log_softmax(-1)
    s = (x["hidden"] @ x["weight"].T).log_softmax(-1)
    return reference.divergence("forward_kl", t, s).mean()


def ours_grpo(
    x: Inputs, *, grad_filter: float | None = None, workspace_mb: float = DEFAULT_WORKSPACE_MB
) -> Tensor:
    """GRPOLoss with a differentiable entropy bonus."""
    B = len(x["advantages"])
    shape = (B, len(x["targets"]) // B)
    loss = GRPOLoss(
        loss_type="bnpo",
        entropy_coef=ENTROPY_COEF,
        grad_filter=grad_filter,
        workspace_mb=workspace_mb,
        backend=backend_of(x),
    )
    hidden, targets = x["hidden"].view(*shape, -1), x["targets"].view(shape)
    return loss(hidden, x["weight"], targets, x["advantages"]).loss


def naive_grpo(x: Inputs, *, entropy_coef: float = ENTROPY_COEF) -> Tensor:
    """The same with stored float32 log-probabilities; the truth too, given float64."""
    log_p = _log_softmax(x["hidden"] @ x["weight"].T)
    logprobs = log_p.gather(1, x["targets"][:, None])[:, 0]
    loss = on_policy_loss(logprobs, x["advantages"])
    if entropy_coef:
        loss = loss + entropy_coef * (log_p.exp() * log_p).sum(-1).mean()
    return loss


def on_policy_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Mean over tokens of -ratio * advantage, the ratio 1 but for its gradient."""
    each = advantages.repeat_interleave(len(logprobs) // len(advantages))
    return -((logprobs - logprobs.detach()).exp() * each).mean()


def _log_softmax(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)


@functools.cache
def _compiled(loss: Loss) -> Loss:
    made: Loss = torch.compile(loss)
    return made


def by_compiler(loss: Loss, x: Inputs) -> Tensor:
    """torch.compile of a loss, compiled when a shape is new."""
    return _compiled(loss)(x)


def gemms(x: Inputs, *, dual: bool, R: int, B: int) -> None:
    """The GEMMs that any exact loss needs: logits (of both), dhidden, dweight, in blocks of R x
    B.
    """
    hidden, weight, teacher = (x[k].detach() for k in ("hidden", "weight", "teacher"))
    N, V = len(hidden), len(weight)
    dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight)
    dlogits = torch.zeros(min(R, N) * min(B, V), dtype=weight.dtype, device=weight.device)
    for columns in map(slice, range(0, V, B), range(B, V + B, B)):
        w_BD, dw_BD = weight[columns], dweight[columns]
        for rows in map(slice, range(0, N, R), range(R, N + R, R)):
            h_RD = hidden[rows]
            d_RB = dlogits[: len(h_RD) * len(w_BD)].view(len(h_RD), len(w_BD))
            torch.mm(h_RD, w_BD.T, out=d_RB)
            if dual:
                torch.mm(teacher[rows], w_BD.T, out=d_RB)
            dhidden[rows].addmm_(d_RB, w_BD)
            dw_BD.addmm_(d_RB.T, h_RD)


@dataclass
class Limit:
    """The GEMMs alone by one library, in the blocking that a trial on these inputs found best.

    Attributes:
        name: in the tables.
        dual: whether a teacher is projected too.
        onednn: float32 by oneDNN instead of PyTorch's default.
        wide: bfloat16 inputs as float32, as float32 logits want them.
    """

    name: str
    dual: bool
    onednn: bool = False
    wide: bool = False
    blocking: tuple[int, int] | None = field(default=None, init=False)

    def prepare(self, x: Inputs) -> str:
        """Choose the blocking on an eighth of the work; returns it in words."""
        N, V = len(x["hidden"]), len(x["weight"])
        seconds: dict[tuple[int, int], float] = {}
        for R, B in ((min(256, N), V), (N, 1024), (N, 4096), (min(256, N), 4096)):
            part = first_tokens(x, N // 8) if B == V else x | {"weight": x["weight"][: V // 8]}
            if not seconds:
                self._pass(part, R, B)  # the libraries set themselves up
            _wait(x)
            start = time.perf_counter()
            self._pass(part, R, B)
            _wait(x)
            seconds[R, B] = time.perf_counter() - start
        self.blocking = min(seconds, key=lambda blocking: seconds[blocking])
        return f"best of {len(seconds)} blockings: {self.blocking[0]} x {self.blocking[1]}"

    def run(self, x: Inputs) -> None:
        """One pass."""
        assert self.blocking is not None, "prepare comes first"
        self._pass(x, *self.blocking)

    def _pass(self, x: Inputs, R: int, B: int) -> None:
        if self.wide:
            x = x | {k: x[k].float() for k in ("hidden", "weight", "teacher")}
        with gemm.fast_gemms(True) if self.onednn else contextlib.nullcontext():
            gemms(x, dual=self.dual, R=R, B=B)


def _wait(x: Inputs) -> None:
    if x["hidden"].is_cuda:
        torch.cuda.synchronize()
