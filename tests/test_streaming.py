"""The streamed pass is the whole pass: loss and every gradient, with less in memory."""

import pytest
import torch

from fdfast.errors import InputError
from fdfast.models import hidden_states
from fdfast.packing import PrefixTree
from fdfast.streaming import backward_in_parts
from tests.test_model_attention import (
    CONFIGS,
    assert_alike,
    checkpoint_gradients,
    group,
    model_of,
)


def token_loss(model, tree):
    """A loss that is a sum over targets, each with another weight."""
    weights = torch.linspace(0.5, 2, len(tree.target_ids), dtype=torch.float64)

    def loss(hidden, rows):
        logprobs = model.lm_head(hidden).log_softmax(-1)
        return -(weights[rows] * logprobs.gather(1, tree.target_ids[rows, None])[:, 0]).sum()

    return loss


def gradients_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("max_tokens", [1, 40, 60, 100, 10_000])
@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients_are_those_of_the_whole_pack(kind, max_tokens):
    model = model_of(kind)
    tree = PrefixTree.from_sequences(*group())
    loss = token_loss(model, tree)
    whole = loss(hidden_states(model, tree), torch.arange(len(tree.target_ids)))
    whole.backward()
    right = gradients_of(model)
    seen_rows = []

    def part(hidden, rows):
        seen_rows.extend(rows.tolist())
        return loss(hidden, rows)

    total = backward_in_parts(model, tree, part, max_tokens=max_tokens)
    tolerance = 1e-5 if "gemma" in kind else 1e-11
    assert_alike(total, whole.detach(), tolerance)
    assert sorted(seen_rows) == list(range(len(tree.target_ids)))
    for name, gradient in gradients_of(model).items():
        assert_alike(gradient, right[name], tolerance)


def test_no_pass_is_larger_than_allowed():
    model = model_of("llama")
    tree = PrefixTree.from_sequences(*group())
    longest = int(tree.cu_seqlens.diff().max())
    sizes = []
    model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    backward_in_parts(model, tree, token_loss(model, tree), max_tokens=longest)
    assert len(sizes) > 3
    assert max(sizes) <= longest
    assert sum(sizes) == tree.num_tokens  # each token passes through once


def test_bad_input_is_named():
    model = model_of("llama")
    tree = PrefixTree.from_sequences(*group())
    with pytest.raises(ValueError, match="max_tokens must be at least 1; got 0"):
        backward_in_parts(model, tree, token_loss(model, tree), max_tokens=0)
    checkpoint_gradients(model, reentrant=False)
    with pytest.raises(InputError, match="the model checkpoints gradients"):
        backward_in_parts(model, tree, token_loss(model, tree), max_tokens=40)
