"""Weights as a checkpoint holds them: what vLLM is given is what the student computes with."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

from fdfast.errors import InputError
from fdfast.models import load_model
from fdfast.rollout.weights import (
    checkpoint_weights,
    load_model_weights,
    model_weights,
    save_weights,
)
from tests.tiny import save_tiny_model

pytestmark = [
    # peft's own use of transformers, and its advice on adapters that are refused here.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True`"),
]


@pytest.fixture(params=["llama tied", "llama", "qwen3 tied"])
def saved(request, tmp_path):
    kind, _, tied = request.param.partition(" ")
    return save_tiny_model(tmp_path, kind=kind, tied=bool(tied))


def same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **(tolerance or {"rtol": 0, "atol": 0}))


def test_names_and_weights_are_those_that_save_pretrained_writes(saved, tmp_path):
    model, _ = load_model(saved)
    written = load_file(saved / "model.safetensors")
    same(checkpoint_weights(model), written)
    (tmp_path / "ours").mkdir()
    save_weights(model, tmp_path / "ours")
    same(load_file(tmp_path / "ours" / "model.safetensors"), written)


def with_adapters(model, **values):
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**(config | values)))


def test_adapters_are_merged_beside_the_model(saved):
    model = with_adapters(load_model(saved)[0], use_rslora=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = checkpoint_weights(model)
    same(model.state_dict(), before)
    merged = copy.deepcopy(model).merge_and_unload()
    same(ours, checkpoint_weights(merged), rtol=0, atol=1e-6)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(ours[q_proj], load_file(saved / "model.safetensors")[q_proj])


def test_merged_and_disabled_adapters_are_not_added_again(saved):
    model = with_adapters(load_model(saved)[0])
    right = checkpoint_weights(model)
    with model.disable_adapter():
        same(checkpoint_weights(model), load_file(saved / "model.safetensors"))
    model.merge_adapter()
    same(checkpoint_weights(model), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_dora": True}, "can't be merged|not merged here"),
        ({"modules_to_save": ["norm"]}, "not merged here"),
        ({"target_modules": ["lm_head"]}, "tied but no longer equal"),
    ],
)
def test_adapters_that_no_checkpoint_can_hold_are_refused(tmp_path, values, words):
    model = with_adapters(load_model(save_tiny_model(tmp_path))[0], **values)
    with pytest.raises(InputError, match=words):
        checkpoint_weights(model)


def test_weights_of_a_model_make_another_of_its_config_the_same_and_of_no_other(tmp_path):
    model, _ = load_model(save_tiny_model(tmp_path / "one"))
    other, _ = load_model(tmp_path / "one")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    load_model_weights(other, model_weights(model).items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    some = dict([*model_weights(model).items()][:-1])
    with pytest.raises(InputError, match=r"1 of the model's tensors are missing"):
        load_model_weights(other, some.items())
    with pytest.raises(InputError, match=r"does not fit"):
        load_model_weights(other, [("lm_head.weight", torch.zeros(2, 2))])
