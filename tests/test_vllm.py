"""vLLM itself, in process and as a server, against transformers: SmolLM2-135M in float32.

Run by `make test-vllm`, in the environment that vLLM pins.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch

from fdfast.data.jsonl import Theorem
from fdfast.data.problems import Problem
from fdfast.errors import InputError, MachineError
from fdfast.feedback import FeedbackItem, LLMFeedback, LLMSettings
from fdfast.lean import Message, Verdict
from fdfast.lean.tools import ToolResult
from fdfast.models import fetch_demo_model, load_model
from fdfast.rollout import HFEngine, SamplingOptions
from fdfast.rollout.tool_calls import Call
from fdfast.rollout.vllm_engine import VLLMEngine
from fdfast.rollout.vllm_server import VLLMServerEngine
from tests.tiny import save_tiny_model
from tests.vllm_process import ENVIRONMENT, KEY, ROOT, server_process

pytestmark = pytest.mark.vllm

QUESTIONS = ["Why is the sky blue?", "Prove that 1+1=2.", "Name three colours.", "hi"]
GREEDY = SamplingOptions(max_completion_length=32, temperature=0.0)
# float32 sums in another order: what two implementations may differ by in a log-prob.
NEAR = 1e-4
# What starting an engine changed in the environment.
CHANGED: set[str] = set()


@pytest.fixture(scope="module")
def environment():
    patch = pytest.MonkeyPatch()
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.setenv("TEST_KEY", KEY)
    patch.setenv("NO_PROXY", "127.0.0.1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def loaded(environment):
    return load_model("demo")


@pytest.fixture(scope="module")
def student(loaded):
    """The engine whose model is trained: the truth."""
    return HFEngine(*loaded)


@pytest.fixture(scope="module")
def local(environment):
    before = dict(os.environ)
    engine = VLLMEngine(fetch_demo_model(), dtype="float32", max_model_len=2048, enforce_eager=True)
    names = os.environ.keys() | before.keys()
    CHANGED.update(name for name in names if os.environ.get(name) != before.get(name))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def process(environment, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with server_process(fetch_demo_model(), log) as running:
        yield running


@pytest.fixture(scope="module")
def remote(process, loaded):
    engine = VLLMServerEngine(
        process.url, loaded[1], api_key_env="TEST_KEY", restart_timeout_s=240.0
    )
    yield engine
    engine.close()


@pytest.fixture(params=["local", "remote"])
def engine(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def prompts(loaded):
    return [prompt_of(loaded[1], question) for question in QUESTIONS]


def prompt_of(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def logits_after(model, ids, count):
    """(count, V): what one pass says of the last `count` ids."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -count - 1 : -1].float()


def check_logprobs(model, trajectories, temperature=1.0):
    for seen in trajectories:
        logits = logits_after(model, [*seen.prompt_ids, *seen.ids], len(seen.ids)) / temperature
        right = logits.log_softmax(-1).gather(1, torch.tensor(seen.ids)[:, None])[:, 0]
        right = torch.where(torch.tensor(seen.wrote), right, 0.0)
        torch.testing.assert_close(torch.tensor(seen.logprobs), right, rtol=0, atol=NEAR)


def check_greedy(model, trajectories, truth):
    """Equal ids; or where they part, two tokens were as good as each other."""
    check_logprobs(model, trajectories)
    for seen, right in zip(trajectories, truth, strict=True):
        if seen.ids == right.ids:
            assert (seen.text, seen.end, seen.wrote) == (right.text, right.end, right.wrote)
            continue
        pairs = zip(seen.ids, right.ids, strict=False)
        place = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        logits = logits_after(model, [*seen.prompt_ids, *right.ids[: place + 1]], 1)[0]
        gap = logits.max() - logits[seen.ids[place]]
        assert gap < NEAR, f"parted at {place} where the best token leads by {gap}"


def changed(model, seed, scale=0.01):
    """The same model with other weights in every tensor, the tied head's included."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.fixture
def restored(loaded):
    """The weights are put back after a test that changes them."""
    model = loaded[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield model
    model.load_state_dict(before)


def test_greedy_ids_are_the_students(engine, student, prompts):
    seen = engine.generate(prompts, GREEDY, seed=0)
    check_greedy(student.model, seen, student.generate(prompts, GREEDY, seed=0))
    ended = seen[QUESTIONS.index("hi")]
    assert (ended.end, ended.ids[-1]) == ("stop", student.tokenizer.eos_token_id)
    assert engine.tokenizer.eos_token_id in engine.end_ids


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_model_that_is_trained(engine, student, prompts, temperature):
    options = SamplingOptions(48, temperature=temperature)
    seen = engine.generate(prompts * 2, options, seed=3)
    check_logprobs(student.model, seen, temperature)
    assert all(t.wrote == [True] * len(t.ids) for t in seen)


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(engine, prompts):
    options = SamplingOptions(24, temperature=1.0)
    state, python = torch.get_rng_state(), random.getstate()
    first = engine.generate(prompts * 2, options, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state moved"
    assert python == random.getstate()
    again = engine.generate(prompts * 2, options, seed=1)
    assert [t.ids for t in first] == [t.ids for t in again]
    other = engine.generate(prompts * 2, options, seed=2)
    assert [t.ids for t in first] != [t.ids for t in other]
    assert first[0].ids != first[4].ids, "two trajectories of a prompt are drawn alike"


def test_a_stop_string_ends_a_turn_with_the_ids_that_completed_it(engine, student, prompts):
    options = SamplingOptions(64, temperature=1.0, stop_strings=(" the", "of"))
    seen = engine.generate(prompts * 2, options, seed=0)
    stopped = [t for t in seen if any(stop in t.text for stop in options.stop_strings)]
    assert stopped
    for trajectory in stopped:
        before = student.tokenizer.decode(trajectory.ids[:-1])
        assert not any(stop in before for stop in options.stop_strings)
        assert trajectory.end == "stop"
    check_logprobs(student.model, seen)


def test_new_weights_answer_next_and_nothing_of_the_old_is_left(engine, student, prompts, restored):
    """The prompt is long and was cached under the old weights, so a stale cache would show."""
    long = [prompt_of(student.tokenizer, "Sum up: " + "the sky is blue because " * 60)]
    old = engine.generate(long + prompts, GREEDY, seed=0)
    for seed in (1, 2):
        began = time.monotonic()
        engine.update_weights(changed(restored, seed))
        print(f"{type(engine).__name__}: weight update {time.monotonic() - began:.2f} s")
        new = engine.generate(long + prompts, GREEDY, seed=0)
        assert [t.ids for t in new] != [t.ids for t in old]
        check_greedy(restored, new, student.generate(long + prompts, GREEDY, seed=0))


def test_weights_reach_workers_through_a_folder_too(local, student, prompts, restored, tmp_path):
    """As where they are processes of their own."""
    local._worker_is_here, local.weights_dir = False, tmp_path
    try:
        local.update_weights(changed(restored, 5))
    finally:
        local._worker_is_here = True
    check_greedy(
        restored, local.generate(prompts, GREEDY, seed=0), student.generate(prompts, GREEDY, seed=0)
    )
    assert not list(tmp_path.iterdir())


def test_two_worker_processes_get_new_weights_and_the_tied_head(environment, tmp_path):
    environ = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_workers", str(tmp_path / "model")],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.split()[-1:] == ["equal"], done.stdout[-2000:] + done.stderr[-4000:]


def test_adapters_are_merged_into_what_is_sampled(engine, loaded, prompts, restored):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(restored, config)
    try:
        engine.update_weights(model)
        truth = HFEngine(model, loaded[1]).generate(prompts, GREEDY, seed=0)
        check_greedy(model, engine.generate(prompts, GREEDY, seed=0), truth)
    finally:
        model.unload()


def test_sleep_gives_back_what_it_can_and_the_next_call_wakes(engine, student, prompts, restored):
    engine.update_weights(restored)
    engine.sleep()
    check_greedy(
        student.model,
        engine.generate(prompts, GREEDY, seed=0),
        student.generate(prompts, GREEDY, seed=0),
    )


def test_on_a_cpu_vllm_cannot_sleep_and_says_so(local):
    assert local.can_sleep is torch.cuda.is_available()
    if not local.can_sleep:
        with pytest.raises(MachineError, match="no sleep mode on cpu"):
            VLLMEngine(fetch_demo_model(), enable_sleep_mode=True)


def test_what_is_no_model_is_one_line(environment, tmp_path):
    with pytest.raises(InputError, match="is no model that transformers can read") as caught:
        VLLMEngine(tmp_path)
    assert "\n" not in str(caught.value)


class Words:
    """A tool that is called with the text the model wrote."""

    schemas: ClassVar[list] = []

    def __init__(self, before=lambda: None):
        self.before = before

    def call(self, name, arguments):
        self.before()
        return ToolResult(f"The tool {name} says: go on, but be brief.", 0.1, ok=True)


@pytest.fixture
def calls_at_stops(monkeypatch):
    """A turn that ended with " the" is a call: the model need not know any format."""

    def read(_self, text, *others):
        return [Call("echo", "{}")] if text.endswith(" the") else []

    monkeypatch.setattr("fdfast.rollout.tool_turns.ToolTurns.read_calls", read)


def test_tools_answer_between_turns(engine, student, prompts, calls_at_stops):
    options = SamplingOptions(80, temperature=0.7, stop_strings=(" the",))
    seen = engine.generate(prompts, options, seed=4, tools=lambda _number: Words())
    called = [t for t in seen if t.tool_calls]
    assert called
    for trajectory in called:
        told = [i for i, wrote in zip(trajectory.ids, trajectory.wrote, strict=True) if not wrote]
        text = student.tokenizer.decode(told)
        assert text.count("The tool echo says") == len(trajectory.tool_calls)
        for call in trajectory.tool_calls:
            before = trajectory.ids[: call.position]
            assert student.tokenizer.decode(before).endswith(" the")
    # Ids that are trained are ids that were sampled, under the model that read the answers.
    check_logprobs(student.model, seen, temperature=0.7)


def test_whoever_waits_for_a_tool_holds_nobody_up(engine, prompts, calls_at_stops):
    done, ended = threading.Event(), []

    def on_end(number, _trajectory):
        ended.append(number)
        if len(ended) == 7:
            done.set()

    # Greedy, the answer to the first question has " the" within its first words.
    slow = Words(lambda: done.wait(60))
    seen = engine.generate(
        [prompts[0], *[prompts[3]] * 7],
        SamplingOptions(40, temperature=0.0, stop_strings=(" the",)),
        seed=0,
        tools=lambda number: slow if number == 0 else Words(),
        on_end=on_end,
    )
    assert seen[0].tool_calls
    assert ended[-1] == 0
    assert done.is_set()


def test_a_trajectory_that_fills_the_context_ends_with_length(engine, prompts):
    long = (prompts[0] * 100)[:2040]
    [seen] = engine.generate([long], SamplingOptions(64, temperature=1.0), seed=0)
    assert seen.end == "length" or len(seen.ids) < 8
    assert len(seen.ids) <= 8
    with pytest.raises(InputError, match="max_model_len = 2048"):
        engine.generate([(prompts[0] * 100)[:2048]], GREEDY, seed=0)


def test_log_probs_that_vllm_cannot_give_are_refused(engine, prompts):
    with pytest.raises(InputError, match="can't give log-probs"):
        engine.generate(prompts, SamplingOptions(temperature=0.7, top_p=0.9), seed=0)
    with pytest.raises(InputError, match="want 'raw_logprobs'"):
        engine.generate(prompts, SamplingOptions(top_k=5), seed=0)


def test_an_error_in_the_middle_leaves_the_engine_as_good_as_new(engine, student, prompts):
    def on_end(number, _trajectory):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, GREEDY, seed=0, on_end=on_end)
    check_greedy(
        student.model,
        engine.generate(prompts, GREEDY, seed=0),
        student.generate(prompts, GREEDY, seed=0),
    )


def test_the_process_is_left_as_it_was(local):
    """vLLM sets LD_PRELOAD, LOCAL_WORLD_SIZE and others, and replaces torch.set_num_threads."""
    ours = ("VLLM_", "TRANSFORMERS_VERBOSITY", "HF_HUB_")
    assert not {name for name in CHANGED if not name.startswith(ours)}
    assert any(name.startswith("VLLM_") for name in CHANGED)
    assert isinstance(torch.set_num_threads, types.BuiltinFunctionType)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_feedback_comes_from_vllms_chat_server(process, tmp_path):
    """A model of 135M seldom keeps the rules of feedback: what is promised is that each attempt
    ends in feedback or a said failure, and that all is counted."""
    theorem = Theorem("t", "train", "theorem t (a b : Prop) (h : a) (k : b) : a :=", "", "", "h")
    verdict = Verdict("failed", (Message("error", 1, 0, "unknown identifier 'x'"),), "")
    item = FeedbackItem(Problem("t", theorem.formal_statement, theorem), "x", verdict)
    items = [dataclasses.replace(item, attempt=f"x {i}") for i in range(3)]
    settings = LLMSettings(
        f"{process.url}/v1", "demo", api_key_env="TEST_KEY", max_completion_length=48
    )
    provider = LLMFeedback(settings, cache_path=tmp_path / "feedback.sqlite")
    answers = provider.feedback_many(items)
    counted = provider.counters
    # One request an attempt, and one more after a first answer that broke the rules.
    assert counted.requests == 3 + counted.refused - answers.count(None)
    assert counted.retries == 0
    assert counted.failed == answers.count(None)
    assert counted.prompt_tokens > 3 * 100
    assert 0 < counted.completion_tokens <= 48 * counted.requests
    if None in answers:
        assert provider.last_failure.startswith("the model's answer broke the rules twice")
    missing = dataclasses.replace(settings, model="no-such-model")
    with pytest.raises(InputError, match="refused model 'no-such-model'"):
        LLMFeedback(missing, cache_path=tmp_path / "other.sqlite").feedback_many(items)


def test_a_server_killed_in_the_middle_loses_no_trajectory_and_gets_its_weights_back(
    process, remote, student, prompts, restored
):
    """Last: SIGKILL while turns are in flight, a new server with its initial weights."""
    remote.update_weights(changed(restored, 9))
    asked = prompts * 3
    options = SamplingOptions(96, temperature=0.0)
    killed, ended = threading.Event(), []

    def on_end(number, _trajectory):
        ended.append((number, killed.is_set()))

    def restart():
        while not ended:  # the short answers are there, the long ones are in flight
            time.sleep(0.02)
        process.kill()
        killed.set()
        process.start()

    killer = threading.Thread(target=restart)
    killer.start()
    began = time.monotonic()
    seen = remote.generate(asked, options, seed=0, on_end=on_end)
    killer.join()
    print(f"generate with a kill: {time.monotonic() - began:.1f} s")
    assert sorted(number for number, _ in ended) == list(range(12))
    assert any(after for _, after in ended), "the kill came too late to mean anything"
    check_greedy(restored, seen, student.generate(asked, options, seed=0))


def test_an_actor_of_a_cluster_with_vllm_answers_as_transformers(tmp_path, monkeypatch):
    """Its parts run as Ray calls them: each in another thread; Ray itself is not in this venv."""
    from fdfast.data.problems import Problem
    from fdfast.rollout.ray_actor import ActorSettings, RolloutActor, model_files
    from fdfast.rollout.ray_units import Unit
    from fdfast.rollout.weights import checkpoint_weights

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    model, tokenizer = load_model(save_tiny_model(tmp_path))
    settings = ActorSettings(
        model_files(model, tokenizer),
        batch_size=4,
        use_vllm=True,
        vllm_args={"max_model_len": 256, "gpu_memory_utilization": 0.3},
    )
    problems = tuple(Problem(text, text) for text in ("Why", "theorem a + b = b + a", "x"))
    prompts = {problem: tokenizer(problem.prompt).input_ids for problem in problems}
    options = SamplingOptions(max_completion_length=24, temperature=0.0)
    actor = RolloutActor()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as another:
        one.submit(actor.set_up, settings).result()
        another.submit(actor.engine.load_weights, checkpoint_weights(model)).result()
        actor.version = 1
        one.submit(actor.sample, Unit(0, 0, problems, prompts, options, 0, 1)).result()
        attempts = another.submit(actor.judged, 0).result()
    actor.engine.close()
    right = HFEngine(model, tokenizer).generate([*prompts.values()], options, seed=0)
    assert [attempt.ids for attempt in attempts] == [attempt.ids for attempt in right]
