"""The obvious formula of every operation: logits stored, plain autograd. The truth for tests and
benchmarks.

Call it with float64 tensors for the truth, with float32 or bfloat16 for what plain PyTorch with
float32 logits gives.
Legend: ... any leading shape, N tokens, D hidden, V vocabulary, K top-k, B sequences, L positions.
"""

from collections.abc import Callable
from math import comb

import torch
from torch import Tensor

from fdfast.divergences import NEG_INF, TABLE
from fdfast.types import Forest, Head, HeadOptions, TeacherTopK


def statistics_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 as soon as one tensor is, else float32: logits and statistics are never narrower."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def logits(head: Head, *, temperature: float = 1.0, logit_softcap: float | None = None) -> Tensor:
    """Tempered logits (N, V) in the statistics dtype: softcap first (as Gemma's head does), then
    the temperature.
    """
    dtype = statistics_dtype(head.hidden_ND, head.weight_VD)
    logits_NV = head.hidden_ND.to(dtype) @ head.weight_VD.to(dtype).T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.to(dtype)
    if logit_softcap is not None:
        logits_NV = logit_softcap * torch.tanh(logits_NV / logit_softcap)
    return logits_NV / temperature


def logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target), (N,)."""
    return logits_NV.log_softmax(-1).gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)


def entropy(logits_NV: Tensor) -> Tensor:
    """-sum p log p in nats, (N,); an impossible token adds 0."""
    log_p_NV = logits_NV.log_softmax(-1)
    return -(log_p_NV.exp() * log_p_NV.masked_fill(log_p_NV == NEG_INF, 0.0)).sum(-1)


def divergence(name: str, t_NV: Tensor, s_NV: Tensor, *, alpha: float = 0.5) -> Tensor:
    """The row `name` of divergences.TABLE from log-probabilities of teacher and student, (N,)."""
    return TABLE[name].terms(t_NV, s_NV, alpha).sum(-1)


def divergence_on_topk(
    name: str,
    t_NK: Tensor,
    s_NK: Tensor,
    s_tail_N: Tensor | None,
    *,
    alpha: float = 0.5,
    tail: str = "truncate",
) -> Tensor:
    """The divergence seen through the teacher's K most likely tokens, (N,).

    truncate: the sum runs over the K tokens only (arXiv 2605.30861); it can be negative.
    bucket: the rest of the vocabulary is one more outcome, so it is a divergence again, 0 at p_S =
    p_T.
    renormalize: both distributions are conditioned on the K tokens.

    Args:
        name: a name in divergences.TABLE.
        t_NK: the teacher's log-probabilities of its K tokens.
        s_NK: the student's of the same tokens.
        s_tail_N: the student's log-probability of all others together; bucket alone needs it.
        alpha: for jsd and skew_kl.
        tail: see above.
    """
    if tail == "bucket":
        assert s_tail_N is not None
        # A peaked teacher's rounded mass reaches 1; a tail of exactly 0 would make reverse_kl inf.
        most = 1.0 - torch.finfo(t_NK.dtype).eps
        t_tail_N1 = torch.log1p(-t_NK.exp().sum(-1, keepdim=True).clamp(max=most))
        t_NK, s_NK = torch.cat([t_NK, t_tail_N1], -1), torch.cat([s_NK, s_tail_N[:, None]], -1)
    elif tail == "renormalize":
        t_NK, s_NK = t_NK.log_softmax(-1), s_NK.log_softmax(-1)
    return TABLE[name].terms(t_NK, s_NK, alpha).sum(-1)


def divergence_topk(
    name: str, teacher: TeacherTopK, s_NV: Tensor, *, alpha: float = 0.5, tail: str = "truncate"
) -> Tensor:
    """`divergence_on_topk` from the student's log-probabilities of the whole vocabulary, (N,)."""
    s_NK = s_NV.gather(-1, teacher.ids)
    s_tail_N = s_NV.scatter(-1, teacher.ids, NEG_INF).logsumexp(-1)
    t_NK = teacher.logprobs.to(s_NV.dtype)
    return divergence_on_topk(name, t_NK, s_NK, s_tail_N, alpha=alpha, tail=tail)


def filter_gradient(gradient_NV: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Zero the smallest |gradient| of each row while their sum stays within `share` of the row's.

    Returns:
        The filtered gradient (N, V), and the share dropped from each row (N,).
    """
    magnitude_NV, order_NV = gradient_NV.abs().sort(-1)
    total_N1 = magnitude_NV.sum(-1, keepdim=True)
    small_NV = magnitude_NV.cumsum(-1) <= share * total_N1
    drop_NV = torch.zeros_like(small_NV).scatter(-1, order_NV, small_NV)
    dropped_N = (magnitude_NV * small_NV).sum(-1) / total_N1.squeeze(-1).clamp(
        min=torch.finfo(gradient_NV.dtype).tiny
    )
    return gradient_NV.masked_fill(drop_NV, 0.0), dropped_N


def policy_head(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    report_dropped: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, divergence, teacher_mass and argmax of flat, unmasked tokens, each (N,),
    by autograd.

    With a grad filter, `report_dropped` receives the dropped share, (N,), when the backward pass
    gets there.
    """
    z_NV = logits(student, temperature=options.temperature, logit_softcap=options.logit_softcap)
    share = options.grad_filter
    if share is not None and z_NV.requires_grad:

        def keep_the_large(gradient_NV: Tensor) -> Tensor:
            filtered_NV, dropped_N = filter_gradient(gradient_NV, share)
            report_dropped(dropped_N)
            return filtered_NV

        z_NV.register_hook(keep_the_large)  # type: ignore[no-untyped-call]
    s_NV = z_NV.log_softmax(-1)
    divergence_N, mass_N = z_NV.new_zeros(len(z_NV)), z_NV.new_ones(len(z_NV))
    if isinstance(teacher, TeacherTopK):
        divergence_N = divergence_topk(
            options.divergence, teacher, s_NV, alpha=options.alpha, tail=options.tail
        )
        mass_N = teacher.logprobs.to(s_NV.dtype).exp().sum(-1)
    elif teacher is not None:
        with torch.no_grad():
            teacher_NV = logits(
                teacher,
                temperature=options.teacher_temperature,
                logit_softcap=options.logit_softcap,
            )
            t_NV = teacher_NV.log_softmax(-1).to(s_NV.dtype)
        divergence_N = divergence(options.divergence, t_NV, s_NV, alpha=options.alpha)
    return logprobs(z_NV, targets_N), entropy(z_NV), divergence_N, mass_N, z_NV.argmax(-1)


def topk_head(
    head: Head, k: int, *, temperature: float = 1.0, logit_softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ids (N, K), log-probabilities (N, K) and their summed probability (N,)."""
    z_NV = logits(head, temperature=temperature, logit_softcap=logit_softcap)
    top = z_NV.log_softmax(-1).topk(k, dim=-1)
    return top.indices, top.values, top.values.exp().sum(-1)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's non-negative, unbiased estimate of KL(policy || reference) from one sample,
    elementwise.

    http://joschu.net/blog/kl-approx.html: r - 1 - log r with r = p_ref / p.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_objective(
    loss_type: str,
    log_ratio: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> Tensor:
    """The GRPO family's loss of each token, before masks and normalisation, (B, L).

    grpo, bnpo, dr_grpo, dapo: -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), Shao et al.
    (2024), eq. 3, arXiv 2402.03300; they differ in normalisation alone. cispo: -sg(min(r,
    epsilon_high)) A log p, MiniMax-M1 (2025), eq. 4, arXiv 2506.13585. sapo: -A sigmoid(tau (r -
    1)) 4 / tau, Gao et al. (2025), arXiv 2511.20347. Names and conventions are TRL's, so
    epsilon_high of cispo is the cap itself.

    Args:
        loss_type: as above.
        log_ratio: log r, (B, L), or (B, 1) for one ratio a sequence (GSPO, arXiv 2507.18071).
        advantages: A, broadcastable to (B, L).
        logprobs: log p of the policy, (B, L); only cispo reads it.
        epsilon: the lower clip range.
        epsilon_high: the upper clip range.
        sapo_temperature_pos: tau where A > 0.
        sapo_temperature_neg: tau where A <= 0.
    """
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=epsilon_high).detach() * advantages * logprobs
    elif loss_type == "sapo":
        tau_pos, tau_neg = (
            ratio.new_tensor(t) for t in (sapo_temperature_pos, sapo_temperature_neg)
        )
        tau = torch.where(advantages > 0, tau_pos, tau_neg)
        loss = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    else:
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return loss.expand_as(logprobs)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k, 1 - C(n - c, k) / C(n, k): Chen et al. (2021), eq. 1, arXiv 2107.03374."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            "pass_at_k: wants 0 <= num_correct <= num_samples and 1 <= k <= num_samples; "
            f"got num_samples={num_samples}, num_correct={num_correct}, k={k}"
        )
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Softmax over a dense mask; see `fdfast.prefix_attention`."""
    kv_end, position_ids = forest.kv_end, forest.position_ids
    token = torch.arange(len(kv_end), device=kv_end.device)
    sees = (token <= token.unsqueeze(1)) & (token.unsqueeze(1) < kv_end)
    if sliding_window is not None:
        sees &= position_ids.unsqueeze(1) - position_ids < sliding_window
    dtype = statistics_dtype(query)
    T, H, E = query.shape
    K = key.shape[1]
    q = query.to(dtype).transpose(0, 1).reshape(K, H // K, T, E)
    k, v = (x.to(dtype).transpose(0, 1).unsqueeze(1) for x in (key, value))
    logits = (q @ k.mT * scale).masked_fill(~sees, -torch.inf)
    out: Tensor = logits.softmax(-1) @ v
    return out.flatten(0, 1).transpose(0, 1).to(query.dtype)
