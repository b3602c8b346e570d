"""kill -9 at random moments of a run, Feedback Distillation and then GRPO: resumed, it is the run
that nothing disturbed, bit for bit.
"""

import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from fdfast.trainer import TrainConfig
from fdfast.trainer.checkpoint import checkpoints
from fdfast.trainer.metrics import read_jsonl
from fdfast.trainer.stages import Stage
from tests import killed_run
from tests.test_trainer_stages import run_settings
from tests.tiny import save_tiny_model

# Children are forked from a process that has imported all: a kill costs no start of torch.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.killed_run"])


def config_of(tiny: Path, folder: Path) -> TrainConfig:
    stages = (
        Stage(max_steps=3, learning_rate=1e-3),
        Stage(
            max_steps=3, distillation_weight=0.0, learning_rate=1e-4, num_generations=3, beta=0.1
        ),
    )
    return run_settings(
        tiny, folder, stages=stages, save_steps=1, eval_num_prompts=2, eval_steps=2, eval_split=""
    )


def start(config, *, die_at=None, sync_s=0.0, kill_after_s=None, count=None):
    """Run until it ends or dies; its exit code."""
    folder = Path(config.output_dir)
    resume = bool(checkpoints(folder) or read_jsonl(folder / "metrics.jsonl"))
    child = CONTEXT.Process(target=killed_run.run, args=(config, resume, die_at, sync_s, count))
    child.start()
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        child.kill()
    child.join()
    return child.exitcode


def left_by(folder: Path):
    """All that a run leaves, but its times."""
    last = checkpoints(folder)[-1]
    state = torch.load(last / "state.pt", weights_only=True)
    lines = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_jsonl(path)]
        for path in (folder / "metrics.jsonl", folder / "attempts.jsonl")
    ]
    models = [
        (path / "model.safetensors").read_bytes() for path in (folder / "model", last / "model")
    ]
    return {"step": state["step"], "state": state, "lines": lines, "models": models}


def assert_same(one, other, path=""):
    """Bit for bit, tensors in any nesting."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}/{number}")
    elif torch.is_tensor(one):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def kill_again_and_again(tmp_path, num_kills, seed):
    """Half of the kills at a random point of those that the run passes, half at a random time."""
    tiny, draw = save_tiny_model(tmp_path / "tiny"), random.Random(seed)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    assert start(config_of(tiny, whole), count=tmp_path / "count") == 0
    whole_s, points = time.monotonic() - begun, int((tmp_path / "count").read_text())
    wanted, kills, runs = left_by(whole), [], 0
    while len(kills) < num_kills:
        config = config_of(tiny, folder)
        if len(kills) % 2 == 0:
            moment = {"die_at": draw.randrange(points)}
        else:
            slow = draw.choice((0.0, 0.02))
            moment = {"kill_after_s": draw.uniform(0, whole_s), "sync_s": slow}
        code = start(config, **moment)
        assert code in (0, -signal.SIGKILL), (moment, code)
        if code:
            found = checkpoints(folder)[-1:] if folder.exists() else []
            kills.append((moment, found[0].name if found else "none"))
            continue
        runs += 1
        assert_same(left_by(folder), wanted)
        shutil.rmtree(folder)
    assert start(config_of(tiny, folder)) == 0
    assert_same(left_by(folder), wanted)
    hidden = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock"}, "what killed saves left is cleared"
    print(f"seed {seed}: {points} points in {whole_s:.1f} s; {runs + 1} runs, killed at:")
    for moment, found in kills:
        print(f"  {moment}, newest checkpoint {found}")


def test_a_run_killed_three_times_is_the_run_that_nothing_disturbed(tmp_path):
    kill_again_and_again(tmp_path, 3, seed=20261125)


@pytest.mark.slow
def test_a_run_killed_thirty_times_is_the_run_that_nothing_disturbed(tmp_path):
    kill_again_and_again(tmp_path, 30, seed=random.SystemRandom().randrange(2**32))
