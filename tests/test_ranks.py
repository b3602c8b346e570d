"""Training under torchrun on gloo ranks: the numbers of one process, on any number of ranks."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fdfast.errors import InputError
from fdfast.models import load_model
from fdfast.trainer import TrainConfig
from fdfast.trainer.checkpoint import checkpoints
from fdfast.trainer.metrics import read_jsonl
from fdfast.trainer.ranks import Ranks, ranks_of_torchrun
from fdfast.trainer.rollouts import check_for_ranks
from tests.test_trainer import _plain, settings
from tests.tiny import save_tiny_model

# Real Lean judges these: some are proofs of `list_*`, some are none.
TURNS = ["rfl", "fun x => x", "Nat.le_refl _", "rfl", "trivial", "sorry", "rfl"]
# 3 attempts of 24 tokens at a problem do not fit in a pass of 120: they are streamed.
LEAN = {
    "task": "lean",
    "dataset": "base_theorems",
    "problem_names": ["list_*"],
    "feedback.source": "verifier",
    "feedback.text": "",
    "num_generations": 3,
    "max_completion_length": 24,
}
KINDS: dict[str, dict[str, Any]] = {
    "distillation": {},
    "policy": LEAN | {"distillation_weight": 0.0, "beta": 0.1, "scale_rewards": "batch"},
    "mix": LEAN | {"distillation_weight": 0.5, "max_pass_tokens": 2000, "loss_type": "grpo"},
}


def launch(
    config: TrainConfig, num_ranks: int, *, resume: bool = False, **how: Any
) -> subprocess.CompletedProcess[str]:
    """A run of the tiny model in processes of its own; 0 ranks: without torchrun."""
    folder = Path(config.output_dir)
    given = folder.with_name(f"{folder.name}.json")
    given.write_text(json.dumps({"config": _plain(config)} | how), encoding="utf-8")
    command = [sys.executable]
    if num_ranks:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command += ["-m", "tests.rank_worker", str(given), *["resume"] * resume]
    repository = Path(__file__).parents[1]
    beside = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | beside,
        cwd=repository,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Rows and final weights of a kind of run on so many ranks; each is run once."""
    base = tmp_path_factory.mktemp("ranks")
    tiny = save_tiny_model(base / "tiny", kind="qwen3")

    @functools.cache
    def run(kind: str, num_ranks: int):
        folder = base / f"{kind}-{num_ranks}"
        values = {"prompts_per_step": 5, "max_steps": 20, "save_final_model": True}
        config = settings(tiny, folder, **values | KINDS[kind])
        done = launch(config, num_ranks, turns=TURNS if kind != "distillation" else [])
        assert done.returncode == 0, done.stderr
        model, _ = load_model(folder / "model")
        return read_jsonl(folder / "metrics.jsonl"), dict(model.state_dict())

    return run


def assert_same_run(
    rows: list[dict[str, Any]],
    weights: dict[str, torch.Tensor],
    plain_rows: list[dict[str, Any]],
    plain: dict[str, torch.Tensor],
) -> None:
    """The metrics and the final weights of another run within rounding."""
    assert len({row["loss"] for row in plain_rows if "loss" in row}) > 1
    for row, expected in zip(rows, plain_rows, strict=True):
        assert row.keys() == expected.keys()
        for name, value in timeless(expected).items():
            assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-6), (row["step"], name)
    # AdamW divides a gradient by its own size: where that is rounding, so is the weight's way.
    for name, expected in plain.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=2e-4)


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("time/")}


def test_one_rank_gives_what_no_torchrun_gives_to_the_last_bit(runs):
    (rows, weights), (plain_rows, plain) = runs("distillation", 1), runs("distillation", 0)
    assert [timeless(row) for row in rows] == [timeless(row) for row in plain_rows]
    assert all(weights[name].equal(plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("kind", "num_ranks"),
    [
        ("distillation", 2),
        pytest.param("distillation", 4, marks=pytest.mark.slow),
        pytest.param("policy", 2, marks=pytest.mark.slow),
        pytest.param("policy", 4, marks=pytest.mark.slow),
        pytest.param("mix", 2, marks=pytest.mark.slow),
        pytest.param("mix", 4, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_gives_the_numbers_of_one_process(runs, kind, num_ranks):
    ours, plain = runs(kind, num_ranks), runs(kind, 0)
    assert kind == "distillation" or any(0 < row["reward"] < 1 for row in plain[0])
    assert_same_run(*ours, *plain)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_four_and_with_one(runs, tmp_path):
    tiny = save_tiny_model(tmp_path / "tiny", kind="qwen3")
    folder = tmp_path / "run"
    values = {"prompts_per_step": 5, "save_steps": 2, "save_total_limit": 0}
    for num_ranks, steps in ((2, 2), (4, 4), (0, 6), (2, 8)):
        config = settings(tiny, folder, **values, max_steps=steps)
        done = launch(config, num_ranks, resume=steps > 2)
        assert done.returncode == 0, done.stderr
    plain_rows, _ = runs("distillation", 0)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    for row, expected in zip(rows, plain_rows, strict=False):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-4)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-4)
    shards = [(path / "shards").is_dir() for path in checkpoints(folder)]
    assert shards == [True, True, False, True]


@pytest.mark.parametrize(
    ("how", "saved"),
    [
        ("error", True),
        pytest.param("int", True, marks=pytest.mark.slow),
        pytest.param("kill", False, marks=pytest.mark.slow),
        pytest.param("pass", False, marks=pytest.mark.slow),
    ],
)
def test_what_ends_one_rank_ends_all_with_one_message(tmp_path, how, saved):
    tiny = save_tiny_model(tmp_path / "tiny")
    config = settings(tiny, tmp_path / "run", max_steps=400)
    done = launch(config, 2, hurt=how)
    assert done.returncode != 0
    said = re.findall(r"^fdfast: .*", done.stderr, re.MULTILINE)
    torn = "the tape is torn"
    expected = {"error": torn, "pass": torn, "int": "interrupted", "kill": "another rank has gone"}
    assert len(said) == 1 or (how == "kill" and not said), done.stderr
    assert all(expected[how] in line for line in said)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"] * saved


def test_a_wrong_setting_is_said_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["-m", "fdfast", "train", "no_such_setting=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode != 0
    assert len(re.findall(r"^fdfast: .*no_such_setting", done.stderr, re.MULTILINE)) == 1


def test_what_several_ranks_do_not_do_is_one_line(tmp_path):
    two = Ranks()
    two.size = 2
    server = settings(
        tmp_path, tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://x"
    )
    with pytest.raises(InputError, match=r"vllm\.mode 'server' with 2 ranks"):
        check_for_ranks(server, two)
    with pytest.raises(InputError, match="timeout_s must be positive"), ranks_of_torchrun(0):
        pass
