"""A training run that samples with vLLM in its own process; run by `make test-vllm`."""

import pytest

from fdfast.cli import main
from fdfast.data.problems import questions_path
from fdfast.rollout.records import read_records
from fdfast.trainer import make_config, train
from fdfast.trainer.scoring import Scorer, token_logprobs
from tests.vllm_process import ENVIRONMENT

pytestmark = pytest.mark.vllm

SETTINGS = {
    "model_name_or_path": "demo",
    "task": "chat",
    "dataset": str(questions_path()),
    "dataset_split": "",
    "feedback.source": "constant",
    "feedback.text": "Be concise: answer in one short sentence.",
    "prompts_per_step": 4,
    "max_prompt_length": 400,
    "max_completion_length": 12,
    "use_vllm": True,
    "vllm.max_model_length": 512,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_every_step_is_sampled_from_the_weights_of_the_step_before(tmp_path, monkeypatch):
    """vLLM's log-probs are those of the student as it is then, and no longer of the one before."""
    seen, score = [], Scorer.score

    def scoring(self, attempts, *, backward):
        views = token_logprobs(self.model, self.model, attempts, self.config)
        ours = [value for view, _ in views for value in view]
        theirs = [value for attempt in attempts for value in attempt.completion.logprobs]
        seen.append(max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
        return score(self, attempts, backward=backward)

    monkeypatch.setattr(Scorer, "score", scoring)
    # A rate at which a stale copy of the weights would be far off.
    config = make_config(
        SETTINGS
        | {
            "output_dir": str(tmp_path / "run"),
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "max_steps": 3,
            "save_steps": 0,
            "save_final_model": False,
        }
    )
    rows = train(config, quiet=True)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(seen) < 1e-3
    assert all(row["time/weight_sync"] > 0 for row in rows)
    changed = abs(rows[-1]["kl"] - rows[0]["kl"])
    assert changed > 1e-3, "the weights hardly moved: a stale copy would not show"


def test_the_command_samples_with_vllm(tmp_path, capsys):
    words = [f"{key}={value}" for key, value in SETTINGS.items() if key != "use_vllm"]
    command = ["rollout", "--backend", "vllm", "--limit", "3", "--output", str(tmp_path)]
    assert main([*command, *words]) == 0
    assert "3/3 problems" in capsys.readouterr().out
    for record in read_records(tmp_path / "trajectories.parquet"):
        assert record.student_logprobs == pytest.approx(record.trajectory.logprobs, abs=1e-3)
        assert record.teacher_logprobs != record.student_logprobs
