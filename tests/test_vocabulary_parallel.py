"""Training with a head that is cut along the vocabulary over gloo ranks: the numbers of one
process, whose head is whole.
"""

import functools
from typing import Any

import pytest
import torch

from fdfast.errors import InputError
from fdfast.models import load_model
from fdfast.trainer import train
from fdfast.trainer.metrics import read_jsonl
from fdfast.trainer.ranks import Ranks
from fdfast.trainer.rollouts import check_for_ranks
from fdfast.trainer.vocabulary_parallel import Heads
from tests.gloo import run_ranks
from tests.test_ranks import LEAN, TURNS, assert_same_run, launch
from tests.test_trainer import settings
from tests.tiny import save_tiny_model
from tests.vocabulary_rank import CASES, NUM_RANKS, SCORES, passes, scored, tiny, tree_of

POLICY = LEAN | {"distillation_weight": 0.0, "beta": 0.1}
WHOLE = {"max_pass_tokens": 2000}  # else a problem's attempts are streamed
KINDS: dict[str, dict[str, Any]] = {
    "full": {"eval_num_prompts": 3, "eval_split": ""},
    "topk": {"teacher_top_k": 25, "gradient_checkpointing": True},
    "policy": POLICY | WHOLE,
    "streamed": POLICY | {"scale_rewards": "batch"},
    "grpo": POLICY | WHOLE | {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "streamed-mix": LEAN | {"distillation_weight": 0.5, "teacher_top_k": 25},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Rows and final weights of a kind of run, each run once; 0 ranks: the head is whole."""
    base = tmp_path_factory.mktemp("vocabulary")
    models = {
        tied: save_tiny_model(base / f"tiny-{tied}", kind="qwen3", tied=tied)
        for tied in (True, False)
    }

    @functools.cache
    def run(kind: str, tied: bool, num_ranks: int, max_steps: int):
        folder = base / f"{kind}-{tied}-{num_ranks}-{max_steps}"
        values = {"prompts_per_step": 5, "max_steps": max_steps, "save_final_model": True}
        values["vocabulary_parallel"] = num_ranks > 0
        config = settings(models[tied], folder, **values | KINDS[kind])
        turns = TURNS if "task" in KINDS[kind] else []
        if num_ranks or turns:
            done = launch(config, num_ranks, turns=turns)
            assert done.returncode == 0, done.stderr
        else:
            train(config, quiet=True)
        model, _ = load_model(folder / "model")
        return read_jsonl(folder / "metrics.jsonl"), dict(model.state_dict())

    return run


@pytest.mark.parametrize(("tied", "V"), CASES)
def test_each_shard_gets_the_gradient_of_all_tokens(tied: bool, V: int) -> None:
    student, teacher = tiny(V, tied=tied), tiny(V, tied=tied, seed=1)
    tree = tree_of(list(range(NUM_RANKS)), V)
    loss, _ = passes(student, teacher, tree, Heads())
    for seen in run_ranks("tests.vocabulary_rank", NUM_RANKS):
        ours = seen[f"{tied}-{V}"]
        torch.testing.assert_close(ours["loss"], loss, rtol=1e-11, atol=0.0)
        for name, parameter in student.named_parameters():
            # FSDP adds up in float32; the head's rows are not FSDP's.
            rtol = 1e-11 if name == "lm_head.weight" else 1e-6
            worst = parameter.grad.abs().max().item()
            assert worst > 1e-6
            torch.testing.assert_close(
                ours["gradients"][name], parameter.grad, rtol=0.0, atol=rtol * worst
            )


@pytest.mark.parametrize("name", SCORES)
def test_ranks_score_their_attempts_as_one_scores_all(name: str) -> None:
    metrics, gradients = scored(name, None)
    for seen in run_ranks("tests.vocabulary_rank", NUM_RANKS):
        ours, own = seen[name]
        assert ours == pytest.approx(metrics, rel=1e-6)
        for key, expected in gradients.items():
            worst = expected.abs().max().item()
            assert worst > 1e-8
            torch.testing.assert_close(own[key], expected, rtol=0.0, atol=1e-6 * worst)


def test_a_head_of_its_own_is_a_shard_all_the_way_and_shards_may_be_uneven() -> None:
    every = run_ranks("tests.vocabulary_rank", NUM_RANKS)
    for seen in every:
        for V in (96, 97):
            assert seen[f"False-{V}"]["cut"] == [True] * 4  # two passes, forward and backward
            assert not any(seen[f"True-{V}"]["cut"])  # the embedding is gathered
    assert [seen["False-97"]["rows"]["lm_head.weight"] for seen in every] == [33, 33, 31]


def test_a_vocabulary_with_no_row_for_a_rank_is_refused() -> None:
    for seen in run_ranks("tests.vocabulary_rank", NUM_RANKS):
        assert seen["refused"] == (
            "model.vocabulary_parallel: a vocabulary of 4 leaves one of 3 ranks without a row of "
            "the head; take fewer ranks, or vocabulary_parallel=false"
        )


@pytest.mark.parametrize(
    ("kind", "tied", "num_ranks", "max_steps"),
    [
        ("topk", True, 2, 3),
        *(
            pytest.param(*row, 20, marks=pytest.mark.slow)
            for row in (
                ("full", True, 2),
                ("full", False, 2),
                ("topk", True, 2),
                ("topk", False, 3),
                ("policy", True, 2),
                ("grpo", False, 2),
                ("streamed", False, 2),
                ("streamed-mix", True, 3),
            )
        ),
    ],
)
def test_a_cut_head_gives_the_numbers_of_one_process(runs, kind, tied, num_ranks, max_steps):
    ours, plain = runs(kind, tied, num_ranks, max_steps), runs(kind, tied, 0, max_steps)
    assert len(plain[0]) == max_steps + 2 * ("eval_num_prompts" in KINDS[kind])
    assert_same_run(*ours, *plain)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(runs, tmp_path):
    tiny_model = save_tiny_model(tmp_path / "tiny", kind="qwen3", tied=False)
    folder = tmp_path / "run"
    values = {"prompts_per_step": 5, "save_steps": 2, "vocabulary_parallel": True} | KINDS["full"]
    for num_ranks, steps in ((2, 2), (3, 4), (0, 6), (2, 8)):
        config = settings(tiny_model, folder, **values, max_steps=steps)
        done = launch(config, num_ranks, resume=steps > 2)
        assert done.returncode == 0, done.stderr
    plain = {row["step"]: row for row in runs("full", False, 0, 20)[0] if "grad_norm" in row}
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "grad_norm" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    for row in rows:
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(plain[row["step"]][name], rel=2e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss.backend": "triton"}, r"wants loss\.backend 'auto' or 'cpu'; got 'triton'"),
        ({"loss.backend": "reference"}, r"wants loss\.backend 'auto' or 'cpu'; got 'reference'"),
        ({"grad_filter": 0.1}, r"wants loss\.grad_filter=null; got 0\.1"),
    ],
)
def test_what_a_cut_head_does_not_do_is_one_line(tmp_path, values, message):
    with pytest.raises(InputError, match=r"config: model\.vocabulary_parallel " + message):
        settings(tmp_path, tmp_path, vocabulary_parallel=True, **values)


def test_gpus_are_refused_and_one_rank_is_not(tmp_path):
    config = settings(tmp_path, tmp_path, vocabulary_parallel=True)
    check_for_ranks(config, Ranks())
    two = Ranks()
    two.size, two.device = 2, torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"vocabulary_parallel is for .* got 2 on cuda:1"):
        check_for_ranks(config, two)
