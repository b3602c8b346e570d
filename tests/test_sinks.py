"""Curves in TensorBoard and Weights & Biases: every point once, also after a resume."""

import importlib.util
import json
import struct
import sys

import pytest

from fdfast.errors import InputError, MachineError
from fdfast.trainer.sinks import TensorBoardSink, make_sinks, numbers

ROW = {"step": 3, "loss": 0.5, "kl": None, "alarms": [], "grad_norm": float("nan"), "skipped": 0.0}


def read_events(folder):
    """(step, value) of every scalar, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    shown = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {
        tag: [(e.step, pytest.approx(e.value)) for e in seen] for tag, seen in shown.items() if seen
    }


def read_wandb(folder):
    """The points of every offline run, oldest first: a dict of its numbers each."""
    from wandb.proto import wandb_internal_pb2

    points, ids = [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""  # a header, then LevelDB's log of blocks
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind not in (1, 4):  # the record goes on
                continue
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                points.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items})
    return points, ids


def test_a_rows_finite_numbers_are_points_by_either_librarys_names():
    assert numbers(ROW) == {"loss": 0.5, "skipped": 0.0}
    row = {
        "loss": 1.0, "policy_loss": 1.0, "kl": 2.0, "entropy": 3.0, "grad_norm": 4.0,
        "learning_rate": 5.0, "reward": 6.0, "completions/mean_length": 7.0, "time/step": 8.0,
        "eval_reward": 9.0, "teacher_mass": 1.0,
    }  # fmt: skip
    assert set(numbers(row, names="verl")) == {
        "actor/loss", "actor/pg_loss", "actor/kl_loss", "actor/entropy", "actor/grad_norm",
        "actor/lr", "critic/rewards/mean", "response_length/mean", "timing_s/step",
        "eval_critic/rewards/mean", "teacher_mass",
    }  # fmt: skip


def test_tensorboard_has_every_point_once_after_a_resume(tmp_path):
    first = TensorBoardSink(tmp_path, step=0)
    first.write(0, {"eval_loss": 9.0})
    for step in (1, 2, 3):
        first.write(step, {"loss": 1.0 * step})
    first.close()
    again = TensorBoardSink(tmp_path, step=2)
    for step in (3, 4):
        again.write(step, {"loss": 10.0 * step})
    again.close()
    seen = read_events(tmp_path)
    assert seen["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert seen["eval_loss"] == [(0, 9.0)]
    anew = TensorBoardSink(tmp_path, step=0)
    anew.write(0, {"eval_loss": 8.0})
    anew.close()
    assert read_events(tmp_path) == {"eval_loss": [(0, 8.0)]}, "the run began again"


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="wandb is not installed: pip install 'fdfast[wandb]' (100 MB)",
)
def test_an_offline_run_of_wandb_has_every_point_once_after_a_resume(tmp_path):
    def sink(step):
        return make_sinks(
            ["wandb"], tmp_path, step=step, logging_dir=str(tmp_path), settings={"seed": 0}
        )[0]

    first = sink(0)
    first.write(0, {"eval_loss": 9.0})
    for step in (1, 2, 3):
        first.write(step, {"loss": 1.0 * step, "kl": None})
    first.write(3, {"eval_loss": 8.0})
    first.close()
    again = sink(2)  # as W&B has it: what it was sent stays
    for step in (3, 4):
        again.write(step, {"loss": 1.0 * step})
    again.close()
    points, ids = read_wandb(tmp_path)
    assert [(p["_step"], p.get("loss"), p.get("eval_loss")) for p in points] == [
        (0, None, 9.0), (1, 1.0, None), (2, 2.0, None), (3, 3.0, 8.0), (4, 4.0, None),
    ]  # fmt: skip
    assert len(ids) == 1
    anew = sink(0)
    anew.write(1, {"loss": 5.0})
    anew.close()
    assert len(read_wandb(tmp_path)[1]) == 2, "a run that began again is another"


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_one_line(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError, match=rf"pip install 'fdfast\[{name}\]', or leave it out"):
        make_sinks([name], tmp_path, step=0)


def test_a_report_that_is_none_is_one_line(tmp_path):
    with pytest.raises(InputError, match="report_to must name some of tensorboard, wandb; got 'w'"):
        make_sinks(["w"], tmp_path, step=0)
