"""Rollouts and Lean on Ray actors: a real cluster of two nodes on loopback, killed in parts."""

import contextlib
import copy
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from fdfast.data.jsonl import Theorem
from fdfast.data.problems import Problem
from fdfast.errors import MachineError
from fdfast.lean import LeanPool, find_lean
from fdfast.models import load_model
from fdfast.rollout import HFEngine, SamplingOptions, generate
from fdfast.rollout.ray_actor import ActorSettings, model_files
from fdfast.rollout.ray_cluster import join_cluster
from fdfast.rollout.ray_fleet import RayFleet
from fdfast.rollout.ray_units import unit_sizes
from fdfast.trainer import train
from fdfast.trainer.config_file import make_config
from fdfast.trainer.metrics import read_jsonl
from tests.tiny import save_tiny_model

ROOT = str(Path(__file__).parents[1])
STORE_BYTES = 80 << 20
PROOF = "And.intro h.right h.left"


def theorem(name: str, statement: str) -> Problem:
    return Problem(name, statement, Theorem(name, "", statement, "", "", ""))


SWAP = theorem("swap", "theorem swap (p q : Prop) (h : And p q) : And q p :=")
PROBLEMS = [
    SWAP,
    theorem("wrong", "theorem wrong (p q : Prop) (h : And p q) : And p p :="),
    Problem("sky", "Why is the sky blue?"),
    theorem("left", "theorem left (p q : Prop) (h : And q p) : And p q :="),
]
EVERY = [problem for problem in PROBLEMS for _ in range(3)]
OPTIONS = SamplingOptions(max_completion_length=40)


@pytest.fixture(scope="module")
def lean():
    with LeanPool(workers=1, toolchain=find_lean(backend="embedded")) as pool:
        yield pool


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that mostly writes PROOF, so that Lean has something to say yes to."""
    model, tokenizer = load_model(save_tiny_model(tmp_path_factory.mktemp("tiny")))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    end = [tokenizer.eos_token_id]
    for _ in range(60):
        for problem in (SWAP, PROBLEMS[3]):
            prompt = tokenizer(problem.prompt).input_ids
            answer = tokenizer(PROOF, add_special_tokens=False).input_ids + end
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval(), tokenizer


@contextlib.contextmanager
def two_nodes(monkeypatch, *, second=None):
    """A cluster on loopback; the head and a second node of one CPU each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    import ray
    from ray.cluster_utils import Cluster

    # Their address is this machine's own, which goes over the loopback interface.
    common = {"object_store_memory": STORE_BYTES}
    head = common | {"num_cpus": 1, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(**(common | {"num_cpus": 1} | (second or {})))
        yield cluster, other
    finally:
        session = Path(cluster.head_node.get_session_dir_path()).name
        ray.shutdown()
        cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)
        assert not left_over(session)


def left_over(session: str) -> list[str]:
    """Processes of that cluster, after a moment to end in."""
    until = time.monotonic() + 10
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if session in line or line.startswith("ray::"):
                    found.append(line[:200])
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


@contextlib.contextmanager
def fleet_of(trained, lean, cluster, lines, **values):
    model, tokenizer = trained
    settings = ActorSettings(
        model_files(model, tokenizer), batch_size=4, lean_version=lean.toolchain.version,
        lean_workers=1,
    )  # fmt: skip
    defaults = {"address": cluster.address, "num_actors": 2, "gpus_per_actor": 0}
    fleet = RayFleet(settings, say=lines.append, **(defaults | values))
    with contextlib.closing(fleet):
        yield fleet


def pid_of(member) -> int:
    return int(member.where.rpartition(" ")[2])


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pid_of_raylet(node) -> int:
    [info] = node.all_processes["raylet"]
    return info.process.pid


def lose(cluster, node, pid: int) -> None:
    """A machine is gone, with the actor on it: Ray alone would let it end what it has in hand."""
    os.kill(pid, signal.SIGSTOP)
    cluster.remove_node(node, allow_graceful=False)
    os.kill(pid, signal.SIGKILL)


def ids_of(tokenizer):
    return lambda problem: tokenizer(problem.prompt).input_ids


def untimed(stage):
    return contextlib.nullcontext()


def here(trained, lean, problems=EVERY, options=OPTIONS, seed=7):
    model, tokenizer = trained
    engine = HFEngine(model, tokenizer, batch_size=4)
    return generate(problems, engine, options, prompt=ids_of(tokenizer), lean=lean, seed=seed)


def there(fleet, trained, problems=EVERY, options=OPTIONS, seed=7):
    return fleet.attempt(problems, options, prompt=ids_of(trained[1]), seed=seed, timed=untimed)


def assert_same(ours, theirs):
    assert [t.ids for t in ours] == [t.ids for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert (a.verdict, a.proof, a.end) == (b.verdict, b.proof, b.end)
        assert a.prompt_ids == b.prompt_ids


def test_attempts_are_those_of_one_process_and_new_weights_reach_every_actor(
    trained, lean, monkeypatch
):
    lines = []
    with two_nodes(monkeypatch) as (cluster, _), contextlib.ExitStack() as stack:
        before = signal.getsignal(signal.SIGTERM)
        fleet = stack.enter_context(fleet_of(trained, lean, cluster, lines))
        assert signal.getsignal(signal.SIGTERM) is before, "Ray's would save no checkpoint"
        assert len(fleet.members) == 2
        fleet.update_weights(trained[0])
        ours, theirs = here(trained, lean), there(fleet, trained)
        assert_same(ours, theirs)
        kinds = {None if t.verdict is None else t.verdict.kind for t in ours}
        assert {"proved", None} < kinds, kinds
        trained = (copy.deepcopy(trained[0]), trained[1])
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trained[0].parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        fleet.update_weights(trained[0])
        assert {member.version for member in fleet.members} == {2}
        changed = here(trained, lean)
        assert_same(changed, there(fleet, trained))
        assert [t.ids for t in changed] != [t.ids for t in ours]
    assert not lines


@pytest.mark.slow
def test_what_a_killed_actor_or_node_had_in_hand_is_done_again_and_nothing_twice(
    trained, lean, monkeypatch
):
    lines: list[str] = []
    problems = [problem for problem in PROBLEMS for _ in range(12)]
    with (
        two_nodes(monkeypatch) as (cluster, other),
        fleet_of(trained, lean, cluster, lines) as fleet,
    ):
        fleet.update_weights(trained[0])
        right = here(trained, lean, problems)

        def kill_an_actor():
            while not fleet.members[1].units:
                time.sleep(0.005)
            os.kill(pid_of(fleet.members[1]), signal.SIGKILL)

        killer = threading.Thread(target=kill_an_actor)
        killer.start()
        assert_same(right, there(fleet, trained, problems))
        killer.join()
        assert fleet.redone > 0
        [line] = lines
        assert "attempts are made again by others" in line
        fleet.update_weights(trained[0])
        until = time.monotonic() + 60
        while len(fleet._ready()) < 2 and time.monotonic() < until:
            fleet._next(time.monotonic() + 1)
        assert len(fleet._ready()) == 2, "another was made in its place"

        redone = fleet.redone

        lost = next(m for m in fleet.members if parent(pid_of(m)) == pid_of_raylet(other))
        pid = pid_of(lost)

        def kill_the_node():
            while not lost.units:
                time.sleep(0.005)
            lose(cluster, other, pid)

        killer = threading.Thread(target=kill_the_node)
        killer.start()
        assert_same(right, there(fleet, trained, problems))
        killer.join()
        assert fleet.redone > redone
        assert len(lines) == 2, lines


@pytest.mark.slow
def test_when_no_actor_is_left_the_machine_is_at_fault(trained, lean, monkeypatch):
    lines: list[str] = []
    with (
        two_nodes(monkeypatch, second={"num_cpus": 2}) as (cluster, other),
        fleet_of(
            trained, lean, cluster, lines, num_actors=1, cpus_per_actor=2, start_timeout_s=20
        ) as fleet,
    ):
        fleet.update_weights(trained[0])
        fleet.start_timeout_s = 3
        lose(cluster, other, pid_of(fleet.members[0]))
        with pytest.raises(MachineError, match=r"no actor is left.*let machines join"):
            there(fleet, trained)
    assert len(lines) == 1, lines


def test_an_actor_without_lean_is_given_up_and_no_attempt_is_marked_wrong(
    trained, lean, monkeypatch
):
    lines: list[str] = []
    second = {"env_vars": {"XDG_CACHE_HOME": "/proc/nowhere"}}
    with two_nodes(monkeypatch, second=second) as (cluster, _):
        with fleet_of(trained, lean, cluster, lines) as fleet:
            fleet.update_weights(trained[0])
            assert_same(here(trained, lean), there(fleet, trained))
        assert any("is given up" in line and "/proc/nowhere" in line for line in lines), lines


def test_a_run_on_a_cluster_is_the_run_on_one_machine(tmp_path, monkeypatch):
    values = {
        "model_name_or_path": str(save_tiny_model(tmp_path / "tiny")),
        "task": "lean",
        "feedback.source": "verifier",
        "prompts_per_step": 3,
        "num_generations": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "max_steps": 2,
        "save_steps": 0,
        "save_final_model": False,
        "lean_workers": 1,
        "max_prompt_length": 400,
    }
    alone = train(make_config(values | {"output_dir": str(tmp_path / "alone")}), quiet=True)
    with two_nodes(monkeypatch) as (cluster, _):
        many = {"ray_address": cluster.address, "ray_num_actors": 2, "ray_gpus_per_actor": 0}
        config = make_config(values | many | {"output_dir": str(tmp_path / "many")})
        rows = train(config, quiet=True)
    files = [tmp_path / name / "attempts.jsonl" for name in ("alone", "many")]
    right_ids, ids = ([row["ids"] for row in read_jsonl(file)] for file in files)
    assert ids == right_ids
    assert len(rows) == len(alone) == 2
    for row, right in zip(rows, alone, strict=True):
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert row[name] == pytest.approx(right[name], rel=1e-3), name


def test_no_ray_and_no_cluster_are_one_line(monkeypatch):
    with pytest.raises(MachineError, match=r"can't join a cluster at '127.0.0.1:1'.*ray start"):
        join_cluster("127.0.0.1:1")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MachineError, match=r"pip install 'fdfast\[ray\]'"):
        join_cluster("auto")


def test_units_keep_a_problem_together_fill_a_batch_and_leave_nobody_idle():
    problems = [problem for problem in PROBLEMS for _ in range(4)]
    assert unit_sizes(problems, num_actors=1, batch_size=8) == [8, 8]
    assert unit_sizes(problems, num_actors=4, batch_size=8) == [4, 4, 4, 4]
    assert unit_sizes(problems, num_actors=16, batch_size=2) == [4, 4, 4, 4]
    assert unit_sizes(problems, num_actors=1, batch_size=100) == [16]
    assert unit_sizes([], num_actors=1, batch_size=4) == []
