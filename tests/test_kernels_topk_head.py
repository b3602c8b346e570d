"""topk_head and the token objective in Triton, under the interpreter.

Legend: N tokens, D hidden, V vocabulary, K top-k, B sequences, L positions.
"""

import pytest
import torch

pytest.importorskip("triton")

from fdfast import reference, topk_head
from fdfast.kernels import tiles
from fdfast.kernels.token_objective import token_objective_fwd
from fdfast.types import Head
from tests.helpers import BF16, DEVICES, F16, F32, generator

DEVICE = DEVICES["triton"]


@pytest.mark.parametrize("dtype", [F32, pytest.param(F16, marks=pytest.mark.slow), BF16])
@pytest.mark.parametrize(("k", "logit_softcap"), [(1, 2.0), (7, None), (128, 2.0)])
def test_topk_head_is_that_of_stored_logits(
    dtype: torch.dtype, k: int, logit_softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1,032 columns: not a multiple of any block; the workspace cuts tokens and vocabulary.
    for size in (2, 4):
        tile = tiles.Tile(16, 64, 16, 4, 1, split_v=128)
        monkeypatch.setitem(tiles.INTERPRET, ("topk", size), tile)
    g = generator(1)
    head = Head(
        torch.randn(37, 24, generator=g).to(dtype),
        torch.randn(1032, 24, generator=g).to(dtype),
        torch.randn(1032, generator=g).to(dtype),
    )
    options = {"temperature": 0.8, "logit_softcap": logit_softcap}
    truth = reference.topk_head(Head(*(x.double() for x in head)), k, **options)
    hidden, weight, bias = (x.to(DEVICE) for x in head)
    ids, logprobs, mass = (
        x.cpu()
        for x in topk_head(
            hidden, weight, k, bias=bias, workspace_mb=0.3, backend="triton", **options
        )
    )
    if logit_softcap is None:
        assert torch.equal(ids, truth[0])
    assert (logprobs - truth[1]).abs().max() < 1e-5
    assert (mass - truth[2]).abs().max() < 1e-5


def test_topk_head_of_forbidden_tokens_and_of_none_at_all() -> None:
    bias = torch.full((70,), float("-inf"), device=DEVICE)
    bias[:3] = 0.0
    hidden = torch.randn(2, 8, generator=generator(2)).to(DEVICE)
    weight = torch.zeros(70, 8, device=DEVICE)
    top = topk_head(hidden, weight, 5, bias=bias, backend="triton")
    assert (top.logprobs[:, 3:] == float("-inf")).all()
    assert (top.mass - 1.0).abs().max() < 1e-6
    assert topk_head(hidden[:0], weight, 5, bias=bias, backend="triton").ids.shape == (0, 5)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_token_objective_and_its_gradient_are_the_reference_s(
    loss_type: str, level: str, beta: float
) -> None:
    g = generator(3)
    B, L = 5, 9
    logprobs = torch.randn(B, L, generator=g, dtype=torch.float64).requires_grad_()
    per = (B, L) if level == "token" else (B, 1)
    log_ratio = (torch.randn(per, generator=g, dtype=torch.float64) * 0.4).requires_grad_()
    spread = log_ratio.expand(B, L).detach().requires_grad_()
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64)
    ref = torch.randn(B, L, generator=g, dtype=torch.float64)
    truth = reference.token_objective(loss_type, spread, advantages, logprobs, epsilon_high=0.28)
    truth = truth + beta * reference.k3(logprobs, ref)
    wanted = torch.autograd.grad(
        truth.sum(), (spread, logprobs), allow_unused=True, materialize_grads=True
    )
    ours = token_objective_fwd(
        loss_type,
        log_ratio.to(DEVICE),
        advantages.to(DEVICE),
        logprobs.float().to(DEVICE),
        ref_logprobs=ref.to(DEVICE) if beta else None,
        beta=beta,
        epsilon_high=0.28,
    )
    for mine, theirs in zip(ours, (truth, *wanted), strict=True):
        assert (mine.cpu() - theirs).abs().max() <= 4e-6 * theirs.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo"])
@pytest.mark.parametrize("spoiled", range(4))
def test_nan_in_a_row_of_the_token_objective_stays_in_it(loss_type: str, spoiled: int) -> None:
    # log_ratio, advantages, logprobs, ref_logprobs; logprobs alone do not reach every loss.
    given = list(torch.randn(4, 9, generator=generator(4)).to(DEVICE))

    def objective(given: list[torch.Tensor]) -> torch.Tensor:
        kinds = {"ref_logprobs": given[3], "beta": 0.1, "epsilon_high": 0.28}
        return torch.stack(token_objective_fwd(loss_type, *given[:3], **kinds)).cpu()

    whole = objective(given)
    given[spoiled] = given[spoiled].clone()
    given[spoiled][5] = float("nan")
    ours = objective(given)
    others = torch.arange(9) != 5
    assert torch.equal(ours[:, others], whole[:, others])
    assert ours[0, 5].isnan()
    assert ours[1:, 5].isnan().any()


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_type"):
        token_objective_fwd("ppo", *[torch.zeros(1)] * 3)
