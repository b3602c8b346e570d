"""Whatever the passes' token budget and the attempts' order, a step's gradient is the same."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdfast.models import load_model
from tests.test_trainer_stages import attempts_of, config_of, scored
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    found, _ = load_model(save_tiny_model(tmp_path_factory.mktemp("tiny")))
    return found.double()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(budget=st.integers(1, 120), order=st.randoms(use_true_random=False))
def test_any_split_of_a_step_gives_the_same_gradient(
    model, weight: float, budget: int, order: random.Random
):
    attempts = attempts_of()
    options = {"distillation_weight": weight, "loss_type": "dapo"}
    metrics, whole = scored(model, config_of(max_pass_tokens=1000, **options), attempts)
    order.shuffle(attempts)
    split, parts = scored(model, config_of(max_pass_tokens=budget, **options), attempts)
    assert split["num_tokens"] == metrics["num_tokens"]
    assert split["loss"] == pytest.approx(metrics["loss"], rel=1e-5, abs=1e-7)
    for name, truth in whole.items():
        # transformers' norm is float32 within, whatever the model's dtype.
        torch.testing.assert_close(
            parts[name], truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()), msg=name
        )
