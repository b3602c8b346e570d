"""Whatever the passes' token budget, the attempts' order and what stands together, a step's
gradient is the same, for every loss.
"""

import copy
import dataclasses
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdfast.data.problems import Problem
from fdfast.models import load_model
from fdfast.trainer.scoring import packs, trees
from tests.test_trainer_stages import attempts_of, config_of, scored
from tests.tiny import save_tiny_model

CORRECTED = {"use_vllm": True, "vllm_importance_sampling_clip_max": 1.5}
# Of single tokens: passes of any size, down to one of each token's own.
TOKENS = {
    "distillation": {"distillation_weight": 1.0},
    "distillation from the teacher's best": {"distillation_weight": 1.0, "teacher_top_k": 5},
    "its reverse with the rest in a bucket": {
        "distillation_weight": 1.0,
        "divergence": "reverse_kl",
        "teacher_top_k": 5,
        "tail": "bucket",
        "entropy_coef": 0.1,
    },
    "dapo": {"loss_type": "dapo"},
    "bnpo": {"loss_type": "bnpo", "entropy_coef": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "corrected": CORRECTED | {"vllm_importance_sampling_mode": "token_truncate"},
    "a mix": {"distillation_weight": 0.3},
    "a mix from the teacher's best": {"distillation_weight": 0.3, "teacher_top_k": 5, "beta": 0.2},
    "a reference": {"beta": 0.2, "loss_type": "dr_grpo"},
}
# Of whole sequences: a problem's attempts fit in a pass.
SEQUENCES = {
    "grpo": {"loss_type": "grpo", "beta": 0.2},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "corrected": CORRECTED | {"vllm_importance_sampling_mode": "sequence_truncate"},
    "a mix": {"distillation_weight": 0.3, "teacher_top_k": 5, "loss_type": "grpo"},
}
WHOLE = 57  # tokens of the attempts at one problem
ALONE = 52  # of the longest attempt; two do not fit
FEW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The student, and a reference that thinks otherwise."""
    found, _ = load_model(save_tiny_model(tmp_path_factory.mktemp("tiny")))
    other = copy.deepcopy(found)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    return found.double(), other.double()


def sharing_attempts():
    """With prompts that are long enough to be shared."""
    more = list(range(100, 130))
    return [
        dataclasses.replace(
            a,
            completion=dataclasses.replace(a.completion, prompt_ids=more + a.completion.prompt_ids),
            teacher_prompt_ids=more + a.teacher_prompt_ids,
        )
        for a in attempts_of()
    ]


def each_alone(attempts):
    """The same, each at a problem of its own."""
    return [dataclasses.replace(a, problem=Problem(f"p{n}", "p")) for n, a in enumerate(attempts)]


def test_these_attempts_share_and_are_split_as_the_names_below_say():
    attempts = sharing_attempts()
    assert all(tree.ratio > 3 for tree in trees(attempts))
    assert max(tree.num_tokens for group in packs(attempts, 1) for tree in trees(group)) == WHOLE
    assert [len(packs(attempts, budget)) for budget in (1000, WHOLE)] == [1, 2]
    alone = each_alone(attempts)
    assert max(tree.num_tokens for a in alone for tree in trees([a])) == ALONE
    assert len(packs(alone, ALONE)) == len(attempts)


def check(models, options, budget, order, apart):
    """One pass against the passes of a budget; `apart`: each attempt is at a problem of its own."""
    model, other = models
    reference = other if options.get("beta") else None
    attempts = sharing_attempts()
    config = config_of(max_pass_tokens=1000, **options)
    metrics, whole = scored(model, config, attempts, reference)
    if apart:
        attempts = each_alone(attempts)
    order.shuffle(attempts)
    config = config_of(max_pass_tokens=budget, **options)
    split, parts = scored(model, config, attempts, reference)
    assert split["num_tokens"] == metrics["num_tokens"]
    assert split["loss"] == pytest.approx(metrics["loss"], rel=1e-5, abs=1e-7)
    for name, truth in whole.items():
        # transformers' norm is float32 within, whatever the model's dtype.
        torch.testing.assert_close(
            parts[name], truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()), msg=name
        )


@pytest.mark.parametrize("name", TOKENS)
@FEW
@given(
    budget=st.integers(1, 120),
    order=st.randoms(use_true_random=False),
    apart=st.booleans(),
)
def test_any_split_of_a_step_gives_the_same_gradient(
    models, name: str, budget: int, order: random.Random, apart: bool
):
    check(models, TOKENS[name], budget, order, apart)


@pytest.mark.parametrize("name", SEQUENCES)
@FEW
@given(
    budget=st.integers(WHOLE, 120),
    order=st.randoms(use_true_random=False),
    apart=st.booleans(),
)
def test_any_split_between_sequences_gives_the_same_gradient(
    models, name: str, budget: int, order: random.Random, apart: bool
):
    check(models, SEQUENCES[name], budget, order, apart)


@pytest.mark.parametrize("name", [*TOKENS, *SEQUENCES])
def test_an_attempt_a_pass_gives_the_same_gradient(models, name: str):
    check(models, (TOKENS | SEQUENCES)[name], ALONE, random.Random(0), apart=True)
