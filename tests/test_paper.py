"""The paper's numbers in the presets, what it leaves open, and a dry run of every preset."""

import pytest

from fdfast.cli import main
from fdfast.trainer import PRESETS, TrainConfig, load_config
from fdfast.trainer.paper import OPEN_CHOICES, PAPER_PRESETS, STATED
from fdfast.trainer.settings import flat
from fdfast.trainer.stages import stage_configs
from tests.tiny import save_tiny_model


@pytest.mark.parametrize("preset", list(STATED))
def test_the_papers_table_is_in_its_presets(preset):
    """Written out here once more, from paper.md, so that neither side can drift alone."""
    table = {
        "prompt.max_prompt_length": 2048, "rollout.max_completion_length": 8192,
        "optim.warmup_steps": 50, "rollout.prompts_per_step": 128,
    }  # fmt: skip
    table |= {
        "fd_paper": {
            "optim.learning_rate": 1e-5, "rollout.num_generations": 1, "loss.teacher_top_k": 25,
            "loss.tail": "truncate", "loss.divergence": "forward_kl", "teacher.alpha": 0.9,
            "teacher.every": 5,
        },
        "grpo_paper": {
            "optim.learning_rate": 1e-7, "rollout.num_generations": 5, "loss.beta": 0.001,
        },
    }[preset]  # fmt: skip
    assert STATED[preset] == table
    config = flat(load_config(None, [], preset=preset))
    assert {name: config[name] for name in table} == table


def test_fd_then_grpo_is_one_column_after_the_other():
    first, second = stage_configs(load_config(None, [], preset="fd_then_grpo"))
    for config, preset in ((first, "fd_paper"), (second, "grpo_paper")):
        seen = flat(config)
        assert {name: seen[name] for name in STATED[preset]} == STATED[preset]


def test_every_open_choice_names_settings_and_none_of_the_papers_list_is_missing():
    asked = [choice.question for choice in OPEN_CHOICES]
    for topic in (
        "where F(y) stands", "sampling temperature", "loss normalisation", "tool limits",
        "optimizer", "importance sampling", "thinking mode", "samples per problem at evaluation",
    ):  # fmt: skip
        assert any(topic in question for question in asked), topic
    known = flat(TrainConfig())
    for choice in OPEN_CHOICES:
        assert set(choice.settings) <= known.keys(), choice.question
        assert choice.default
        assert choice.reason


@pytest.mark.parametrize("preset", list(PRESETS))
def test_config_show_lists_what_the_paper_leaves_open_with_its_presets_alone(
    preset, tmp_path, capsys
):
    assert main(["config", "show", preset]) == 0
    shown = capsys.readouterr().out
    listed = "# What the paper leaves open" in shown
    assert listed == (preset in PAPER_PRESETS)
    if listed:
        assert all(choice.reason in shown for choice in OPEN_CHOICES)
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(tmp_path / "shown.yaml", []) == load_config(None, [], preset=preset)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_has_a_dry_run(preset, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "m")
    (model / "model.safetensors").unlink()  # it needs no weights
    words = ["--preset", preset, "--dry-run", "--gpu", "h200", "--gpus", "8"]
    assert main(["train", *words, f"model_name_or_path={model}"]) == 0
    shown = capsys.readouterr().out
    stages = stage_configs(load_config(None, [], preset=preset))
    assert shown.count("time of a step") == len(stages)
    assert f"stage 1, {'GRPO' if preset == 'grpo_paper' else 'Feedback Distillation'}" in shown
    assert shown.count("modelled") >= 12 * len(stages)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpu", "h200"], "--gpu is for --dry-run; add it, or drop this"),
        (["--dry-run", "--gpu", "tpu"], "--gpu must be one of a100, h100, h200, b200; got 'tpu'"),
        (["--dry-run", "--gpus", "0"], "--gpus must be at least 1; got 0"),
        (["--dry-run", "--prompt-tokens", "0"], "--prompt-tokens must be at least 1; got 0"),
    ],
)
def test_a_wrong_dry_run_is_one_line(words, line, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "m")
    assert main(["train", *words, f"model_name_or_path={model}"]) == 2
    assert capsys.readouterr().err == f"fdfast: {line}\n"
