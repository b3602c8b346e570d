"""The ranks of test_vocabulary_parallel: backward passes through a tiny model that `shard` cut, its
head along the vocabulary, and the gradients that the shards have then; by hand, and by a Scorer.

`python -m tests.vocabulary_rank FOLDER` forks three ranks. Rank 1 has no sequence, and no attempt.
Legend: V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3Config

from fdfast.errors import InputError
from fdfast.losses import FeedbackDistillationLoss
from fdfast.models import hidden_states, lm_head
from fdfast.packing import PrefixTree
from fdfast.topk_head import topk_head
from fdfast.trainer.ranks import Ranks, TorchrunRanks
from fdfast.trainer.scoring import Scorer
from fdfast.trainer.setup import make_loss
from fdfast.trainer.sharding import blank_tree, inside, release, shard, whole
from fdfast.trainer.vocabulary_parallel import CutHeads, Heads
from fdfast.types import TeacherTopK
from tests.gloo import start_ranks
from tests.helpers import generator
from tests.test_trainer_stages import attempts_of, config_of

NUM_RANKS = 3
SEQUENCES = {0: 3, 1: 0, 2: 2}
# Tied or not, with shards of one length, and with a last one that is shorter.
CASES = [(tied, V) for tied in (True, False) for V in (96, 97)]

# Of a Scorer: settings beside those of `config_of`. With use_vllm the attempts' log-probabilities
# are corrected for (no vLLM is asked).
POLICY: dict[str, Any] = {"beta": 0.2, "use_vllm": True}
SCORES: dict[str, dict[str, Any]] = {
    "distilled": {"distillation_weight": 1.0},
    "distilled-topk": {"distillation_weight": 1.0, "teacher_top_k": 9, "entropy_coef": 0.1},
    "tokens": POLICY | {"importance_sampling_mode": "token_truncate"},
    "sequences": POLICY | {"importance_sampling_mode": "sequence_truncate"},
    "gspo": POLICY | {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "mix": POLICY | {"distillation_weight": 0.4, "loss_type": "sapo", "teacher_top_k": 9},
    "streamed": {"beta": 0.2, "distillation_weight": 0.4, "max_pass_tokens": 16},
    "streamed-topk": {"distillation_weight": 1.0, "teacher_top_k": 9, "max_pass_tokens": 16},
}


def tiny(V: int, *, tied: bool, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    ).double()


def tree_of(ranks: list[int], V: int) -> PrefixTree:
    """The sequences of some ranks, trained on but for their first tokens."""
    g = generator(5)
    own = {
        rank: [torch.randint(1, V, (4 + i,), generator=g).tolist() for i in range(number)]
        for rank, number in SEQUENCES.items()
    }
    sequences = [s for rank in ranks for s in own[rank]]
    if not sequences:
        return blank_tree()
    return PrefixTree.from_sequences(
        sequences, [[False] + [True] * (len(s) - 1) for s in sequences]
    )


def passes(student: Any, teacher: Any, tree: PrefixTree, heads: Heads) -> tuple[Tensor, list[bool]]:
    """The loss after two backward passes, and whether the head's weight was a shard whenever it was
    looked at: in each forward and each backward pass.
    """
    cut: list[bool] = []

    def look(*_: Any) -> None:
        cut.append(isinstance(student.get_output_embeddings().weight, DTensor))

    def evidence() -> TeacherTopK:
        hidden, head = hidden_states(teacher, tree), heads.weights(teacher)
        meeting = heads.meet(len(hidden))
        top = topk_head(meeting.all(hidden), head.weight, 7, group=heads.group)
        return TeacherTopK(meeting.own(top.ids), meeting.own(top.logprobs))

    def loss() -> Tensor:
        hidden, head = hidden_states(student, tree), heads.weights(student)
        hidden.register_hook(look)
        look()
        meeting = heads.meet(len(hidden))
        told = TeacherTopK(meeting.all(given.ids), meeting.all(given.logprobs))
        targets = meeting.all(tree.target_ids)
        loss_fn = FeedbackDistillationLoss(group=heads.group, entropy_coef=0.3)
        total: Tensor = loss_fn(
            meeting.all(hidden), head.weight, targets, told, num_tokens=9.0
        ).loss
        return total

    for _ in range(2):
        with torch.no_grad():
            given = inside(teacher, evidence)
        total = inside(student, loss)
        total.backward()
    return total.detach(), cut


class Member(TorchrunRanks):
    """A rank of the group that is there, without torchrun."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size, self.main = rank, dist.get_world_size(), rank == 0
        self.device, self.talk = torch.device("cpu"), dist.group.WORLD
        self.agreed, self.asked, self.alone = False, False, False


def scored(name: str, rank: int | None) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of a Scorer, of one rank's attempts or, of None, of all."""
    attempts, config = attempts_of(), config_of(**SCORES[name])
    tied = len(name) % 2 == 0
    models = [tiny(257, tied=tied, seed=seed) for seed in range(3)]
    student, teacher, reference = models
    ranks, heads = Ranks(), Heads()
    if rank is not None:
        attempts = [a for a in attempts if a.problem.name == "a-b"[rank]]
        for model in models:
            shard(model, torch.device("cpu"), keeps_head_cut=True)
        ranks, heads = Member(rank), CutHeads(student)
    for model in (teacher, reference):
        model.requires_grad_(False)
    asked = reference if config.loss.beta else None
    loss_fn = make_loss(config, lm_head(student), heads.group)
    metrics = Scorer(config, student, teacher, loss_fn, asked, ranks, heads).score(
        attempts, backward=True
    )
    return metrics, {n: whole(p.grad) for n, p in student.named_parameters()}


def one_rank(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {name: scored(name, rank) for name in SCORES}
    for tied, V in CASES:
        student, teacher = tiny(V, tied=tied), tiny(V, tied=tied, seed=1).requires_grad_(False)
        for model in (student, teacher):
            shard(model, torch.device("cpu"), keeps_head_cut=True)
        loss, cut = passes(student, teacher, tree_of([rank], V), CutHeads(student))
        release(student, teacher)
        gradients = {name: whole(p.grad) for name, p in student.named_parameters()}
        rows = {name: len(p.to_local()) for name, p in student.named_parameters()}
        seen[f"{tied}-{V}"] = {"loss": loss, "cut": cut, "gradients": gradients, "rows": rows}
    try:
        shard(tiny(4, tied=True), torch.device("cpu"), keeps_head_cut=True)
    except InputError as error:
        seen["refused"] = str(error)
    dist.barrier()
    return seen


if __name__ == "__main__":
    start_ranks(one_rank, NUM_RANKS)
