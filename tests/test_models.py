"""Loading models, their hidden states and heads; every wrong path is one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fdfast.errors import InputError, MachineError
from fdfast.models import hidden_states, lm_head, load_model, save_model
from fdfast.packing import PrefixTree
from tests.tiny import save_tiny_model


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_hidden_states_through_the_head_are_the_models_logits(tmp_path, kind):
    model, _ = load_model(save_tiny_model(tmp_path, kind=kind))
    torch.manual_seed(0)
    ids = torch.randint(3, 384, (2, 9))
    tree = PrefixTree.from_sequences(ids.tolist())
    head = lm_head(model)
    with torch.no_grad():
        ours = hidden_states(model, tree) @ head.weight.T
        theirs = model(input_ids=ids).logits[:, :-1]
    torch.testing.assert_close(ours, theirs.flatten(0, 1))


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


def rewrite_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_without_one_of_the_weights_is_refused(tmp_path, tied):
    """transformers would fill it with random numbers."""
    save_tiny_model(tmp_path, tied=tied)
    load_model(tmp_path)  # a tied head is in no file and is not missing
    key = "model.norm.weight" if tied else "lm_head.weight"
    rewrite_weights(tmp_path, lambda weights: weights.pop(key))
    with pytest.raises(InputError, match=rf"has no weights for 1 of .*\({key}\)") as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_tiny_model(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(InputError, match=r"another shape for 1 of .*\(model\.norm\.weight\)"):
        load_model(tmp_path)


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", lambda path: path.write_bytes(b"")),
        ("config.json", lambda path: path.write_text("[]")),
        ("config.json", lambda path: path.write_text("{}")),
        ("tokenizer.json", lambda path: path.write_text("{}")),
        ("tokenizer.json", lambda path: path.write_text("[]")),
        ("tokenizer.json", cut),
        ("tokenizer_config.json", lambda path: path.write_text("[]")),
        ("generation_config.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_folder(tmp_path, file, damage):
    save_tiny_model(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_pad_and_eos_is_one_line(tmp_path):
    save_tiny_model(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for name in ("pad_token", "eos_token"):
        settings.pop(name)
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="neither a pad nor an eos token") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line_within_seconds():
    """Nothing answers at that port; transformers alone would retry for a minute."""
    code = (
        "import sys; from fdfast.models import load_model\n"
        "try: load_model('nobody-here/no-such-model')\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9"},
        timeout=30,
    )
    assert "the hub gave no such model" in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


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
