"""The reference against torch's own functions, finite differences, closed forms and brute force.

Legend: N tokens, V vocabulary, K top-k, B sequences, L positions.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from fdfast import TeacherTopK, reference
from fdfast.divergences import TABLE, TAILS
from fdfast.types import Head
from tests.helpers import F32, F64, generator

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def two_logits(seed: int, N: int = 5, V: int = 17) -> tuple[Tensor, Tensor]:
    """Logits of teacher and student, (N, V) float64."""
    g = generator(seed)
    return torch.randn(N, V, generator=g, dtype=F64), torch.randn(N, V, generator=g, dtype=F64)


def test_logits_are_those_of_a_linear_layer_with_softcap_then_temperature() -> None:
    g = generator(1)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=F64) for s in ((4, 3), (7, 3), (7,)))
    plain = F.linear(hidden, weight, bias)
    head = Head(hidden, weight, bias)
    torch.testing.assert_close(reference.logits(head), plain, **EXACT)
    ours = reference.logits(head, temperature=0.5, logit_softcap=3.0)
    torch.testing.assert_close(ours, 3.0 * torch.tanh(plain / 3.0) / 0.5, **EXACT)
    without = reference.logits(Head(hidden, weight, None))
    torch.testing.assert_close(without, hidden @ weight.T, **EXACT)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, F32), (torch.float16, F32), (F32, F32), (F64, F64)]
)
def test_logits_are_never_narrower_than_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    head = Head(torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype), None)
    assert reference.logits(head).dtype == wide
    assert reference.statistics_dtype(head.hidden_ND, None) == wide


def test_logprobs_and_entropy_are_torchs_with_their_gradients() -> None:
    z, _ = two_logits(2)
    targets = torch.randint(17, (5,), generator=generator(3))
    upstream = torch.randn(5, generator=generator(4), dtype=F64)
    for ours, theirs in (
        (
            lambda z: reference.logprobs(z, targets),
            lambda z: -F.cross_entropy(z, targets, reduction="none"),
        ),
        (
            lambda z: reference.logprobs(z, targets),
            lambda z: Categorical(logits=z).log_prob(targets),
        ),
        (reference.entropy, lambda z: Categorical(logits=z).entropy()),
    ):
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        torch.testing.assert_close(ours(a), theirs(b), **EXACT)
        (ours(a) * upstream).sum().backward()
        (theirs(b) * upstream).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, **EXACT)


def test_an_impossible_token_adds_nothing_to_entropy_nor_its_gradient() -> None:
    z = torch.tensor([[0.3, -math.inf, 1.0]], dtype=F64, requires_grad=True)
    short = torch.tensor([[0.3, 1.0]], dtype=F64, requires_grad=True)
    torch.testing.assert_close(reference.entropy(z), reference.entropy(short), **EXACT)
    reference.entropy(z).sum().backward()
    reference.entropy(short).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad[:, [0, 2]], short.grad, **EXACT)
    assert z.grad[0, 1] == 0


def by_torch(name: str, t_z: Tensor, s_z: Tensor, alpha: float) -> Tensor:
    """Each divergence by torch.nn.functional.kl_div, or torch.distributions for the plain two."""
    t, s = t_z.log_softmax(-1), s_z.log_softmax(-1)
    m = (alpha * t.exp() + (1 - alpha) * s.exp()).log()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    return {
        "forward_kl": lambda: kl_divergence(Categorical(logits=t_z), Categorical(logits=s_z)),
        "reverse_kl": lambda: kl_divergence(Categorical(logits=s_z), Categorical(logits=t_z)),
        "jsd": lambda: alpha * kl(t, m) + (1 - alpha) * kl(s, m),
        "skew_kl": lambda: kl(t, m),
    }[name]()


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_every_divergence_is_torchs(name: str, alpha: float) -> None:
    t_z, s_z = two_logits(5)
    ours = reference.divergence(name, t_z.log_softmax(-1), s_z.log_softmax(-1), alpha=alpha)
    torch.testing.assert_close(ours, by_torch(name, t_z, s_z, alpha), **EXACT)
    assert (ours > 0).all()


def printed_gradient(name: str, t_z: Tensor, s_z: Tensor, alpha: float) -> Tensor:
    """The gradient column of divergences.TABLE, in numbers."""
    t, s = t_z.log_softmax(-1), s_z.log_softmax(-1)
    p_t, p_s = t.exp(), s.exp()
    p_m = alpha * p_t + (1 - alpha) * p_s
    m = p_m.log()
    ratio = p_t / p_m
    return {
        "forward_kl": p_s - p_t,
        "reverse_kl": p_s * (s - t - (p_s * (s - t)).sum(-1, keepdim=True)),
        "jsd": (1 - alpha) * p_s * (s - m - (p_s * (s - m)).sum(-1, keepdim=True)),
        "skew_kl": (1 - alpha) * p_s * ((p_s * ratio).sum(-1, keepdim=True) - ratio),
    }[name]


@pytest.mark.parametrize("name", TABLE)
def test_every_divergence_has_the_gradient_its_row_prints_and_finite_differences(name: str) -> None:
    t_z, s_z = two_logits(6)
    t = t_z.log_softmax(-1)
    s_z.requires_grad_()
    (ours,) = torch.autograd.grad(
        reference.divergence(name, t, s_z.log_softmax(-1), alpha=0.3).sum(), s_z
    )
    torch.testing.assert_close(ours, printed_gradient(name, t_z, s_z, 0.3).detach(), **EXACT)
    # Central differences, by hand: gradcheck would use the same autograd.
    step, numbers = 1e-5, torch.zeros_like(ours)
    for v in range(s_z.shape[-1]):
        nudge = torch.zeros_like(s_z)
        nudge[:, v] = step
        up, down = (
            reference.divergence(name, t, (s_z.detach() + d).log_softmax(-1), alpha=0.3)
            for d in (nudge, -nudge)
        )
        numbers[:, v] = (up - down) / (2 * step)
    torch.testing.assert_close(ours, numbers, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_the_row_of_the_table_is_complete(name: str) -> None:
    row = TABLE[name]
    assert row.name == name
    assert [r.code for r in TABLE.values()] == list(range(len(TABLE)))
    assert row.needs_alpha == ("a" in row.formula.split("M =")[-1] and "M =" in row.formula)
    assert "arXiv" in row.source or "2605.30861" in row.source


def top(t_z: Tensor, K: int) -> TeacherTopK:
    kept = t_z.log_softmax(-1).topk(K, -1)
    return TeacherTopK(kept.indices, kept.values)


def gradient_on_topk(name: str, teacher: TeacherTopK, s_z: Tensor, tail: str) -> Tensor:
    s_z = s_z.clone().requires_grad_()
    value = reference.divergence_topk(name, teacher, s_z.log_softmax(-1), tail=tail)
    (gradient,) = torch.autograd.grad(value.sum(), s_z)
    return gradient


def test_the_truncated_gradient_is_the_papers() -> None:
    # M p_S - p_T 1[K], and 2 M (1 - M) in L1 where p_S = p_T.
    t_z, s_z = two_logits(7)
    teacher = top(t_z, 4)
    mass = teacher.logprobs.exp().sum(-1, keepdim=True)
    kept_p_t = torch.zeros_like(s_z).scatter(-1, teacher.ids, teacher.logprobs.exp())
    ours = gradient_on_topk("forward_kl", teacher, s_z, "truncate")
    torch.testing.assert_close(ours, mass * s_z.softmax(-1) - kept_p_t, **EXACT)
    at_equality = gradient_on_topk("forward_kl", teacher, t_z, "truncate")
    torch.testing.assert_close(
        at_equality.abs().sum(-1), (2 * mass * (1 - mass)).squeeze(-1), **EXACT
    )


def test_the_truncated_divergence_may_be_negative_and_is_not_clamped() -> None:
    teacher = TeacherTopK(torch.tensor([[0]]), torch.tensor([[math.log(0.25)]], dtype=F64))
    s_z = torch.tensor([[2.0, 1.0, 1.0, 1.0]], dtype=F64)
    value = reference.divergence_topk("forward_kl", teacher, s_z.log_softmax(-1))
    p_t, p_s = 0.25, math.e / (math.e + 3)
    assert value.item() == pytest.approx(p_t * math.log(p_t / p_s), rel=1e-12)
    assert value.item() < 0


@pytest.mark.parametrize("name", TABLE)
def test_bucket_and_renormalize_are_zero_with_zero_gradient_at_equality(name: str) -> None:
    t_z, _ = two_logits(8)
    for tail in ("bucket", "renormalize"):
        value = reference.divergence_topk(name, top(t_z, 4), t_z.log_softmax(-1), tail=tail)
        assert value.abs().max() < 1e-15
        assert gradient_on_topk(name, top(t_z, 4), t_z, tail).abs().max() < 1e-15


@pytest.mark.parametrize("name", TABLE)
def test_bucket_and_renormalize_are_divergences_of_their_own_distributions(name: str) -> None:
    t_z, s_z = two_logits(9)
    teacher = top(t_z, 4)
    others = torch.ones_like(s_z, dtype=torch.bool).scatter(-1, teacher.ids, False)

    def with_bucket(z: Tensor) -> Tensor:
        p = z.softmax(-1)
        return torch.cat([p.gather(-1, teacher.ids), (p * others).sum(-1, keepdim=True)], -1).log()

    def kept(z: Tensor) -> Tensor:
        p = z.softmax(-1).gather(-1, teacher.ids)
        return (p / p.sum(-1, keepdim=True)).log()

    for tail, distribution in (("bucket", with_bucket), ("renormalize", kept)):
        a, b = s_z.clone().requires_grad_(), s_z.clone().requires_grad_()
        ours = reference.divergence_topk(name, teacher, a.log_softmax(-1), tail=tail)
        plain = by_torch(name, distribution(t_z), distribution(b), 0.5)
        torch.testing.assert_close(ours, plain, **EXACT)
        ours.sum().backward()
        plain.sum().backward()
        torch.testing.assert_close(a.grad, b.grad, **EXACT)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("tail", TAILS)
def test_outcomes_that_neither_can_reach_count_for_nothing(name: str, tail: str) -> None:
    t_z, s_z = two_logits(10)
    far = torch.full((5, 3), -math.inf, dtype=F64)
    wide_t, wide_s = torch.cat([far, t_z], -1), torch.cat([far, s_z], -1)
    ours = reference.divergence(name, wide_t.log_softmax(-1), wide_s.log_softmax(-1))
    torch.testing.assert_close(ours, by_torch(name, t_z, s_z, 0.5), **EXACT)
    narrow = gradient_on_topk(name, top(t_z, 4), s_z, tail)
    wide = gradient_on_topk(name, top(wide_t, 4), wide_s, tail)
    torch.testing.assert_close(wide[:, 3:], narrow, **EXACT)
    assert (wide[:, :3] == 0).all()


def test_k3_is_non_negative_zero_at_equality_unbiased_and_exact_when_small() -> None:
    _, s_z = two_logits(11, 1, 9)
    r_z, _ = two_logits(12, 1, 9)
    p, r = s_z.log_softmax(-1)[0], r_z.log_softmax(-1)[0]
    each = reference.k3(p, r)
    assert (each >= 0).all()
    assert (reference.k3(p, p) == 0).all()
    expected = (p.exp() * each).sum()  # over every sample, so no estimate
    torch.testing.assert_close(expected, (p.exp() * (p - r)).sum(), **EXACT)
    near = torch.tensor([1e-3], dtype=F32)  # x^2 / 2: without expm1, float32 would lose it all
    assert reference.k3(near * 0, near).item() == pytest.approx(0.5e-6, rel=2e-2)


# log r, A, log p -> loss; epsilon 0.2 below, 0.3 above.
RATIOS = {"inside": 1.1, "below": 0.5, "above": 2.0}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.1, -2.0, 2.2, 2.2),
        (2.0, 2.0, -2.6, 0.0),  # clipped above: min(4, 1.3 * 2)
        (2.0, -2.0, 4.0, 4.0),  # a bad token grown likely is never clipped
        (0.5, 2.0, -1.0, -1.0),  # nor a good one grown unlikely
        (0.5, -2.0, 1.6, 0.0),  # clipped below: min(-1, 0.8 * -2)
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_objective_by_hand(
    loss_type: str, ratio: float, advantage: float, loss: float, slope: float
) -> None:
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=F64, requires_grad=True)
    ours = reference.token_objective(
        loss_type,
        log_ratio,
        torch.tensor([[advantage]], dtype=F64),
        log_ratio - 1.0,
        epsilon=0.2,
        epsilon_high=0.3,
    )
    (gradient,) = torch.autograd.grad(ours.sum(), log_ratio)  # d/d log r
    assert ours.item() == pytest.approx(loss, rel=1e-12)
    assert gradient.item() == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.1, 1.1), (9.0, 5.0)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand(ratio: float, weight: float, advantage: float) -> None:
    # The ratio is a weight without gradient, capped at epsilon_high; the gradient is log p's.
    logprobs = torch.tensor([[-0.7]], dtype=F64, requires_grad=True)
    log_ratio = logprobs + (math.log(ratio) + 0.7)
    ours = reference.token_objective(
        "cispo", log_ratio, torch.tensor([[advantage]], dtype=F64), logprobs, epsilon_high=5.0
    )
    (gradient,) = torch.autograd.grad(ours.sum(), logprobs)
    assert ours.item() == pytest.approx(-weight * advantage * -0.7, rel=1e-12)
    assert gradient.item() == pytest.approx(-weight * advantage, rel=1e-12)


@pytest.mark.parametrize("ratio", RATIOS.values())
@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.5), (-2.0, 1.05), (0.0, 1.05)])
def test_sapo_by_hand(ratio: float, advantage: float, tau: float) -> None:
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=F64, requires_grad=True)
    ours = reference.token_objective(
        "sapo",
        log_ratio,
        torch.tensor([[advantage]], dtype=F64),
        log_ratio,
        sapo_temperature_pos=1.5,
        sapo_temperature_neg=1.05,
    )
    (gradient,) = torch.autograd.grad(ours.sum(), log_ratio)
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    assert ours.item() == pytest.approx(-advantage * gate * 4 / tau, rel=1e-12)
    assert gradient.item() == pytest.approx(-advantage * 4 * gate * (1 - gate) * ratio, rel=1e-12)


def test_one_ratio_a_sequence_gives_every_token_its_objective() -> None:
    # GSPO: (B, 1) against advantages (B, 1) and logprobs (B, L).
    log_ratio = torch.tensor([[0.0], [math.log(2.0)]], dtype=F64)
    advantages, logprobs = torch.tensor([[1.0], [1.0]], dtype=F64), torch.zeros(2, 3, dtype=F64)
    ours = reference.token_objective("grpo", log_ratio, advantages, logprobs)
    torch.testing.assert_close(ours, torch.tensor([[-1.0] * 3, [-1.2] * 3], dtype=F64), **EXACT)


def test_pass_at_k_is_the_share_of_draws_with_a_success() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert reference.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_counts_that_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(
        ValueError, match=rf"pass_at_k: wants .*num_samples={n}, num_correct={c}, k={k}"
    ):
        reference.pass_at_k(n, c, k)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_filter_drops_the_smallest_within_its_share_and_as_many_as_fit(
    share: float, dtype: torch.dtype
) -> None:
    gradient = torch.randn(6, 50, generator=generator(13), dtype=F64).exp().to(dtype)
    gradient[1] = 0.0
    filtered, dropped = reference.filter_gradient(gradient, share)
    gone, rounding = filtered != gradient, 20 * torch.finfo(dtype).eps
    total = gradient.abs().sum(-1)
    torch.testing.assert_close(
        (gradient * gone).abs().sum(-1), dropped * total, rtol=1e-5, atol=rounding
    )
    assert (dropped <= share + rounding).all()
    assert dropped[1] == 0
    for row in (0, 2, 3, 4, 5):
        kept = gradient[row][~gone[row]].abs()
        if gone[row].any():
            assert gradient[row][gone[row]].abs().max() <= kept.min()
        assert dropped[row] + kept.min() / total[row] > share - rounding  # no more would fit


def test_topk_head_is_torchs_topk_of_stored_logits() -> None:
    g = generator(14)
    head = Head(torch.randn(4, 3, generator=g), torch.randn(9, 3, generator=g), None)
    ids, logprobs, mass = reference.topk_head(head, 3, temperature=0.7)
    plain = (head.hidden_ND @ head.weight_VD.T / 0.7).log_softmax(-1).topk(3)
    assert ids.equal(plain.indices)
    torch.testing.assert_close(logprobs, plain.values)
    torch.testing.assert_close(mass, plain.values.exp().sum(-1))
