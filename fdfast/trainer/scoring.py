"""The loss of a step's attempts: teacher and student pass over packs that share prefixes.

With a head that is cut along the vocabulary a loss is of all ranks' rows (`vocabulary_parallel`):
every rank takes part in each pass, one without a pack with a blank tree.
Legend: T trained tokens of a pack, D hidden, V vocabulary.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fdfast.cpu.gemm import fast_gemms, onednn_keeps_float32
from fdfast.errors import InputError
from fdfast.losses import FeedbackDistillationLoss, GRPOLoss, LossOutput
from fdfast.models import hidden_states
from fdfast.packing import PrefixTree, fill_packs
from fdfast.policy_head import policy_head
from fdfast.streaming import backward_in_parts
from fdfast.topk_head import topk_head
from fdfast.trainer.batch import Attempt, completion_tree
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.metrics import Clock
from fdfast.trainer.ranks import Ranks
from fdfast.trainer.settings import replaced
from fdfast.trainer.sharding import blank_tree, empty_pass, gathered, inside, release
from fdfast.trainer.vocabulary_parallel import Heads, Meeting
from fdfast.types import PolicyHead, TeacherHidden, TeacherTopK


@dataclass(frozen=True)
class Scorer:
    """Student, teacher and the loss between them.

    Attributes:
        config: of the stage.
        model: the student.
        teacher: asked where distillation_weight is more than 0.
        loss_fn: of Feedback Distillation where that is 1, else of the policy.
        reference: what beta's KL is to; wanted where beta is more than 0 and the loss the policy's.
        ranks: that share the step; with several, the models are sharded.
        heads: whether those of all models are whole or cut; `loss_fn` has its group.
        clock: seconds of the teacher's passes in the latest score.
    """

    config: TrainConfig
    model: Any
    teacher: Any
    loss_fn: FeedbackDistillationLoss | GRPOLoss
    reference: Any = None
    ranks: Ranks = field(default_factory=Ranks)
    heads: Heads = field(default_factory=Heads)
    clock: Clock = field(default_factory=Clock)

    def score(self, attempts: Sequence[Attempt], *, backward: bool) -> dict[str, float]:
        """Go through the packs; the loss is normalised over all of them, on all ranks.

        Args:
            attempts: all of this rank's share of a step; those at one problem stand together.
            backward: whether the gradient is added to the student's parameters.

        Returns:
            Sums of `loss` and `num_tokens`, means of the loss's other metrics over the tokens, of
            all ranks together.

        Raises:
            InputError: a loss over whole sequences has a pack that does not fit in a pass.
        """
        totals: dict[str, float] = {}
        self.clock.spent.clear()
        with self.ranks.together():
            own = [(p, trees(p)) for p in packs(attempts, self._budget)]
            streams = backward and any(self._streams(student) for _, (student, _) in own)
        said = (sum(a.completion.num_sampled for a in attempts), len(attempts), len(own), streams)
        every = self.ranks.every(said)
        counts = (sum(tokens for tokens, *_ in every), sum(size for _, size, *_ in every))
        most = max(packs for _, _, packs, _ in every)
        if self.heads.group is not None:
            own += [([], (blank_tree(), blank_tree()))] * (most - len(own))
        if self.ranks.size > 1 and any(streams for *_, streams in every):
            # Ranks stream in different numbers of passes: none may wait for another's.
            with gathered(self.model, *self._constants()):
                for pack, both in own:
                    self._pass(pack, both, counts, totals, backward=backward)
            return self.ranks.sums(totals)
        for number in range(most):
            self.ranks.meet()
            if number < len(own):
                self._pass(*own[number], counts, totals, backward=backward)
            else:  # the others' layers gather themselves here too
                self._empty_pass(backward=backward)
        release(self.model, *self._constants())
        return self.ranks.sums(totals)

    def _pass(
        self,
        pack: Sequence[Attempt],
        both: tuple[PrefixTree, PrefixTree],
        counts: tuple[int, int],
        totals: dict[str, float],
        *,
        backward: bool,
    ) -> None:
        device = next(self.model.parameters()).device
        with fast_gemms(device.type == "cpu" and onednn_keeps_float32()):
            student, teacher = (tree.to(device) for tree in both)
            part = _Part(self, pack, student, self._evidence(teacher), counts, totals)
            offload = self.config.model.activation_offloading
            part.look_up()
            if backward and self._streams(student):
                backward_in_parts(
                    self.model, student, part, max_tokens=self._budget, offload=offload
                )
            else:
                every = torch.arange(len(student.target_ids), device=device)
                loss = inside(
                    self.model,
                    lambda: part(hidden_states(self.model, student, offload=offload), every),
                )
                if backward:
                    loss.backward()  # type: ignore[no-untyped-call]
            for meeting in self.heads.left():  # others stream their packs in more parts
                part.take_part(meeting).backward()  # type: ignore[no-untyped-call]

    def _empty_pass(self, *, backward: bool) -> None:
        with torch.no_grad():
            for model in self._constants():
                empty_pass(model)
        loss = empty_pass(self.model)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]

    def _constants(self) -> list[Any]:
        """The models that a pass looks at, in its order, beside the student."""
        asked = [self.teacher] if self.config.loss.distillation_weight else []
        return asked + ([] if self.reference is None else [self.reference])

    @property
    def _budget(self) -> int:
        """Tokens of a pass."""
        device = next(self.model.parameters()).device
        return self.config.model.pass_tokens(device.type)

    def _streams(self, tree: PrefixTree) -> bool:
        """Whether a pack is too large for a pass.

        Raises:
            InputError: it is, and the loss wants whole sequences.
        """
        if tree.num_tokens <= self._budget:
            return False
        if isinstance(self.loss_fn, GRPOLoss) and self.by_sequence():
            loss, budget = self.config.loss, self.config.model.whole_tokens
            if tree.num_tokens <= budget:
                return False
            raise InputError(
                f"a problem's attempts have {tree.num_tokens} tokens, more than "
                f"max_pass_tokens = {budget}; with loss_type {loss.loss_type!r}, "
                f"importance_sampling_level {loss.importance_sampling_level!r} they must fit in "
                "one pass: raise it, or take loss_type 'dapo' and the level 'token'"
            )
        return True

    def by_sequence(self) -> bool:
        """Whether the policy's loss wants whole sequences."""
        config = self.config
        return (
            config.loss.loss_type in ("grpo", "sapo")
            or config.loss.importance_sampling_level == "sequence"
            or (
                corrects_sampling(config)
                and config.vllm.importance_sampling_mode.startswith("sequence")
            )
        )

    @torch.no_grad()
    def _evidence(self, tree: PrefixTree) -> TeacherHidden | TeacherTopK | None:
        """What the loss is told of the teacher, for every target."""
        if not self.config.loss.distillation_weight:
            return None
        with self.clock("teacher"):
            told = inside(self.teacher, lambda: self._told_by_teacher(tree))
            if tree.input_ids.is_cuda:  # its work is done when its time is
                torch.cuda.synchronize(tree.input_ids.device)
        return told

    def _told_by_teacher(self, tree: PrefixTree) -> TeacherHidden | TeacherTopK:
        hidden_TD, head = hidden_states(self.teacher, tree), self.heads.weights(self.teacher)
        config = self.config.loss
        temperature = config.distillation_temperature
        if not config.teacher_top_k:
            return TeacherHidden(hidden_TD, head.weight, head.bias, temperature)
        meeting = self.heads.meet(len(hidden_TD))
        top = topk_head(
            meeting.all(hidden_TD),
            head.weight,
            config.teacher_top_k,
            bias=head.bias,
            temperature=temperature,
            logit_softcap=head.logit_softcap,
            workspace_mb=config.workspace_mb,
            backend=config.backend,
            group=self.heads.group,
        )
        return TeacherTopK(meeting.own(top.ids), meeting.own(top.logprobs))


@dataclass(frozen=True)
class _Part:
    """The loss of some of a pack's targets; its metrics are added to `totals`.

    Attributes:
        counts: trained tokens and sequences of the whole step.
    """

    scorer: Scorer
    pack: Sequence[Attempt]
    tree: PrefixTree
    evidence: TeacherHidden | TeacherTopK | None
    counts: tuple[int, int]
    totals: dict[str, float]

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return self._loss(hidden, rows, self.scorer.heads.meet(len(rows)))

    def take_part(self, meeting: Meeting) -> Tensor:
        """The loss of the others' rows, none of which are of this pack."""
        weight = self.scorer.heads.weights(self.scorer.model).weight
        # Its gradient is wanted: where the others' are added up, this rank is one of them.
        hidden = weight.new_zeros(0, weight.shape[1], requires_grad=True)
        return self._loss(hidden, torch.arange(0, device=weight.device), meeting)

    def _loss(self, hidden: Tensor, rows: Tensor, meeting: Meeting) -> Tensor:
        head = self.scorer.heads.weights(self.scorer.model)
        loss_fn, num_tokens = self.scorer.loss_fn, self.counts[0]
        hidden, targets = meeting.all(hidden), meeting.all(self.tree.target_ids[rows])
        evidence = None if self.evidence is None else self.evidence.rows(rows).each(meeting.all)
        if isinstance(loss_fn, GRPOLoss):
            output = self._policy_loss(loss_fn, hidden, targets, evidence, rows, meeting)
        else:
            assert evidence is not None
            output = loss_fn(
                hidden, head.weight, targets, evidence, bias=head.bias, num_tokens=num_tokens
            )
        for name, value in output.metrics.items() if meeting.tells else ():
            summed = name in ("loss", "policy_loss", "num_tokens")
            share = 1.0 if summed else len(targets) / num_tokens
            self.totals[name] = self.totals.get(name, 0.0) + share * float(value)
        loss: Tensor = output.loss
        return loss

    def look_up(self) -> None:
        """Ask the reference now: its layers gather themselves outside of the student's pass."""
        if isinstance(self.scorer.loss_fn, GRPOLoss):
            _ = self._given

    def _policy_loss(
        self,
        loss_fn: GRPOLoss,
        hidden: Tensor,
        targets: Tensor,
        evidence: TeacherHidden | TeacherTopK | None,
        rows: Tensor,
        meeting: Meeting,
    ) -> LossOutput:
        """Over sequences, padded, where the loss wants them, else over one row of tokens."""
        heads, head = self.scorer.heads, self.scorer.heads.weights(self.scorer.model)
        lengths = [len(targets)]
        if self.scorer.by_sequence():
            own = torch.tensor([a.completion.num_sampled for a in self.pack], dtype=torch.int64)
            lengths = heads.meet(len(own)).all(own).tolist()

        def by_sequence(values: Tensor) -> Tensor:
            return pad_sequence(list(torch.split(values, lengths)), batch_first=True)

        advantages, sampling, reference = (
            None if x is None else meeting.all(x[rows]) for x in self._given
        )
        assert advantages is not None
        output: LossOutput = loss_fn(
            by_sequence(hidden),
            head.weight,
            by_sequence(targets),
            by_sequence(advantages),
            None if evidence is None else evidence.each(by_sequence),
            mask=by_sequence(torch.ones_like(targets, dtype=torch.bool)),
            bias=head.bias,
            ref_logprobs=None if reference is None else by_sequence(reference),
            sampling_logprobs=None if sampling is None else by_sequence(sampling),
            num_tokens=self.counts[0],
            num_sequences=self.counts[1],
        )
        return output

    @functools.cached_property
    def _given(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of every target: its advantage, the sampler's log-probability where it is corrected for,
        and the reference's where there is one.
        """
        scorer, device = self.scorer, self.tree.target_ids.device
        sampled = [a.completion.num_sampled for a in self.pack]
        lengths = torch.tensor(sampled, device=device, dtype=torch.int64)
        advantages = torch.tensor([a.advantage for a in self.pack], device=device)
        advantages = advantages.repeat_interleave(lengths)
        sampling = reference = None
        if corrects_sampling(scorer.config):
            own = (
                value
                for attempt in self.pack
                for value, wrote in zip(
                    attempt.completion.logprobs, attempt.completion.wrote, strict=True
                )
                if wrote
            )
            sampling = torch.tensor(list(own), device=device)
        if scorer.reference is not None:
            temperature = scorer.config.rollout.temperature
            config = replaced(scorer.config, {"loss.distillation_temperature": temperature})
            values = _target_logprobs(scorer.reference, self.tree, config, scorer.heads)
            reference = torch.tensor(values, device=device)
        return advantages, sampling, reference


def corrects_sampling(config: TrainConfig) -> bool:
    """Whether the policy's loss weighs attempts by what the policy is now over what it was where
    they were sampled: in vLLM's arithmetic, or some updates ago.
    """
    differs = config.rollout.use_vllm or config.rollout.max_staleness > 0
    return differs and config.vllm.importance_sampling_correction


def trees(attempts: Sequence[Attempt]) -> tuple[PrefixTree, PrefixTree]:
    """The student's and the teacher's, of the same attempts in the same order."""
    completions = [a.completion.ids for a in attempts]
    wrote = [a.completion.wrote for a in attempts]
    return (
        completion_tree([a.completion.prompt_ids for a in attempts], completions, wrote),
        completion_tree([a.teacher_prompt_ids for a in attempts], completions, wrote),
    )


def packs(attempts: Sequence[Attempt], max_tokens: int) -> list[list[Attempt]]:
    """The attempts of each pass; those at one problem stay together."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(attempt.problem.name, []).append(attempt)
    members = list(groups.values())
    sizes = [max(tree.num_tokens for tree in trees(group)) for group in members]
    return [[a for group in pack for a in members[group]] for pack in fill_packs(sizes, max_tokens)]


@torch.no_grad()
def token_logprobs(
    student: Any, teacher: Any, attempts: Sequence[Attempt], config: TrainConfig
) -> list[tuple[list[float], list[float]]]:
    """What student and teacher think of each token that the student wrote.

    Args:
        student: a causal LM.
        teacher: likewise; it reads the teacher's prompts.
        attempts: those at one problem stand together.
        config: for the loss's temperature, the backend, and the tokens of a pass.

    Returns:
        For each attempt the natural log-probabilities of its ids, 0 where the model did not write.
    """
    found: dict[int, tuple[list[float], list[float]]] = {}
    budget = config.model.pass_tokens(next(student.parameters()).device.type)
    for pack in packs(attempts, budget):
        pairs = zip((student, teacher), trees(pack), strict=True)
        every = [_target_logprobs(model, tree, config, Heads()) for model, tree in pairs]
        start = 0
        for attempt in pack:
            stop = start + attempt.completion.num_sampled
            own = [_spread(values[start:stop], attempt.completion.wrote) for values in every]
            found[id(attempt)], start = (own[0], own[1]), stop
    return [found[id(attempt)] for attempt in attempts]


@torch.no_grad()
def _target_logprobs(
    model: Any, tree: PrefixTree, config: TrainConfig, heads: Heads
) -> list[float]:
    tree = tree.to(next(model.parameters()).device)

    def logprobs() -> Tensor:
        hidden_TD, head = hidden_states(model, tree), heads.weights(model)
        meeting = heads.meet(len(hidden_TD))
        scored: PolicyHead = policy_head(
            meeting.all(hidden_TD),
            head.weight,
            meeting.all(tree.target_ids),
            bias=head.bias,
            temperature=config.loss.distillation_temperature,
            logit_softcap=head.logit_softcap,
            workspace_mb=config.loss.workspace_mb,
            backend=config.loss.backend,
            group=heads.group,
        )
        return meeting.own(scored.logprobs)

    values: list[float] = inside(model, logprobs).tolist()
    return values


def _spread(values: list[float], wrote: Sequence[bool]) -> list[float]:
    """A value for each id that was written, 0 for the others."""
    rest = iter(values)
    return [next(rest) if written else 0.0 for written in wrote]
