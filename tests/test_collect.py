"""`fdfast rollout`: attempts in files, with both views of every token."""

import pytest
import torch

from fdfast.cli import main
from fdfast.data.problems import questions_path
from fdfast.errors import InputError
from fdfast.models import load_model
from fdfast.rollout.records import read_records
from fdfast.trainer import make_config
from fdfast.trainer.batch import Prompts
from fdfast.trainer.collect import collect
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


CHAT = {
    "task": "chat",
    "dataset": str(questions_path()),
    "dataset_split": "",
    "feedback.source": "constant",
    "feedback.text": "Be concise.",
    "max_completion_length": 8,
    "prompts_per_step": 3,
    "max_pass_tokens": 150,
    "num_generations": 2,
}


def logprobs_of(model, prompt, ids):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def test_attempts_are_kept_with_what_student_and_teacher_think_of_them(tiny, tmp_path):
    config = make_config({"model_name_or_path": str(tiny), **CHAT})
    collect(config, tmp_path, limit=5, quiet=True)
    records = list(read_records(tmp_path / "trajectories.jsonl"))
    assert records == list(read_records(tmp_path / "trajectories.parquet"))
    assert len(records) == 10
    assert len({r.problem for r in records}) == 5
    assert records[0].trajectory.ids != records[1].trajectory.ids
    model, tokenizer = load_model(tiny)
    prompts = Prompts(tokenizer, config)
    for record in records:
        seen = record.trajectory
        problem = next(p for p in _problems() if p.name == record.problem)
        teachers, _ = prompts.teacher(problem, "Be concise.")
        assert record.student_logprobs == pytest.approx(
            logprobs_of(model, seen.prompt_ids, seen.ids), abs=1e-4
        )
        assert record.student_logprobs == pytest.approx(seen.logprobs, abs=1e-4)
        assert record.teacher_logprobs == pytest.approx(
            logprobs_of(model, teachers, seen.ids), abs=1e-4
        )
        assert record.feedback == "Be concise."
        assert "".join(record.tokens) == tokenizer.decode(seen.ids)


def _problems():
    from fdfast.data.problems import read_problems

    return read_problems(questions_path(), task="chat")


def test_without_feedback_there_is_no_teacher(tiny, tmp_path):
    config = make_config({"model_name_or_path": str(tiny), **CHAT})
    collect(config, tmp_path, limit=1, feedback=False, quiet=True)
    for record in read_records(tmp_path / "trajectories.jsonl"):
        assert record.feedback is None
        assert record.student_logprobs is None
        assert record.trajectory.ids


def test_what_is_there_is_never_written_over(tiny, tmp_path):
    config = make_config({"model_name_or_path": str(tiny), **CHAT})
    (tmp_path / "trajectories.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match="holds attempts already"):
        collect(config, tmp_path, limit=1, quiet=True)
    assert (tmp_path / "trajectories.jsonl").read_text() == "mine\n"


def test_an_interrupt_keeps_the_attempts_that_are_there(tiny, tmp_path, monkeypatch):
    config = make_config({"model_name_or_path": str(tiny), **CHAT})
    steps = []

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return [([0.0] * len(a.completion.ids),) * 2 for a in arguments[2]]

    monkeypatch.setattr("fdfast.trainer.collect.token_logprobs", stopping)
    with pytest.raises(KeyboardInterrupt):
        collect(config, tmp_path, quiet=True)
    assert len(list(read_records(tmp_path / "trajectories.jsonl"))) == 6


def test_the_command_takes_the_trainers_settings(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [f"{key}={value}" for key, value in CHAT.items()]
    command = ["rollout", "--model", str(tiny), "--backend", "hf", "--limit", "2"]
    assert main([*command, *words]) == 0
    assert "2/2 problems" in capsys.readouterr().out
    assert len(list(read_records(tmp_path / "runs/rollout/trajectories.parquet"))) == 4
    assert main([*command, *words]) == 2
    assert "holds attempts already" in capsys.readouterr().err
    assert main(["rollout", "--limit", "0"]) == 2
    assert "--limit must be at least 1; got 0" in capsys.readouterr().err
    assert main(["rollout", "--model", str(tiny), "max_step=3"]) == 2
    assert "did you mean 'max_steps'" in capsys.readouterr().err


def test_feedback_that_fails_for_all_loses_no_attempt(tiny, tmp_path, monkeypatch):
    class Dead:
        counters, last_failure = None, "nobody answers"

        def feedback_many(self, items):
            return [None] * len(items)

    monkeypatch.setattr("fdfast.trainer.collect.make_provider", lambda *arguments, **others: Dead())
    config = make_config({"model_name_or_path": str(tiny), **CHAT})
    collect(config, tmp_path, limit=2, quiet=True)
    records = list(read_records(tmp_path / "trajectories.jsonl"))
    assert len(records) == 4
    assert {r.feedback for r in records} == {None}
