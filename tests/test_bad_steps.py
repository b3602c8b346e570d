"""The dump of a step that is not finite: what it says, and what stays."""

import json

import torch

from fdfast.data.problems import Problem
from fdfast.rollout import Trajectory
from fdfast.trainer.bad_steps import bad_steps, dump_bad_step, parameter_groups
from fdfast.trainer.batch import Attempt


def weights():
    """Two layers and a head, each gradient a number of its own."""
    made = {
        name: torch.full((4,), value, requires_grad=True)
        for name, value in (
            ("model.layers.0.self_attn.q_proj.weight", 1.0),
            ("model.layers.0.self_attn.k_proj.weight", 2.0),
            ("model.layers.0.mlp.up_proj.weight", 3.0),
            ("model.norm.weight", 4.0),
            ("lm_head.weight", 5.0),
        )
    }
    for weight in made.values():
        weight.grad = weight.detach() * 10
    return made


def dump(folder, step, made, *, keep=2, **metrics):
    attempt = Attempt(
        Problem("p", "Why?"),
        Trajectory([5], [-1.0], [True], "", "stop", prompt_ids=[1]),
        [1, 2],
        advantage=0.5,
    )
    return dump_bad_step(
        folder, step, rows=[{"problem": "p"}], attempts=[attempt], metrics=metrics,
        weights=made, keep=keep,
    )  # fmt: skip


def test_norms_are_those_of_each_part_of_the_model():
    groups = parameter_groups(weights())
    assert list(groups) == [
        "model.layers.0.self_attn", "model.layers.0.mlp", "model.norm", "lm_head",
    ]  # fmt: skip
    # Four elements each: sqrt(4 * (1 + 4)), and ten times that.
    assert abs(groups["model.layers.0.self_attn"]["weight_norm"] - 20**0.5) < 1e-12
    assert abs(groups["model.layers.0.self_attn"]["grad_norm"] - 10 * 20**0.5) < 1e-12
    assert groups["lm_head"] == {"weight_norm": 10.0, "grad_norm": 100.0}


def test_what_is_not_finite_is_named_and_the_rest_is_numbers(tmp_path):
    made = weights()
    made["lm_head.weight"].grad[2] = torch.inf
    said = dump(tmp_path, 7, made, loss=float("nan"), kl=0.5)
    path = tmp_path / "bad-step-7"
    assert said == (
        f"not finite: loss, gradient of lm_head.weight; its batch is in {path}: fdfast show {path}"
    )
    report = json.loads((path / "step.json").read_text())
    assert report["not_finite"] == {
        "metrics": ["loss"],
        "tensors": ["gradient of lm_head.weight"],
    }
    assert report["metrics"] == {"loss": None, "kl": 0.5}
    assert report["norms"]["lm_head"] == {"weight_norm": 10.0, "grad_norm": None}
    [attempt] = report["attempts"]
    assert (attempt["problem"], attempt["advantage"]) == ("p", 0.5)
    assert attempt["teacher_prompt_ids"] == [1, 2]


def test_a_norm_that_overflows_alone_is_told_so(tmp_path):
    assert "though each of its tensors is" in dump(tmp_path, 1, weights(), loss=1.0)


def test_the_newest_dumps_stay_and_zero_writes_none(tmp_path):
    for step in (8, 9, 10, 11):
        dump(tmp_path, step, weights(), loss=float("inf"))
    assert [p.name for p in bad_steps(tmp_path)] == ["bad-step-10", "bad-step-11"]
    said = dump(tmp_path, 12, weights(), loss=float("inf"), keep=0)
    assert said == "not finite: loss"
    assert len(bad_steps(tmp_path)) == 2


def test_the_dumps_of_a_run_that_was_resumed_before_them_go(tmp_path):
    for step in (3, 8, 9):
        dump(tmp_path, step, weights(), keep=3)
    dump(tmp_path, 5, weights(), keep=1)
    assert [path.name for path in bad_steps(tmp_path)] == ["bad-step-5"]
