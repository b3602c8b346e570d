"""Alarms and skipped steps: each says what happened, and none changes what it need not."""

import json

import pytest
import torch

from fdfast.data.problems import questions_path
from fdfast.errors import MachineError
from fdfast.models import load_model
from fdfast.trainer import TrainConfig, make_config, train
from fdfast.trainer.checkpoint import checkpoints
from fdfast.trainer.guards import alarms, num_skipped, rate_factor
from fdfast.trainer.metrics import read_jsonl
from fdfast.trainer.scoring import Scorer
from tests.tiny import save_tiny_model

STEADY = [{"kl": 0.1, "entropy": 1.0, "reward": 0.5}] * 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def settings(tiny, folder, **values):
    defaults = {
        "model_name_or_path": str(tiny),
        "output_dir": str(folder),
        "task": "chat",
        "dataset": str(questions_path()),
        "dataset_split": "",
        "feedback.source": "constant",
        "feedback.text": "Be concise.",
        "prompts_per_step": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "save_steps": 0,
        "save_final_model": False,
    }
    return make_config(defaults | values)


def names(history, row, **values):
    return [alarm.name for alarm in alarms(history, row, make_config(values))]


def test_each_alarm_is_heard_where_it_should_be_and_not_before():
    assert names(STEADY, STEADY[0]) == []
    assert names(STEADY, {"kl": 0.1, "entropy": 0.49}) == ["entropy"]
    assert names(STEADY, {"kl": 0.1, "entropy": 0.51}) == []
    assert names(STEADY, {"kl": 1.01, "entropy": 1.0}) == ["kl"]
    assert names(STEADY, {"kl": 0.99, "entropy": 1.0}) == []
    assert names(STEADY, {"kl": 0.1, "verdicts/timeout": 0.5, "verdicts/crashed": 0.5}) == ["lean"]
    assert names(STEADY, {"kl": 0.1, "verdicts/timeout": 0.9}) == []
    zeros = [{"kl": 0.1, "reward": 0.0}] * 9
    assert names(zeros, zeros[0]) == ["reward"]
    assert names(zeros[1:], zeros[0]) == []
    assert names([*zeros[1:], {"kl": 0.1, "reward": 0.1}], zeros[0]) == []
    assert names([], {"kl": 9.0, "entropy": 0.0}) == [], "nothing is usual yet"


def test_one_fall_of_entropy_is_one_alarm_and_zero_turns_an_alarm_off():
    low = {"kl": 0.1, "entropy": 0.1}
    assert names([*STEADY, low | {"alarms": ["entropy"]}], low) == []
    assert names(STEADY, low, entropy_alarm_ratio=0.0) == []
    assert names(STEADY, {"kl": 99.0, "entropy": 1.0}, kl_alarm_ratio=0.0) == []
    zeros = [{"kl": 0.1, "reward": 0.0}] * 30
    assert names(zeros, zeros[0], zero_reward_alarm_steps=0) == []


def test_null_in_a_skipped_steps_row_is_no_number():
    odd = {"kl": None, "entropy": None, "skipped": 1.0}
    assert names([*STEADY, odd], {"kl": 0.1, "entropy": 0.1}) == ["entropy"]
    assert names(STEADY, {"kl": float("nan"), "entropy": float("nan")}) == []


def test_counts_from_the_rows():
    rows = [{"skipped": 1.0}, {"skipped": 0.0}, {"skipped": 1.0}, {"skipped": 1.0}]
    assert num_skipped(rows) == 2
    assert num_skipped(rows[:2]) == 0
    heard = [{"alarms": ["entropy"]}, {"alarms": []}, {"alarms": ["kl", "entropy"]}]
    assert rate_factor(heard, TrainConfig()) == 1.0
    assert rate_factor(heard, make_config({"entropy_alarm_action": "lower_rate"})) == 0.25


def poison(monkeypatch, steps):
    """The gradient of these steps, from 1, has a NaN in it."""
    score, calls = Scorer.score, []

    def poisoned(self, attempts, *, backward):
        found = score(self, attempts, backward=backward)
        calls.append(1)
        if len(calls) in steps:
            next(p for p in self.model.parameters() if p.grad is not None).grad[0] = torch.nan
        return found

    monkeypatch.setattr(Scorer, "score", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_changes_no_weight(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {1})
    [row] = train(settings(tiny, tmp_path, max_steps=1), quiet=True)
    assert row["skipped"] == 1.0
    assert row["grad_norm"] is None
    poison(monkeypatch, {2})
    config = settings(tiny, tmp_path / "b", max_steps=4)
    rows = train(config, quiet=True)
    assert [row["skipped"] for row in rows] == [0.0, 1.0, 0.0, 0.0]
    assert all(row["grad_norm"] for row in (rows[0], rows[2], rows[3]))


def test_weights_after_a_skipped_step_are_those_before(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {1})
    train(settings(tiny, tmp_path, max_steps=1, save_final_model=True), quiet=True)
    before, _ = load_model(tiny)
    after, _ = load_model(tmp_path / "model")
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name


def test_too_many_skipped_steps_end_the_run_with_a_checkpoint(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4})
    config = settings(tiny, tmp_path, max_steps=9, max_skipped_steps=2)
    with pytest.raises(MachineError, match=r"step 4: .* not finite in 3 steps in a row"):
        train(config, quiet=True)
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-4"]
    monkeypatch.undo()
    rows = train(config, resume=True, quiet=True)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 0, 0, 0, 0, 0]


def test_an_entropy_alarm_stops_the_run_where_it_is_asked_to(tiny, tmp_path, monkeypatch, capsys):
    score, calls = Scorer.score, []

    def falling(self, attempts, *, backward):
        calls.append(1)
        found = score(self, attempts, backward=backward)
        return found | {"entropy": 0.01 if len(calls) == 7 else 1.0}

    monkeypatch.setattr(Scorer, "score", falling)
    config = settings(tiny, tmp_path, max_steps=9, entropy_alarm_action="stop")
    with pytest.raises(MachineError, match=r"step 7: entropy 0.010 is below 0.5 of its median"):
        train(config)
    assert "precedes a collapse" in capsys.readouterr().out
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-7"]
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["alarms"] == ["entropy"]


def test_a_lowered_rate_survives_a_resume(tiny, tmp_path, monkeypatch):
    score, calls = Scorer.score, []

    def falling(self, attempts, *, backward):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("stopped here")
        found = score(self, attempts, backward=backward)
        return found | {"entropy": 0.01 if len(calls) == 6 else 1.0}

    monkeypatch.setattr(Scorer, "score", falling)
    config = settings(tiny, tmp_path, max_steps=9, entropy_alarm_action="lower_rate")
    with pytest.raises(RuntimeError, match="stopped here"):
        train(config, quiet=True)
    rows = train(config, resume=True, quiet=True)
    assert [row["learning_rate"] for row in rows] == [1e-3] * 6 + [5e-4] * 3


def test_a_run_says_what_it_was_made_with(tiny, tmp_path):
    train(settings(tiny, tmp_path, max_steps=1, save_steps=1), quiet=True)
    [entry] = json.loads((tmp_path / "run.json").read_text())
    assert entry["config"]["optim.learning_rate"] == 1e-3
    assert entry["config"]["seed"] == 0
    assert entry["versions"]["torch"].startswith("2.")
    assert entry["step"] == 0
    assert entry["commit"]
    train(settings(tiny, tmp_path, max_steps=2, save_steps=1), resume=True, quiet=True)
    entries = json.loads((tmp_path / "run.json").read_text())
    assert [(e["step"], e["config"]["optim.max_steps"]) for e in entries] == [(0, 1), (1, 2)]
