"""The trainer benchmark's own logic: its batches, that its contenders take the same step, its
tables.
"""

import csv

import pytest

from benchmarks import harness, readme, render, trainer_report
from benchmarks import trainer_cases as cases
from benchmarks.targets import evaluate
from benchmarks.trainer_worker import measured_step
from tests.tiny import save_tiny_model, tiny_tokenizer

CASES = {case.name: case for case in cases.all_cases(quick=True)}


def step(case, contender, folder):
    return measured_step(CASES[case], contender, folder, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [cases.FD, cases.GRPO])
def test_both_trainers_take_the_right_step(case, tmp_path):
    """The same loss and gradient from the same weights, and again after a step of the optimizer
    and of the teacher.
    """
    pytest.importorskip("trl")
    folder = save_tiny_model(tmp_path / "model")
    first, *others = (step(case, contender, folder) for contender in cases.CONTENDERS)
    assert first["grad_norm_1"] > 1e-3
    assert (first["loss_1"] > 1e-3) == (case == cases.FD), "on-policy GRPO's loss is 0"
    for other in others:
        for name in ("loss_1", "grad_norm_1", "loss_2", "grad_norm_2"):
            assert other[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("turn", range(cases.TURNS))
@pytest.mark.parametrize("case", cases.all_cases(quick=True), ids=lambda case: case.name)
def test_a_batch_has_the_lengths_that_the_case_says(case, turn):
    tokenizer = tiny_tokenizer()
    batch = cases.make_batch(case, tokenizer, turn)
    assert batch == cases.make_batch(case, tokenizer, turn)
    assert len(batch.prompts) == cases.SEQUENCES
    assert len(set(batch.prompts)) == case.num_prompts
    assert {len(ids) for ids in batch.prompt_ids} == {case.prompt_length}
    assert {len(ids) for ids in batch.completion_ids} == {case.completion_length}
    groups = [batch.rewards[n : n + 4] for n in (0, 4)]
    assert all(len(set(group)) == 2 for group in groups), "an advantage in every group"


def info(contender, case=cases.FD, **fields):
    phases = dict.fromkeys(cases.PHASES, 1.0)
    about = {"case": case, "shape": "s", "contender": contender, "note": "", "threads": 1}
    measured = {"wall_s": 6.0, "cpu_s": 6.0, "peak_mib": 100.4, "rss_mib": 200.4}
    return {"extra_info": about | measured | phases | {"loss_1": 1.0, "grad_norm_1": 2.0} | fields}


def test_targets_hold_like_against_like():
    ours, theirs = cases.CONTENDERS[:2]
    seen = [info(ours), info(ours, wall_s=4.0, peak_mib=50), info(ours, wall_s=5.0)]
    rows = trainer_report.summarize([*seen, info(theirs, wall_s=12.0, cpu_s=24.0)], "cpu")
    assert (rows[0]["turns"], rows[0]["wall_s"], rows[0]["peak_mib"]) == (3, 5.0, 100)
    found = {str(v): v.outcome for v in evaluate(rows, cases.TARGETS) if v.measured is not None}
    assert found == {
        f"time / {theirs} 0.417, at most 0.5: met": "met",
        f"memory / {theirs} 1, at most 0.6: MISSED": "MISSED",
        f"whole memory / {theirs} 1, at most 0.6: MISSED": "MISSED",
    }
    there = {(c, who) for c in CASES for who in cases.CONTENDERS}
    assert all((t.case, t.contender) in there and (t.case, t.rival) in there for t in cases.TARGETS)


def test_the_readme_shows_where_the_time_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "git_commit", lambda: "abc")
    rows = trainer_report.summarize([info(c) for c in cases.CONTENDERS], "cpu")
    render.add_targets(rows, evaluate(rows, cases.TARGETS))
    harness.save(rows, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        text = readme.bench(list(csv.DictReader(file)))
    assert "| head and loss s | backward s |" in text
    assert "| ours, highest | 1 | 6.0 | 6.0 | 1.0 |" in text


def test_a_step_of_another_gradient_is_seen():
    one = {"loss_1": 0.0, "grad_norm_1": 4.0}
    assert cases.disagreement(one, one | {"loss_1": 0.01}) == pytest.approx(1.0)
    assert cases.disagreement(one | {"grad_norm_1": 4.4}, one) == pytest.approx(0.1)
