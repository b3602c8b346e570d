"""Loading models, their hidden states and heads; every wrong path is one line."""

import os

import pytest
import torch

from fdfast.errors import InputError, MachineError
from fdfast.models import hidden_states, lm_head, load_model, save_model
from tests.tiny import save_tiny_model


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_hidden_states_through_the_head_are_the_models_logits(tmp_path, kind):
    model, _ = load_model(save_tiny_model(tmp_path, kind=kind))
    torch.manual_seed(0)
    ids = torch.randint(3, 384, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # padded on the right
    head = lm_head(model)
    with torch.no_grad():
        ours = hidden_states(model, ids, mask) @ head.weight.T
        theirs = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1, :6], theirs[1, :6])


def test_a_saved_model_loads_as_it_was(tmp_path):
    model, tokenizer = load_model(save_tiny_model(tmp_path / "a"))
    save_model(model, tokenizer, tmp_path / "b")
    again, same = load_model(tmp_path / "b")
    for (name, old), new in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new), name
    assert same("a + b").input_ids == tokenizer("a + b").input_ids


def test_dtype_is_the_one_asked_for(tmp_path):
    model, _ = load_model(save_tiny_model(tmp_path), dtype="bfloat16")
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(InputError, match="dtype must be float32"):
        load_model(tmp_path, dtype="int8")


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such model folder; give a folder"):
        load_model(tmp_path / "nowhere")


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json, so it is no saved model"):
        load_model(tmp_path)


def test_a_broken_model_is_one_line(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="transformers can't load this model: ") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_name_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    with pytest.raises(MachineError, match="no such folder here, and the hub gave") as caught:
        load_model("nobody-here/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_chat_template_is_one_line(tmp_path):
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        load_model(save_tiny_model(tmp_path, chat_template=None))


def test_a_head_that_scales_its_logits_is_refused(tmp_path):
    model, _ = load_model(save_tiny_model(tmp_path))
    model.config.logit_scale = 0.5
    with pytest.raises(InputError, match=r"logit_scale=0.5 scales the logits"):
        lm_head(model)


def test_a_softcap_of_the_head_is_found(tmp_path):
    model, _ = load_model(save_tiny_model(tmp_path))
    model.config.final_logit_softcapping = 30.0
    assert lm_head(model).logit_softcap == 30.0
