"""Settings: a YAML file, `key=value` words, and what a wrong one is told."""

import pytest

from fdfast.errors import InputError
from fdfast.trainer import PRESETS, TrainConfig, load_config
from fdfast.trainer.config import make_config


def test_the_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.teacher_top_k, config.tail, config.divergence) == (25, "truncate", "forward_kl")
    assert (config.teacher_ema_alpha, config.teacher_ema_every) == (0.9, 5)
    assert (config.learning_rate, config.warmup_steps) == (1e-5, 50)
    assert (config.prompts_per_step, config.num_generations) == (128, 1)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_config(name):
    assert load_config(None, [], preset=name)


def test_words_go_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 2.0e-5\nmax_steps: 7\nexamples: [[Q, A]]\n")
    config = load_config(path, ["max_steps=9", "learning_rate=3e-5"], preset="fd_paper")
    assert (config.max_steps, config.learning_rate) == (9, 3e-5)
    assert config.examples == (("Q", "A"),)


@pytest.mark.parametrize("word", ["seed=3", "feedback_text=one short sentence", "grad_filter=null"])
def test_words_are_read_as_yaml(word):
    key, _, value = word.partition("=")
    expected = {"seed": 3, "grad_filter": None}.get(key, value)
    assert getattr(load_config(None, [word]), key) == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["zzz=1"], "unknown key 'zzz'$"),
        (["max_steps=many"], "max_steps: Input should be a valid integer.*; got 'many'"),
        (["max_steps=0"], "max_steps must be at least 1; got 0"),
        (["temperature=0"], "temperature must be positive; got 0"),
        (["save_steps=-1"], "save_steps must not be negative; got -1"),
        (["teacher_ema_alpha=2"], r"teacher_ema_alpha must lie in \[0, 1\]; got 2"),
        (["divergence=js"], "divergence must be one of forward_kl, .*; got 'js'"),
        (["dtype=int8"], "dtype: Input should be 'float32', 'bfloat16' or 'float16'; got 'int8'"),
        (
            ["prompt_template=hello"],
            r"prompt_template or completion_prefix must contain \{prompt\}",
        ),
        (["fast"], "'fast' is no setting; write key=value"),
    ],
)
def test_a_wrong_setting_is_one_line(words, line):
    with pytest.raises(InputError, match=line) as caught:
        load_config(None, words)
    assert "\n" not in str(caught.value)


def test_a_wrong_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml", [])
    path = tmp_path / "bad.yaml"
    for text, line in (
        ("a: [1", r"bad\.yaml: is no YAML"),
        ("- 1\n", r"bad\.yaml: must hold `key: value` lines"),
        ("max_step: 3\n", r"bad\.yaml: unknown key 'max_step'; did you mean 'max_steps'?"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=line) as caught:
            load_config(path, [])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="preset must be one of"):
        load_config(None, [], preset="fast")


def test_a_settings_value_is_never_taken_for_another_type():
    with pytest.raises(InputError, match="seed: "):
        make_config({"seed": 1.5})
