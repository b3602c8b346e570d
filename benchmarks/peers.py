"""The peers' fused losses, each called as its own documentation says, on the inputs of a benchmark.

They come with the extra `peers`. A function takes the inputs and returns the loss; autograd does
the rest.
Legend: N tokens, D hidden, V vocabulary.
"""

import functools
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import on_policy_loss
from benchmarks.data import Inputs

PACKAGES = ("liger-kernel", "trl", "cut-cross-entropy")


def lacking(package: str, *, cuda_only: bool = False, device: str = "cpu") -> str:
    """Why a peer cannot run here; "" if it can."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"{package} is not installed: pip install 'fdfast[peers]'"
    if cuda_only and device != "cuda":
        return "its kernels are Triton's and want a CUDA GPU"
    return ""


def versions() -> dict[str, str]:
    """The installed peers."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


@functools.cache
def _liger_jsd() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # beta=0 is KL(teacher || student); torch.compile, its default, is warmed up before it is timed.
    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)


def liger_kl(x: Inputs) -> Tensor:
    """Liger-Kernel's chunked distillation loss; logits in the dtype of the inputs."""
    loss: Tensor = _liger_jsd()(x["hidden"], x["weight"], x["teacher"], x["weight"], x["targets"])
    return loss


def trl_kl(x: Inputs) -> Tensor:
    """TRL's ChunkedDivergence: float32 tiles, projected again in the backward pass."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        x["hidden"], x["weight"], None, x["teacher"], x["weight"], None, 0.0
    )
    return divergence.mean()


@functools.cache
def _liger_grpo() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")


def liger_grpo(x: Inputs) -> Tensor:
    """Liger-Kernel's chunked GRPO loss: B sequences of L tokens; entropy is not in it."""
    B = len(x["advantages"])
    shape = (B, len(x["targets"]) // B)
    loss, _ = _liger_grpo()(
        x["hidden"].view(*shape, -1),
        x["weight"],
        x["targets"].view(shape),
        torch.ones(shape, device=x["targets"].device),
        x["advantages"],
    )
    return loss


def trl_grpo(x: Inputs) -> Tensor:
    """TRL's ChunkedLogProb with the on-policy GRPO loss after it; entropy without gradient."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # The tile that TRL's own trainer takes.
    logprobs = ChunkedLogProbFunction.apply(
        x["hidden"], x["weight"], None, x["targets"], 1.0, 32768, None, 1.0, ("entropy",)
    )[0]
    return on_policy_loss(logprobs, x["advantages"])


def cce_grpo(x: Inputs, *, impl: str) -> Tensor:
    """cut-cross-entropy's log-probabilities with the same loss after them; it has no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(x["hidden"], x["weight"], x["targets"], reduction="none", impl=impl)
    return on_policy_loss(-nll, x["advantages"])
