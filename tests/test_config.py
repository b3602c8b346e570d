"""Settings: a YAML file, `key=value` words, and what a wrong one is told."""

import dataclasses

import pytest

from fdfast.cli import main
from fdfast.errors import InputError
from fdfast.trainer import PRESETS, TrainConfig, load_config
from fdfast.trainer.config_file import make_config


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


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("seed=3", 3),
        ("grad_filter=null", None),
        ("learning_rate=2e-5", 2e-5),
        ("save_final_model=no", False),
        ("problem_names=[easy_*, taut_*]", ("easy_*", "taut_*")),
    ],
)
def test_words_are_read_as_yaml(word, value):
    assert getattr(load_config(None, [word]), word.partition("=")[0]) == value


@pytest.mark.parametrize(
    "text", ["", "Yes", "3", "1e5", "null", "{unclosed", "a: b", "one sentence", " x = 'y' "]
)
def test_a_texts_word_is_taken_as_it_is(text):
    for key in ("dataset_split", "system_prompt", "feedback_text"):
        assert getattr(load_config(None, [f"{key}={text}"]), key) == text
    assert load_config(None, ["dtype=bfloat16"]).dtype == "bfloat16"


def test_words_may_complete_what_a_file_leaves_open(tmp_path):
    """The rules between settings hold for all of them together, not for the file alone."""
    path = tmp_path / "run.yaml"
    path.write_text("task: chat\nfeedback: constant\n")
    assert load_config(path, ["feedback_text=Be brief."]).feedback_text == "Be brief."


@pytest.mark.parametrize("name", ["demo_concise", "demo_lean"])
def test_a_demo_run_can_be_resumed(name):
    config = load_config(None, [], preset=name)
    assert (config.save_steps, config.save_total_limit) == (4, 1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["zzz=1"], "unknown key 'zzz'$"),
        (["max_steps=many"], "max_steps: Input should be a valid integer.*; got 'many'"),
        (["max_steps=0"], "max_steps must be at least 1; got 0"),
        (["temperature=0"], r"^config: temperature must be positive; got 0\.0$"),
        (["max_feedback_length=0"], "max_feedback_length must be at least 1; got 0"),
        (["learning_rate=nan"], "learning_rate must be a finite number; got nan"),
        (["lean_timeout_s=.inf"], "lean_timeout_s must be a finite number; got inf"),
        (["max_grad_norm=.inf"], "max_grad_norm must be a finite number; got inf"),
        (["grad_filter=.nan"], "grad_filter must be a finite number; got nan"),
        (["grad_filter=1"], r"grad_filter must lie in \[0, 1\); got 1"),
        (["grad_filter=-0.1"], r"grad_filter must lie in \[0, 1\); got -0.1"),
        (["top_p=1.1"], r"top_p must lie in \(0, 1\]; got 1.1"),
        (["adam_beta1=1"], r"adam_beta1 must lie in \[0, 1\); got 1"),
        (["adam_beta2=-0.5"], r"adam_beta2 must lie in \[0, 1\); got -0.5"),
        (["adam_epsilon=0"], "adam_epsilon must be positive; got 0"),
        (["backend=cuda"], "backend must be one of auto, .*; got 'cuda'"),
        (["output_dir="], "output_dir must name a folder; got ''"),
        (["feedback=critic"], "feedback must be one of constant, .*; got 'critic'"),
        (["feedback=constant"], "feedback 'constant' wants feedback_text"),
        (["task=chat"], "feedback 'verifier' wants task 'lean'"),
        (["task=chat", "feedback=solution"], "feedback 'solution' wants task 'lean'"),
        (
            ["divergence=jsd", "divergence_alpha=1"],
            r"divergence_alpha must lie in \(0, 1\) for divergence 'jsd'; got 1",
        ),
        (["seed={unclosed"], "command line: seed: '{unclosed' is no YAML: "),
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


def test_a_divergence_without_alpha_takes_any():
    assert TrainConfig(divergence="forward_kl", divergence_alpha=0.0).divergence_alpha == 0.0


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_what_config_show_prints_is_the_config_again(preset, tmp_path, capsys):
    assert main(["config", "show", *([preset] if preset else [])]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(tmp_path / "shown.yaml", []) == load_config(None, [], preset=preset)
    for field in dataclasses.fields(TrainConfig):  # a line of documentation above each
        above = shown.split(f"\n{field.name}:")[0].rsplit("\n", 1)[-1]
        assert above.startswith("# "), field.name
        assert len(above) > 5


def test_config_show_takes_settings_and_refuses_what_is_none(capsys):
    assert main(["config", "show", "fd_paper", "learning_rate=2e-5"]) == 0
    assert "\nlearning_rate: 2.0e-05\n" in capsys.readouterr().out
    assert main(["config", "show", "fd_paper", "learning_rat=2e-5"]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"vllm_mode": "server"}, "want use_vllm=true"),
        ({"vllm_server_base_url": "http://127.0.0.1:8000"}, "want use_vllm=true"),
        ({"use_vllm": True, "vllm_mode": "server"}, "names the server of vllm_mode 'server'"),
        ({"use_vllm": True, "vllm_max_model_length": 512}, "must be at least max_prompt_length"),
        ({"tool_libraries": ["/tmp"]}, "set tools=true"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(values, line):
    with pytest.raises(InputError, match=line):
        make_config(values)
