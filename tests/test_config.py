"""Settings: a YAML file, `key=value` words, and what a wrong one is told."""

import dataclasses
import re

import pytest

from fdfast.cli import main
from fdfast.errors import InputError
from fdfast.trainer import PRESETS, TrainConfig, load_config
from fdfast.trainer.config_file import make_config
from fdfast.trainer.describe import documentation
from fdfast.trainer.settings import flat, path_of
from fdfast.trainer.stages import Stage


def test_the_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.loss.teacher_top_k, config.loss.tail) == (25, "truncate")
    assert config.loss.divergence == "forward_kl"
    assert (config.teacher.alpha, config.teacher.every) == (0.9, 5)
    assert (config.optim.learning_rate, config.optim.warmup_steps) == (1e-5, 50)
    assert (config.rollout.prompts_per_step, config.rollout.num_generations) == (128, 1)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_config(name):
    assert load_config(None, [], preset=name)


def test_words_go_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 2.0e-5\nmax_steps: 7\nexamples: [[Q, A]]\n")
    config = load_config(path, ["max_steps=9", "learning_rate=3e-5"], preset="fd_paper")
    assert (config.optim.max_steps, config.optim.learning_rate) == (9, 3e-5)
    assert config.prompt.examples == (("Q", "A"),)


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
    path = path_of(word.partition("=")[0], TrainConfig, "")
    assert flat(load_config(None, [word]))[path] == value


@pytest.mark.parametrize(
    "text", ["", "Yes", "3", "1e5", "null", "{unclosed", "a: b", "one sentence", " x = 'y' "]
)
def test_a_texts_word_is_taken_as_it_is(text):
    for key in ("data.dataset_split", "prompt.system_prompt", "feedback.text"):
        assert flat(load_config(None, [f"{key}={text}"]))[key] == text
    assert load_config(None, ["dtype=bfloat16"]).model.dtype == "bfloat16"


def test_words_may_complete_what_a_file_leaves_open(tmp_path):
    """The rules between settings hold for all of them together, not for the file alone."""
    path = tmp_path / "run.yaml"
    path.write_text("task: chat\nfeedback:\n  source: constant\n")
    assert load_config(path, ["feedback.text=Be brief."]).feedback.text == "Be brief."


@pytest.mark.parametrize("name", ["demo_concise", "demo_lean"])
def test_a_demo_run_can_be_resumed(name):
    config = load_config(None, [], preset=name)
    assert (config.checkpoint.save_steps, config.checkpoint.save_total_limit) == (4, 1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["zzz=1"], "unknown key 'zzz'$"),
        (["max_steps=many"], "max_steps: Input should be a valid integer.*; got 'many'"),
        (["max_steps=0"], "max_steps must be at least 1; got 0"),
        (["temperature=0"], r"^config: rollout.temperature must be positive; got 0\.0$"),
        (["max_feedback_length=0"], "max_feedback_length must be at least 1; got 0"),
        (["learning_rate=nan"], "learning_rate must be a finite number; got nan"),
        (["lean_timeout_s=.inf"], "lean.timeout_s must be a finite number; got inf"),
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
        (["feedback.source=critic"], "feedback.source must be one of constant, .*; got 'critic'"),
        (["feedback.source=constant"], "feedback 'constant' wants feedback.text"),
        (["task=chat"], "feedback 'verifier' wants task 'lean'"),
        (["task=chat", "feedback.source=solution"], "feedback 'solution' wants task 'lean'"),
        (
            ["divergence=jsd", "divergence_alpha=1"],
            r"divergence_alpha must lie in \(0, 1\) for divergence 'jsd'; got 1",
        ),
        (["seed={unclosed"], "command line: seed: '{unclosed' is no YAML: "),
        (["save_steps=-1"], "save_steps must not be negative; got -1"),
        (["teacher.alpha=2"], r"teacher.alpha must lie in \[0, 1\]; got 2"),
        (["divergence=js"], "divergence must be one of forward_kl, .*; got 'js'"),
        (["dtype=int8"], "dtype: Input should be 'float32', 'bfloat16' or 'float16'; got 'int8'"),
        (
            ["prompt_template=hello"],
            r"prompt_template or prompt.completion_prefix must contain \{prompt\}",
        ),
        (["fast"], "'fast' is no setting; write key=value"),
        (["feedback=llm"], "command line: feedback is a group .*; did you mean feedback.source"),
        (["loss=1"], r"^command line: loss is a group .*, \.\.\.\); got 1$"),
        (["max_pass_tokens=true"], "model.max_pass_tokens: must be a number; got True"),
        (["beta=true"], "command line: loss.beta: must be a number; got True"),
        (["report_to=wandb"], r"report_to: must be a list, \[wandb\] say; got 'wandb'"),
        (["stages=[{max_steps: 0}]"], "^config: stage 1: optim.max_steps must be at least 1"),
        (["stages=[{max_steps: 2, model.beta: 0.1}]"], "stages: unknown key 'model.beta'"),
        (["stages=[{max_steps: 2, beta: 1, loss: {beta: 1}}]"], "stages: beta is given twice"),
        (["stages=[{max_steps: 2, temperature: 1}]"], "rollout.temperature is the run's, not a "),
        (["stages=[{max_steps: 2}]", "max_steps=3"], "optim.max_steps would be ignored"),
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
        ("loss: {tail: bucket}\nloss: {beta: 0}\n", r"bad\.yaml:2: loss is given twice; drop one"),
        ("stages:\n- beta: 0\n  beta: 1\n", r"bad\.yaml:3: beta is given twice; drop one"),
        ("beta: 0\nloss: {beta: 1}\n", r"bad\.yaml: loss.beta is given twice; drop one"),
        ("max_step: 3\n", r"bad\.yaml: unknown key 'max_step'; did you mean 'max_steps'?"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=line) as caught:
            load_config(path, [])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="preset must be one of"):
        load_config(None, [], preset="fast")


def test_a_group_may_be_a_word_over_the_preset_and_under_later_words():
    words = ["loss={beta: 0.5, epsilon: 0.3}", "beta=0.25"]
    loss = load_config(None, words, preset="grpo_paper").loss
    assert (loss.beta, loss.epsilon, loss.distillation_weight) == (0.25, 0.3, 0.0)


def test_the_stages_line_names_each_of_a_stages_settings():
    said = documentation(TrainConfig())["stages"]
    assert all(field.name in said for field in dataclasses.fields(Stage))


def test_a_stages_settings_may_stand_in_groups_as_the_runs_do():
    plain = load_config(None, ["stages=[{max_steps: 2, beta: 0.5, learning_rate: 1.0e-3}]"])
    named = "{optim: {max_steps: 2, learning_rate: 1.0e-3}, loss.beta: 0.5}"
    assert load_config(None, [f"stages=[{named}]"]) == plain


def test_a_settings_value_is_never_taken_for_another_type():
    with pytest.raises(InputError, match="seed: "):
        make_config({"seed": 1.5})


def test_a_divergence_without_alpha_takes_any():
    assert make_config({"divergence": "forward_kl", "divergence_alpha": 0.0}).loss


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_what_config_show_prints_is_the_config_again(preset, tmp_path, capsys):
    assert main(["config", "show", *([preset] if preset else [])]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(tmp_path / "shown.yaml", []) == load_config(None, [], preset=preset)
    for path in flat(TrainConfig()):  # a line of documentation above each
        group, _, name = path.rpartition(".")
        part = shown.split(f"\n{group}:\n")[1] if group else "\n" + shown
        above = re.split(rf"\n *{name}:", part)[0].rsplit("\n", 1)[-1].strip()
        assert above.startswith("# "), path
        assert len(above) > 5


def test_config_show_speaks_yaml_of_none_and_of_nothing(capsys):
    assert main(["config", "show"]) == 0
    shown = capsys.readouterr().out
    assert "upper clip range; null: epsilon." in shown
    assert "[] for metrics.jsonl alone" in shown
    assert "None" not in shown
    assert "()" not in shown


def test_config_show_takes_settings_and_refuses_what_is_none(capsys):
    assert main(["config", "show", "fd_paper", "learning_rate=2e-5"]) == 0
    assert "\n  learning_rate: 2.0e-05\n" in capsys.readouterr().out
    assert main(["config", "show", "fd_paper", "learning_rat=2e-5"]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"vllm.mode": "server"}, "want rollout.use_vllm=true"),
        ({"vllm.server_base_url": "http://127.0.0.1:8000"}, "want rollout.use_vllm=true"),
        ({"use_vllm": True, "vllm.mode": "server"}, "names the server of vllm.mode 'server'"),
        ({"use_vllm": True, "vllm.max_model_length": 512}, "must be at least max_prompt_length"),
        ({"tool_libraries": ["/tmp"]}, "set tools=true"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(values, line):
    with pytest.raises(InputError, match=line):
        make_config(values)
