"""`policy_head`: everything a post-training loss needs from the LM head, in one sweep and without a
[N, V] tensor.

Legend: ... any leading shape, M tokens, N trained (unmasked) tokens, D hidden, V vocabulary, K
top-k.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfast import reference
from fdfast.checks import check_head, check_ids, check_positive
from fdfast.dispatch import backend_for
from fdfast.divergences import TABLE, TAILS
from fdfast.policy_head_group import VocabularySlice, check_group
from fdfast.types import (
    DEFAULT_WORKSPACE_MB,
    Head,
    HeadOptions,
    PolicyHead,
    TeacherHidden,
    TeacherTopK,
)


class _PolicyHeadFunction(torch.autograd.Function):
    """The backend's forward and backward over flat tokens; the teacher is a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        rows_N: Tensor | None,
        teacher: Head | TeacherTopK | None,
        options: HeadOptions,
        backend: Any,
        report_dropped: Callable[[Tensor], None],
    ) -> tuple[Tensor, ...]:
        student = Head(hidden_MD, weight_VD, bias_V)
        fields, stats = backend.policy_head_fwd(student, targets_N, teacher, options, rows_N)
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, targets_N, rows_N)
        ctx.teacher, ctx.options, ctx.backend, ctx.stats = teacher, options, backend, stats
        ctx.report_dropped = report_dropped
        ctx.mark_non_differentiable(*fields[3:])
        return fields  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, bias_V, targets_N, rows_N = ctx.saved_tensors
        with torch.autocast(hidden_MD.device.type, enabled=False):
            dhidden_MD, dweight_VD, dbias_V, dropped_N = ctx.backend.policy_head_bwd(
                Head(hidden_MD, weight_VD, bias_V),
                targets_N,
                ctx.teacher,
                ctx.options,
                rows_N,
                ctx.stats,
                grads[:3],
                ctx.needs_input_grad[:3],
            )
        if ctx.options.grad_filter is not None:
            ctx.report_dropped(dropped_N)
        return dhidden_MD, dweight_VD, dbias_V, None, None, None, None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def policy_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    mask: Tensor | None = None,
    teacher: TeacherHidden | TeacherTopK | None = None,
    divergence: str = "forward_kl",
    alpha: float = 0.5,
    tail: str = "truncate",
    grad_filter: float | None = None,
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
    backend: str = "auto",
    group: Any = None,
) -> PolicyHead:
    """Log-probabilities, entropy and divergence to a teacher of every token, from hidden states.

    Logits are softcap(hidden @ weight.T + bias) / temperature, float32 (float64 if an input is)
    whatever the dtype of the inputs, and never all stored. Any mix of the differentiable outputs
    may reach the loss. Same inputs, same result on one machine, backend and number of threads.
    Under torch.compile the call is a graph break.

    Args:
        hidden: (..., D) floating, the student's last hidden states; differentiable.
        weight: (V, D) floating, its LM head; differentiable (a frozen one costs nothing).
        targets: (...) int64 in [0, V); masked positions may hold anything.
        bias: (V,) floating or None; differentiable; -inf forbids a token.
        temperature: > 0.
        logit_softcap: c > 0 for c * tanh(logits / c), before the temperature, for student and
            teacher; None for none.
        mask: (...) bool or numbers, True where a token is trained; elsewhere nothing is computed
            and outputs are 0.
        teacher: TeacherHidden, TeacherTopK or None; a constant.
        divergence: a name in divergences.TABLE.
        alpha: in (0, 1), for jsd and skew_kl.
        tail: what TeacherTopK does with the other tokens: truncate (Feedback Distillation), bucket,
            renormalize.
        grad_filter: in [0, 1), the largest share of a token's sum |dlogits| that the backward pass
            may drop; None: exact.
        workspace_mb: MiB of memory beside inputs, gradients and N-sized outputs (backends but
            `reference`).
        backend: auto, cpu, triton, reference.
        group: a torch.distributed.ProcessGroup over which the vocabulary is cut (backend cpu), or
            None. Ranks hold consecutive slices in rank order, of any size: weight, bias and the
            teacher's weight and bias are this rank's. All else is the same on every rank, ids are
            global, and the loss is too: hidden's gradient is summed over the ranks.

    Returns:
        PolicyHead, each field of shape (...).

    Raises:
        ValueError: a shape, value or option is off.
        TypeError: a dtype is off.
        MachineError: the backend asked for cannot run here.
    """
    prepared = prepare(
        "policy_head",
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        mask=mask,
        teacher=teacher,
        divergence=divergence,
        alpha=alpha,
        tail=tail,
        grad_filter=grad_filter,
        workspace_mb=workspace_mb,
        backend=backend,
        group=group,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        if prepared.module is None:
            fields = reference.policy_head(*prepared.trained(), prepared.report_dropped)
        else:
            fields = _PolicyHeadFunction.apply(  # type: ignore[no-untyped-call]
                *prepared.inputs(), prepared.module, prepared.report_dropped
            )
    return prepared.spread(fields)


@dataclass(frozen=True)
class Prepared:
    """A call of the op, checked and flattened: what the backends take, and the way back to the
    caller's shape.
    """

    student: Head
    targets_N: Tensor
    rows_N: Tensor | None
    teacher: Head | TeacherTopK | None
    options: HeadOptions
    module: Any
    shape: torch.Size
    dropped_M: Tensor

    def inputs(self) -> tuple[Any, ...]:
        """hidden, weight, bias, targets, rows, teacher, options."""
        return (*self.student, self.targets_N, self.rows_N, self.teacher, self.options)

    def trained(self) -> tuple[Head, Tensor, Head | TeacherTopK | None, HeadOptions]:
        """The same for the reference, which takes trained tokens alone."""
        student, teacher = self.student, self.teacher
        student = student._replace(hidden_ND=_trained(student.hidden_ND, self.rows_N))
        if isinstance(teacher, Head):
            teacher = teacher._replace(hidden_ND=_trained(teacher.hidden_ND, self.rows_N))
        return student, self.targets_N, teacher, self.options

    def report_dropped(self, dropped_N: Tensor) -> None:
        """Fill dropped_mass in place, once the backward pass knows it."""
        self.dropped_M[slice(None) if self.rows_N is None else self.rows_N] = dropped_N

    def spread(self, fields: tuple[Tensor, ...]) -> PolicyHead:
        """The fields of the trained tokens in the caller's shape, 0 where masked."""
        logprobs, entropy, divergence, mass, argmax = (
            _spread(field, self.rows_N, self.shape) for field in fields
        )
        dropped = self.dropped_M.view(self.shape)
        return PolicyHead(logprobs, entropy, divergence, mass, dropped, argmax)


def prepare(
    operation: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    mask: Tensor | None,
    teacher: TeacherHidden | TeacherTopK | None,
    divergence: str,
    alpha: float,
    tail: str,
    grad_filter: float | None,
    workspace_mb: float,
    backend: str,
    group: Any,
) -> Prepared:
    """Check and flatten the arguments of `policy_head`, which says what they are."""
    options = _options(
        temperature, teacher, logit_softcap, divergence, alpha, tail, grad_filter, workspace_mb
    )
    check_head(operation, hidden, weight, bias)
    for name, tensor in (("targets", targets), ("mask", mask)):
        if tensor is not None and tensor.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{operation}: {name} must have the shape of hidden without its last dimension, "
                f"{tuple(hidden.shape[:-1])}; got {tuple(tensor.shape)}"
            )
    shape = targets.shape
    hidden_MD = hidden.reshape(-1, hidden.shape[-1])
    rows_N = None if mask is None else mask.reshape(-1).to(torch.bool).nonzero().squeeze(1)
    targets_N = _trained(targets.reshape(-1), rows_N).contiguous()
    dtype = reference.statistics_dtype(hidden, weight)
    module = backend_for("policy_head", hidden, backend, dtype)
    V = len(weight)
    if group is not None:
        check_group(operation, hidden, backend)
        if grad_filter is not None:
            raise ValueError(
                f"{operation}: grad_filter with group is not supported yet; got {grad_filter}; "
                "take None"
            )
        ranks = VocabularySlice.find(operation, group, V, len(hidden_MD), len(targets_N))
        options, V = replace(options, vocabulary_slice=ranks), ranks.vocabulary
    check_ids(operation, "targets", targets_N, V)
    flat_teacher = _flat_teacher(teacher, shape, rows_N, len(weight), V)
    if isinstance(flat_teacher, TeacherTopK) and flat_teacher.ids.shape[-1] == V:
        # Nothing is left for a bucket: the rounding of the teacher's mass would become its tail.
        options = replace(options, tail="truncate") if tail == "bucket" else options
    return Prepared(
        student=Head(hidden_MD, weight, bias),
        targets_N=targets_N,
        rows_N=rows_N,
        teacher=flat_teacher,
        options=options,
        module=module,
        shape=shape,
        dropped_M=hidden.new_zeros(len(hidden_MD), dtype=dtype),
    )


def _options(
    temperature: float,
    teacher: TeacherHidden | TeacherTopK | None,
    logit_softcap: float | None,
    divergence: str,
    alpha: float,
    tail: str,
    grad_filter: float | None,
    workspace_mb: float,
) -> HeadOptions:
    teacher_temperature = teacher.temperature if isinstance(teacher, TeacherHidden) else 1.0
    check_positive(
        "policy_head",
        {
            "temperature": temperature,
            "teacher.temperature": teacher_temperature,
            "logit_softcap": logit_softcap,
            "workspace_mb": workspace_mb,
        },
    )
    for name, choice, known in (("divergence", divergence, tuple(TABLE)), ("tail", tail, TAILS)):
        if choice not in known:
            raise ValueError(
                f"policy_head: {name} must be one of {', '.join(known)}; got {choice!r}"
            )
    if TABLE[divergence].needs_alpha and not 0 < alpha < 1:
        raise ValueError(
            f"policy_head: {divergence} wants alpha strictly between 0 and 1; got {alpha}"
        )
    if grad_filter is not None and not 0 <= grad_filter < 1:
        raise ValueError(f"policy_head: grad_filter must be None or in [0, 1); got {grad_filter}")
    return HeadOptions(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        logit_softcap=logit_softcap,
        divergence=divergence,
        alpha=alpha,
        tail=tail,
        grad_filter=grad_filter,
        workspace_bytes=int(workspace_mb * 2**20),
    )


def _flat_teacher(
    teacher: TeacherHidden | TeacherTopK | None,
    shape: torch.Size,
    rows_N: Tensor | None,
    V: int,
    num_ids: int,
) -> Head | TeacherTopK | None:
    """The teacher over flat tokens, detached: all M rows of hidden states, but only the trained
    rows of a top-k. Its head has V rows, its ids are below num_ids (more than V with a group).
    """
    if teacher is None:
        return None
    if isinstance(teacher, TeacherTopK):
        ids, logprobs = teacher.ids.detach(), teacher.logprobs.detach()
        if (
            ids.shape != logprobs.shape
            or ids.shape[:-1] != shape
            or not 1 <= ids.shape[-1] <= num_ids
        ):
            raise ValueError(
                f"policy_head: teacher.ids and teacher.logprobs must have shape {(*shape, 'K')} "
                f"with 1 <= K <= {num_ids}; "
                f"got {tuple(ids.shape)} and {tuple(logprobs.shape)}"
            )
        if not logprobs.is_floating_point():
            raise TypeError(f"policy_head: teacher.logprobs must be floating; got {logprobs.dtype}")
        K = ids.shape[-1]
        ids_NK = _trained(ids.reshape(-1, K), rows_N).contiguous()
        check_ids("policy_head", "teacher.ids", ids_NK, num_ids)
        ordered_NK = ids_NK.sort(-1).values
        if ids.device.type == "cpu" and (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any():
            raise ValueError(
                "policy_head: teacher.ids must be distinct within a token; got a repeated id"
            )
        return TeacherTopK(ids_NK, _trained(logprobs.reshape(-1, K), rows_N))
    if not isinstance(teacher, TeacherHidden):
        raise TypeError(
            "policy_head: teacher must be TeacherHidden, TeacherTopK or None; got "
            f"{type(teacher).__name__}"
        )
    D, bias = teacher.hidden.shape[-1], teacher.bias
    if teacher.hidden.shape[:-1] != shape:
        raise ValueError(
            f"policy_head: teacher.hidden must have shape {(*shape, 'D')}; got "
            f"{tuple(teacher.hidden.shape)}"
        )
    if teacher.weight.shape != (V, D):
        raise ValueError(
            f"policy_head: teacher.weight must have shape {(V, D)}: the student's vocabulary, the "
            f"teacher's hidden "
            f"size; got {tuple(teacher.weight.shape)}"
        )
    if bias is not None and bias.shape != (V,):
        raise ValueError(
            f"policy_head: teacher.bias must have shape ({V},); got {tuple(bias.shape)}"
        )
    return Head(
        teacher.hidden.detach().reshape(-1, D),
        teacher.weight.detach(),
        None if bias is None else bias.detach(),
    )


def _trained(tensor_M: Tensor, rows_N: Tensor | None) -> Tensor:
    return tensor_M if rows_N is None else tensor_M.index_select(0, rows_N)


def _spread(field_N: Tensor, rows_N: Tensor | None, shape: torch.Size) -> Tensor:
    """Back to the caller's shape, 0 where masked."""
    if rows_N is not None:
        field_N = field_N.new_zeros(shape.numel()).index_copy(0, rows_N, field_N)
    return field_N.view(shape)
