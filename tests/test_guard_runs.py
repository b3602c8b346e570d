"""Guards in real short runs: what each says, what stays untouched, what is left for looking at."""

import json

import pytest
import torch

from fdfast.cli import main
from fdfast.data.problems import questions_path
from fdfast.errors import MachineError
from fdfast.lean import LeanPool, Verdict
from fdfast.rollout.records import read_records
from fdfast.trainer import train
from fdfast.trainer.config_file import make_config
from fdfast.trainer.guards import alarms
from fdfast.trainer.metrics import read_jsonl
from fdfast.trainer.scoring import Scorer
from tests.test_sinks import read_events
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def settings(tiny, folder, **values):
    """A run of a second: two questions a step, answers of six tokens."""
    defaults = {
        "model_name_or_path": str(tiny), "output_dir": str(folder), "task": "chat",
        "dataset": str(questions_path()), "dataset_split": "", "feedback.source": "constant",
        "feedback.text": "Be concise.", "prompts_per_step": 2, "max_completion_length": 6,
        "teacher.every": 1, "learning_rate": 1e-3, "warmup_steps": 1, "save_steps": 0,
        "save_final_model": False, "max_steps": 3,
    }  # fmt: skip
    return make_config(defaults | values)


def change(monkeypatch, what):
    """`what(number of the call, scorer, metrics)` after each score, from 1."""
    score, calls = Scorer.score, []

    def scored(self, attempts, *, backward):
        found = score(self, attempts, backward=backward)
        calls.append(1)
        return what(len(calls), self, found) or found

    monkeypatch.setattr(Scorer, "score", scored)


def poison(steps, value=torch.nan):
    """The gradient of these steps, of the second layer's q_proj, has one such element."""

    def what(number, scorer, metrics):
        if number in steps:
            scorer.model.get_parameter("model.layers.1.self_attn.q_proj.weight").grad[3, 4] = value

    return what


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_step_leaves_its_batch_and_touches_nothing(
    tiny, tmp_path, monkeypatch, capsys, value, dtype
):
    """Weights, masters, Adam's moments and steps, the teacher: bit for bit those before."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        change(patch, poison({2}, value))
        train(settings(tiny, folder, max_steps=2, save_steps=1, dtype=dtype))
    said = capsys.readouterr().out
    bad = folder / "bad-step-2"
    assert "gradient of model.layers.1.self_attn.q_proj.weight; its batch is in" in said
    assert f"fdfast show {bad}" in said
    before, after = (
        torch.load(folder / f"checkpoint-{step}" / "state.pt", weights_only=True) for step in (1, 2)
    )
    for name in ("optimizer", "teacher", "master"):
        assert_equal(before[name], after[name], name)
    one, two = (
        (folder / f"checkpoint-{step}" / "model" / "model.safetensors").read_bytes()
        for step in (1, 2)
    )
    assert one == two
    report = json.loads((bad / "step.json").read_text())
    assert report["not_finite"]["tensors"] == ["gradient of model.layers.1.self_attn.q_proj.weight"]
    assert report["norms"]["model.layers.1.self_attn"]["grad_norm"] is None
    assert report["norms"]["model.layers.0.self_attn"]["grad_norm"] > 0, (
        "clipping did not spread it"
    )
    records = list(read_records(bad / "attempts.jsonl"))
    assert [r.problem for r in records] == [a["problem"] for a in report["attempts"]]
    assert all(r.trajectory.ids and r.trajectory.prompt_ids for r in records)
    assert main(["show", str(bad)]) == 0
    assert records[0].problem in capsys.readouterr().out


def assert_equal(one, two, place):
    """The same tree of tensors, bit for bit; the rate of a step alone may be another."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), place
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for key in one:
            if key != "lr":
                assert_equal(one[key], two[key], f"{place}.{key}")
    elif isinstance(one, list):
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{place}[{number}]")
    else:
        assert one == two, place


def test_a_loss_that_is_not_finite_is_named_and_the_run_says_where_to_look(
    tiny, tmp_path, monkeypatch
):
    change(monkeypatch, lambda number, scorer, metrics: metrics | {"loss": float("inf")})
    config = settings(tiny, tmp_path, max_steps=9, max_skipped_steps=4, max_bad_step_dumps=2)
    with pytest.raises(MachineError, match=r"not finite in 5 steps in a row.*bad-step-5$"):
        train(config, quiet=True)
    assert sorted(p.name for p in tmp_path.glob("bad-step-*")) == ["bad-step-4", "bad-step-5"]
    report = json.loads((tmp_path / "bad-step-5" / "step.json").read_text())
    assert report["not_finite"] == {"metrics": ["loss"], "tensors": []}


def test_a_spike_of_kl_is_told_in_the_run(tiny, tmp_path, monkeypatch, capsys):
    change(monkeypatch, lambda n, scorer, metrics: metrics | {"kl": 50.0 if n == 7 else 0.1})
    rows = train(settings(tiny, tmp_path, max_steps=8))
    assert [row["alarms"] for row in rows] == [[]] * 6 + [["kl"], []]
    said = capsys.readouterr().out
    assert "step 7: kl 50 is more than 10 times its median 0.1 over 6 steps; look at" in said


def test_what_was_usual_in_another_stage_raises_no_alarm():
    config = make_config({"feedback.text": "x"})
    before = [{"stage": 0, "kl": 0.001, "entropy": 3.0}] * 9
    row = {"stage": 1, "kl": 0.1, "entropy": 1.0}
    assert alarms(before, row, config) == []
    assert {a.name for a in alarms(before, row | {"stage": 0}, config)} == {"kl", "entropy"}


@pytest.mark.parametrize(
    ("kind", "name", "line"),
    [
        ("failed", "reward", "step 2: no attempt was proved in 2 steps; take easier problems"),
        ("crashed", "lean", "step 1: every check of the step crashed or ran out of time; raise"),
    ],
)
def test_a_lean_that_never_proves_or_only_fails_is_told(
    tiny, tmp_path, monkeypatch, capsys, kind, name, line
):
    monkeypatch.setattr(LeanPool, "check", lambda *_, **__: Verdict(kind, reason="so"))
    config = settings(
        tiny, tmp_path, max_steps=2, task="lean", dataset="base_theorems",
        zero_reward_alarm_steps=2,
    )  # fmt: skip
    rows = train(config)
    assert name in rows[1]["alarms"]
    assert line in capsys.readouterr().out


def test_the_curves_of_a_resumed_run_have_every_point_once(tiny, tmp_path):
    values = {
        "logging.report_to": ["tensorboard"], "logging.metric_names": "verl", "save_steps": 2,
        "eval_num_prompts": 1, "eval_split": "", "eval_steps": 2,
    }  # fmt: skip
    train(settings(tiny, tmp_path, max_steps=3, **values), quiet=True)
    train(settings(tiny, tmp_path, max_steps=5, **values), resume=True, quiet=True)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    seen = read_events(tmp_path / "logs" / "tensorboard")
    trained = [row for row in rows if "eval_loss" not in row]
    assert seen["actor/loss"] == [(row["step"], row["loss"]) for row in trained]
    assert len(trained) == 5
    assert seen["timing_s/step"]
    evaluated = [(row["step"], row["eval_kl"]) for row in rows if "eval_loss" in row]
    assert seen["eval_actor/kl_loss"] == evaluated


def test_a_full_disk_is_one_line_that_names_the_way_out(tiny, tmp_path, monkeypatch):
    change(monkeypatch, poison({1}))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fdfast.trainer.update.dump_bad_step", full)
    with pytest.raises(
        MachineError, match=r"batch of step 1 can't be kept .*No space left.*dumps=0"
    ):
        train(settings(tiny, tmp_path), quiet=True)
