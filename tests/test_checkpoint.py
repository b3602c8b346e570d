"""Checkpoints: damage is found and said, the last good one is used and never removed."""

import json
import random
import shutil

import numpy as np
import pytest
import torch

from fdfast.errors import InputError
from fdfast.feedback.ledger import FeedbackCounters
from fdfast.lora import load_adapters
from fdfast.models import load_model, save_model
from fdfast.trainer import train
from fdfast.trainer.checkpoint import checkpoints
from fdfast.trainer.metrics import MetricsLog, read_jsonl
from fdfast.trainer.run_folder import find_start, run_lock, take_up_spent, write_spent
from fdfast.trainer.student import keep_reference, load_reference, load_student
from tests.test_trainer import settings, weights
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """The final weights of a run of four steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    train(settings(tiny, folder, save_final_model=True), quiet=True)
    return weights(folder / "model")


def hurt(path, how):
    whole = path.read_bytes()
    middle = len(whole) // 2
    if how == "flipped":
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif how == "truncated":
        path.write_bytes(whole[:middle])
    else:
        path.unlink()


# One at a time; a flipped bit in the manifest's white space would change nothing.
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model/model.safetensors", "flipped"),
        ("state.pt", "flipped"),
        ("state.pt", "truncated"),
        ("model/config.json", "gone"),
        ("manifest.json", "truncated"),
        ("manifest.json", "gone"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_gives_the_same_run(
    tiny, tmp_path, capsys, straight, how, name
):
    train(settings(tiny, tmp_path, max_steps=3, save_steps=1), quiet=True)
    hurt(tmp_path / "checkpoint-3" / name, how)
    rows = train(settings(tiny, tmp_path, save_final_model=True), resume=True)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "is damaged (" in line]
    assert "checkpoint-3 is damaged (" in said
    assert name in said
    assert "going on from checkpoint-2" in said
    assert (tmp_path / "checkpoint-3.damaged").is_dir(), "kept aside"
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    again = weights(tmp_path / "model")
    for key, value in straight.items():
        assert torch.equal(value, again[key]), key


def test_where_none_is_whole_it_is_one_line_with_the_way_out(tiny, tmp_path):
    train(settings(tiny, tmp_path, max_steps=2, save_steps=1), quiet=True)
    for number in (1, 2):
        hurt(tmp_path / f"checkpoint-{number}" / "state.pt", "truncated")
    with pytest.raises(InputError, match=r"none of its checkpoints is whole \(.*state.pt has") as e:
        train(settings(tiny, tmp_path), resume=True, quiet=True)
    assert "\n" not in str(e.value)
    assert "another output_dir" in str(e.value)
    assert len(checkpoints(tmp_path)) == 2, "left as they are"


def test_the_limit_counts_whole_checkpoints_alone(tiny, tmp_path):
    train(settings(tiny, tmp_path, max_steps=2, save_steps=1), quiet=True)
    hurt(tmp_path / "checkpoint-1" / "state.pt", "truncated")
    train(settings(tiny, tmp_path, max_steps=3, save_steps=1), resume=True, quiet=True)
    assert [c.name for c in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    train(settings(tiny, tmp_path, max_steps=4, save_steps=1), resume=True, quiet=True)
    assert [c.name for c in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (1, 3, 4)]


def test_two_runs_never_write_in_one_folder_and_a_dead_ones_lock_is_none(tiny, tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(InputError, match="another run is writing there"),
    ):
        train(settings(tiny, tmp_path), quiet=True)
    assert (tmp_path / ".lock").exists()
    assert len(train(settings(tiny, tmp_path), quiet=True)) == 4


def test_nothing_random_comes_from_the_processs_own_state(tiny, tmp_path, straight):
    """So no state of a generator is saved: here each has another at every start."""
    for step in range(1, 5):
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)
        values = {"max_steps": step, "save_steps": 1, "save_final_model": True}
        train(settings(tiny, tmp_path, **values), resume=step > 1, quiet=True)
    again = weights(tmp_path / "model")
    for key, value in straight.items():
        assert torch.equal(value, again[key]), key


def test_what_was_spent_after_the_last_checkpoint_stays_spent(tmp_path):
    saved = FeedbackCounters(requests=3, prompt_tokens=100, completion_tokens=40, cost_usd=0.5)
    later = FeedbackCounters(requests=5, prompt_tokens=180, completion_tokens=70, cost_usd=0.9)
    counters = FeedbackCounters()
    take_up_spent(tmp_path, counters, saved)
    assert counters == saved
    write_spent(tmp_path, later)
    take_up_spent(tmp_path, counters, saved)
    assert counters == later
    (tmp_path / "feedback_spent.json").write_text("{")
    with pytest.raises(InputError, match="remove it to count what was spent from the checkpoint"):
        take_up_spent(tmp_path, counters, saved)


def test_attempts_of_an_evaluation_that_was_cut_off_are_made_again(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    row = {"format": 1, "problem": "p", "step": 1}
    log.write({"step": 1, "loss": 1.0}, [row])
    log.write_evaluation(1, {"loss": 1.0}, [row])
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(whole[0])  # killed between the two files
    again = MetricsLog(tmp_path, step=1)
    assert again.evaluated == set()
    assert read_jsonl(tmp_path / "attempts.jsonl") == [row]
    again.write_evaluation(1, {"loss": 1.0}, [row])
    MetricsLog(tmp_path, step=1)
    assert read_jsonl(tmp_path / "attempts.jsonl") == [row, row | {"evaluation": True}]


def test_a_damaged_reference_is_one_line(tiny, tmp_path):
    student, tokenizer = load_student(str(tiny), dtype="float32")
    path = tmp_path / "reference-1"
    keep_reference(student, tokenizer, path)
    kept = load_reference(student, path, dtype="float32")
    for a, b in zip(kept.parameters(), student.parameters(), strict=True):
        assert torch.equal(a, b)
    hurt(path / "model" / "model.safetensors", "flipped")
    with pytest.raises(InputError, match="reference of beta is damaged"):
        load_reference(student, path, dtype="float32")


def test_leftovers_of_killed_saves_are_gone_at_the_next_start(tiny, tmp_path):
    train(settings(tiny, tmp_path, max_steps=1, save_steps=1), quiet=True)
    (tmp_path / ".checkpoint-2.77.00112233" / "model").mkdir(parents=True)
    (tmp_path / ".metrics.jsonl.77.00112233").write_text("half")
    (tmp_path / ".mine").write_text("not the trainer's")
    assert find_start(tmp_path, resume=True).checkpoint == tmp_path / "checkpoint-1"
    train(settings(tiny, tmp_path, max_steps=2), resume=True, quiet=True)
    hidden = {p.name for p in tmp_path.iterdir() if p.name.startswith(".")}
    assert hidden == {".lock", ".mine"}
    entries = json.loads((tmp_path / "run.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 1]


LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ("q_proj", "down_proj")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["ema", "frozen", "live", "periodic"])
def test_with_adapters_a_resumed_run_is_the_run_that_never_stopped(tiny, tmp_path, kind, dtype):
    """Dropout's masks, too, follow from the step."""
    values = LORA | {"lora_dropout": 0.1, "teacher_kind": kind, "dtype": dtype}
    whole = settings(tiny, tmp_path / "whole", save_final_model=True, **values)
    rows = train(whole, quiet=True)
    train(settings(tiny, tmp_path / "parts", max_steps=3, save_steps=3, **values), quiet=True)
    parts = settings(tiny, tmp_path / "parts", save_final_model=True, **values)
    resumed = train(parts, resume=True, quiet=True)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert [r["loss"] for r in rows] == [r["loss"] for r in resumed]
    assert rows[-1]["grad_norm"] > 0
    names = {path.name for path in (tmp_path / "parts" / "checkpoint-3").iterdir()}
    assert names == {"adapter", "base.json", "config.json", "manifest.json", "state.pt"}


def test_what_is_exported_is_the_adapters_over_the_base(tiny, tmp_path):
    train(settings(tiny, tmp_path, save_final_model=True, **LORA), quiet=True)
    model, _ = load_model(tmp_path / "model")
    adapted = load_adapters(load_model(tiny)[0], tmp_path / "adapter")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        assert (model(ids).logits - load_model(tiny)[0](ids).logits).abs().max() > 1e-2


def test_adapters_over_another_base_are_refused(tiny, tmp_path):
    train(settings(tiny, tmp_path / "run", max_steps=1, save_steps=1, **LORA), quiet=True)
    other = save_tiny_model(tmp_path / "other", kind="llama")
    model, tokenizer = load_model(other)
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 1e-3
    save_model(model, tokenizer, other)
    with pytest.raises(InputError, match="belong to other base weights"):
        train(settings(other, tmp_path / "run", **LORA), resume=True, quiet=True)


def test_every_kind_of_teacher_and_a_bfloat16_view_train_and_resume(tiny, tmp_path):
    for kind, dtype in (
        ("live", ""),
        ("periodic", ""),
        ("frozen", "bfloat16"),
        ("ema", "bfloat16"),
    ):
        values = {"teacher_kind": kind, "teacher_scoring_dtype": dtype, "save_steps": 2}
        folder = tmp_path / f"{kind}{dtype}"
        rows = train(settings(tiny, folder, **values), quiet=True)
        shutil.rmtree(folder / "checkpoint-4")
        again = train(settings(tiny, folder, **values), resume=True, quiet=True)
        assert [r["loss"] for r in again] == [r["loss"] for r in rows]
        assert all(r["grad_norm"] > 0 for r in rows)
