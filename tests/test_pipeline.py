"""Batches made ahead of the update: when, from which weights, and how it ends."""

import dataclasses
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
import torch

from fdfast.errors import InputError, MachineError
from fdfast.interrupts import result_of
from fdfast.lean import LeanPool, Verdict
from fdfast.models import load_model
from fdfast.rollout import HFEngine
from fdfast.trainer import loop, train
from fdfast.trainer.checkpoint import checkpoints
from fdfast.trainer.metrics import Clock, read_jsonl, stage_times
from fdfast.trainer.pipeline import Batch, OnDemand, Pipeline
from fdfast.trainer.ranks import Ranks
from fdfast.trainer.rollouts import Rollouts, check_for_ranks
from fdfast.trainer.sharding import WholeCopy
from fdfast.trainer.student import Adapters, load_student
from tests.chat_server import GOOD, Reply, chat_server, completion
from tests.test_trainer import settings
from tests.test_trainer_stages import attempts_of, config_of, run_settings, scored
from tests.tiny import save_tiny_model

EXACT = ("loss", "kl", "entropy", "grad_norm", "num_tokens", "staleness")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fdfast ")]


@pytest.fixture
def judged(monkeypatch):
    """Every third answer is a proof."""

    def check(self, statement, proof, header=None, context=""):
        right = sum(proof.encode()) % 3 == 0
        return Verdict("proved", level=1) if right else Verdict("failed", reason="no")

    monkeypatch.setattr(LeanPool, "check", check)


def pipelined(monkeypatch, max_staleness):
    """Every run's batches come from threads, whatever its settings say."""

    def make(sample, tell):
        return Pipeline(sample, tell, first=0, last=5, max_staleness=max_staleness)

    monkeypatch.setattr(loop, "OnDemand", make)


def test_with_no_staleness_the_pipeline_is_the_loop_without_it(tiny, tmp_path, judged, monkeypatch):
    """Distillation, then GRPO against a reference: metrics and weights bit for bit."""
    plain = train(run_settings(tiny, tmp_path / "plain"), quiet=True)
    pipelined(monkeypatch, 0)
    ahead = train(run_settings(tiny, tmp_path / "ahead"), quiet=True)
    assert [[row[name] for name in EXACT] for row in ahead] == [
        [row[name] for name in EXACT] for row in plain
    ]
    weights = [load_model(tmp_path / name / "model")[0].state_dict() for name in ("plain", "ahead")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all("time/wait" in row for row in ahead), "the batches came from threads"


@pytest.mark.parametrize(
    "values",
    [
        {"teacher.kind": "live", "dtype": "bfloat16"},
        {"teacher.kind": "frozen", "weight_decay": 0.1},
        {"teacher.kind": "periodic", "use_peft": True, "lora.r": 4, "lora.dropout": 0.3},
        {"use_peft": True, "lora.r": 4, "dtype": "bfloat16", "gradient_checkpointing": True},
    ],
    ids=lambda values: " ".join(map(str, values.values())),
)
def test_what_samples_ahead_is_the_student(tiny, tmp_path, monkeypatch, values):
    """Made to wait for each update, the copy's attempts are those of the student itself."""

    def waiting(sample, tell, **options):
        return Pipeline(sample, tell, **(options | {"max_staleness": 0}))

    monkeypatch.setattr(loop, "Pipeline", waiting)
    # Both with the library that a pipeline on a CPU takes: another rounds otherwise.
    values = values | {"float32_matmul_precision": "medium"}
    values |= {"learning_rate": 3e-2, "eval_num_prompts": 2, "eval_steps": 2, "eval_split": ""}
    runs = [
        train(settings(tiny, tmp_path / name, max_staleness=staleness, **values), quiet=True)
        for name, staleness in (("alone", 0), ("ahead", 1))
    ]
    wrote = [
        [(row["step"], row["ids"]) for row in read_jsonl(tmp_path / name / "attempts.jsonl")]
        for name in ("alone", "ahead")
    ]
    assert wrote[0] == wrote[1]
    first = [ids for step, ids in wrote[0] if step == 1]
    assert first != [ids for step, ids in wrote[0] if step == 4], "it learns something"
    for name in ("loss", "kl", "grad_norm", "eval_loss"):
        seen = [[row[name] for row in rows if name in row] for rows in runs]
        assert seen[0] == pytest.approx(seen[1], rel=1e-4), name


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_a_batch_is_from_the_weights_of_the_step_that_it_names(
    tiny, tmp_path, monkeypatch, max_staleness
):
    seen, update, generate = {0: None}, loop.update, HFEngine.generate
    sampled = []

    def total(model):
        return float(sum(p.detach().double().abs().sum() for p in model.parameters()))

    def updating(state, *args, **kwargs):
        seen.setdefault(0, None)
        if seen[0] is None:
            seen[0] = total(state.model)
        found = update(state, *args, **kwargs)
        seen[state.step] = total(state.model)
        return found

    def sampling(self, *args, **kwargs):
        before = total(self.model)
        found = generate(self, *args, **kwargs)
        assert total(self.model) == before  # nobody changes it meanwhile
        sampled.append(before)
        return found

    monkeypatch.setattr(loop, "update", updating)
    monkeypatch.setattr(HFEngine, "generate", sampling)
    config = settings(tiny, tmp_path, max_steps=6, max_staleness=max_staleness)
    rows = train(config, quiet=True)
    lags = [row["staleness"] for row in rows]
    assert lags[0] == 0
    assert all(0 <= lag <= max_staleness for lag in lags)
    assert max(lags) > 0
    assert len(set(seen.values())) == len(rows) + 1, "each step has weights of its own"
    assert sampled == [seen[step - lag] for step, lag in enumerate(lags)]


def test_the_stages_work_at_once():
    """Three stages of 50 ms: a step takes little more than one of them."""

    def sample(step):
        time.sleep(0.05)
        return Batch(step, [], step)

    def tell(batch):
        time.sleep(0.05)
        return batch

    def seconds(batches):
        start = time.perf_counter()
        with batches:
            for step in range(12):
                batches.take(step)
                time.sleep(0.05)
                batches.finished(step + 1)
        return time.perf_counter() - start

    alone = seconds(OnDemand(sample, tell))
    ahead = seconds(Pipeline(sample, tell, first=0, last=12, max_staleness=3))
    assert ahead < 0.6 * alone


def test_no_more_batches_wait_than_the_staleness_allows():
    made = []

    def sample(step):
        made.append(step)
        return Batch(step, [], step)

    with Pipeline(sample, lambda batch: batch, first=0, last=50, max_staleness=2) as batches:
        for step in range(4):
            batches.take(step)
            time.sleep(0.05)
            until = time.perf_counter() + 5.0
            while max(made) < step + 2 and time.perf_counter() < until:
                time.sleep(0.01)
            assert made == [*range(step + 3)], "as many as may wait, and no more"
            batches.finished(step + 1)


def test_idle_shares_are_of_the_learners_time(monkeypatch):
    batch, learner = Clock(), Clock()
    batch.spent = {"time/rollout": 1.0, "time/verify": 0.5, "time/feedback": 4.0}
    learner.spent = {"time/update": 2.0}
    monkeypatch.setattr(learner, "start", time.perf_counter() - 4.0)
    scorer = Clock()
    scorer.spent = {"time/teacher": 0.5}
    times = stage_times(batch, scorer, learner)
    assert times["time/teacher"] == 0.5
    assert times["time/idle/rollout"] == pytest.approx(0.625, abs=0.01)
    assert times["time/idle/feedback"] == pytest.approx(0.0, abs=0.01)
    assert times["time/idle/update"] == pytest.approx(0.5, abs=0.01)


def test_a_steps_update_is_the_passes_and_the_optimizer(tiny, tmp_path, monkeypatch, capsys):
    update = loop.update

    def slow(*args, **options):
        time.sleep(1.0)
        return update(*args, **options)

    monkeypatch.setattr(loop, "update", slow)
    row = train(settings(tiny, tmp_path, max_steps=1, save_final_model=True))[0]
    assert 1.0 < row["time/update"] <= row["time/step"]
    assert row["time/idle/update"] == pytest.approx(1.0 - row["time/update"] / row["time/step"])
    assert capsys.readouterr().out.endswith(f"saved {tmp_path / 'model'}\n")


@pytest.mark.parametrize("stage", ["sampled", "with_feedback"])
def test_a_stages_error_is_the_runs_and_what_was_done_is_saved(tiny, tmp_path, monkeypatch, stage):
    make, calls = getattr(Rollouts, stage), []

    def fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MachineError("the tape is torn")
        return make(self, *args, **kwargs)

    monkeypatch.setattr(Rollouts, stage, fails)
    config = settings(tiny, tmp_path, max_steps=9, max_staleness=1)
    with pytest.raises(MachineError, match="the tape is torn"):
        train(config, quiet=True)
    (saved,) = checkpoints(tmp_path)
    monkeypatch.undo()
    done = int(saved.name.split("-")[1])
    assert done >= 1
    rows = train(dataclasses.replace(config), resume=True, quiet=True)
    assert [row["step"] for row in rows] == list(range(1, 10))


def test_ctrl_c_ends_a_long_rollout_at_once(tiny, tmp_path):
    """The thread that samples for minutes is left where it is, as Ctrl-C would leave it."""
    code = (
        "import sys; from tests.test_trainer import settings; from fdfast.trainer import train\n"
        "train(settings(sys.argv[1], sys.argv[2], max_steps=3, max_staleness=1, "
        "max_completion_length=6000, max_pass_tokens=99999, prompts_per_step=16))"
    )
    command = [sys.executable, "-c", code, str(tiny), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        while not (tmp_path / "run" / "run.json").exists():
            time.sleep(0.1)
        time.sleep(1.0)
        assert run.poll() is None
        start = time.perf_counter()
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[0].decode()
    assert time.perf_counter() - start < 10.0
    assert run.returncode == -signal.SIGINT, said
    assert said.splitlines()[-1] == "KeyboardInterrupt", said
    assert "EndedError" not in said


STORM = """
import faulthandler, random, signal, sys, threading, time
from fdfast.trainer.pipeline import Batch, Pipeline

faulthandler.dump_traceback_later(40, exit=True)
sys.setswitchinterval(1e-6)
random.seed(0)
ask = threading.Semaphore(0)


def busy(most):
    for _ in range(random.randrange(most)):
        pass


def sample(step):
    busy(60)
    return Batch(step, [], step)


def tell(batch):
    busy(60)
    return batch


def strike():
    while True:
        ask.acquire()
        busy(20_000)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


threading.Thread(target=strike, daemon=True).start()
until = time.monotonic() + 4.0
while time.monotonic() < until:
    struck = random.random() < 0.5
    batches = Pipeline(sample, tell, first=0, last=100_000, max_staleness=3)
    try:
        if struck:
            ask.release()
        with batches:
            for step in range(100_000 if struck else random.randrange(6)):
                batches.take(step)
                busy(300)
                batches.finished(step + 1)
    except KeyboardInterrupt:
        assert struck
    assert threading.active_count() == 2, threading.enumerate()
print("well")
"""


def test_it_ends_at_any_moment_by_itself_or_by_ctrl_c():
    """No lock is left taken, no thread left running: thousands of ends, at random moments."""
    command = [sys.executable, "-c", STORM]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout == "well\n", done.stderr


def test_an_error_of_the_learner_does_not_wait_for_a_slow_endpoint(tiny, tmp_path, monkeypatch):
    """Whoever waits for an answer, in a thread that no signal reaches, gives up the wait."""
    asked, free = threading.Event(), threading.Event()

    def slow(number, request):
        if number >= 3:
            asked.set()
            free.wait(60.0)
        return Reply(completion(GOOD))

    def fails(state, *args, **kwargs):
        assert asked.wait(30.0)
        raise MachineError("the tape is torn")

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "update", fails)
    with chat_server(slow) as server:
        config = settings(
            tiny,
            tmp_path / "run",
            max_staleness=1,
            **{"feedback.source": "llm", "feedback.text": "", "feedback.model": "judge"},
            **{"feedback.base_url": server.base_url, "feedback.api_key_env": ""},
        )
        start = time.perf_counter()
        with pytest.raises(MachineError, match="the tape is torn"):
            train(config, quiet=True)
        took = time.perf_counter() - start
        free.set()
    assert took < 20.0


def test_a_wait_for_lean_ends_with_the_pipeline():
    """A check may take half a minute: nobody waits for it once the run has ended."""
    checked, begun = Future(), threading.Event()

    def sample(step):
        begun.set()
        return result_of(checked)

    with Pipeline(sample, lambda batch: batch, first=0, last=9, max_staleness=1):
        assert begun.wait(5.0)
        start = time.perf_counter()
    assert time.perf_counter() - start < 5.0


def test_a_stale_batch_is_corrected_as_vllms_is(tiny):
    """By what the policy is now over what it was; that ratio is tested with use_vllm."""
    model, _ = load_model(tiny)
    by_vllm = scored(model, config_of(use_vllm=True), attempts_of())
    stale = scored(model, config_of(max_staleness=1), attempts_of())
    assert stale[0] == by_vllm[0]
    assert stale[0]["sampling/sampling_logp_difference/mean"] > 0.1
    assert all(torch.equal(stale[1][name], by_vllm[1][name]) for name in stale[1])
    off = config_of(max_staleness=1, vllm_importance_sampling_correction=False)
    assert scored(model, off, attempts_of())[0] != by_vllm[0]


def test_where_nothing_can_be_made_ahead_it_is_one_line(tiny, tmp_path):
    with pytest.raises(InputError, match="self_model 'teacher' would write while it scores"):
        settings(
            tiny, tmp_path, max_staleness=1, feedback_source="self", feedback_self_model="teacher"
        )
    two = Ranks()
    two.size = 2
    with pytest.raises(InputError, match=r"rollout.max_staleness is for one rank; got 2"):
        check_for_ranks(settings(tiny, tmp_path, max_staleness=1), two)
    with pytest.raises(InputError, match="max_staleness must not be negative; got -1"):
        settings(tiny, tmp_path, max_staleness=-1)


def test_a_copy_that_samples_shares_what_is_not_trained(tiny):
    adapters = Adapters(rank=4, alpha=8.0, dropout=0.0, target_modules=(), seed=0)
    student, _ = load_student(str(tiny), dtype="float32", adapters=adapters)
    sampled = WholeCopy(student, torch.device("cpu"), shares=True)
    for own, theirs in zip(sampled.model.parameters(), student.parameters(), strict=True):
        assert (own is theirs) == (not theirs.requires_grad)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    sampled.follow(student)
    for own, theirs in zip(sampled.model.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, theirs)
