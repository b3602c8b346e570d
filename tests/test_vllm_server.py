"""VLLMServerEngine against a server that dies, forgets its weights and refuses; test_vllm.py has
the real one."""

import asyncio
import os
import sys
import threading
import time
from typing import ClassVar

import pytest
import torch

from fdfast.errors import InputError, MachineError
from fdfast.lean.tools import ToolResult
from fdfast.models import load_model
from fdfast.rollout import SamplingOptions
from fdfast.rollout.vllm_engine import VLLMEngine
from fdfast.rollout.vllm_server import VLLMServerEngine
from fdfast.rollout.vllm_turns import logprobs_mode_for, turn_seed
from fdfast.rollout.vllm_worker import EXTENSION
from tests.tiny import save_tiny_model
from tests.vllm_stand_in import stand_in, written

GENERATE = "/inference/v1/generate"
OPTIONS = SamplingOptions(max_completion_length=20)
PROMPTS = [[5, 6, 7], [8], [9, 10]]
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(save_tiny_model(tmp_path_factory.mktemp("tiny"), tied=False))


def tagged(model, tag):
    """The model, with weights that the stand-in tells from others."""
    with torch.no_grad():
        model.model.norm.weight[0] = tag
    return model


@pytest.fixture
def engine_for(loaded, tmp_path):
    made = []

    def make(server, **values):
        async def nap(_seconds):
            await asyncio.sleep(0)

        defaults = {"weights_dir": tmp_path, "restart_timeout_s": 20.0, "timeout_s": 20.0}
        made.append(VLLMServerEngine(server.url, loaded[1], sleep=nap, **(defaults | values)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
    assert not list(tmp_path.iterdir()), "weights stayed behind"


def expected(tag, prompt, number, end_id, seed=1):
    request = {"token_ids": prompt, "sampling_params": {"seed": turn_seed(seed, number, 0)}}
    return written(tag, request, end_id)


def faults(**of_path):
    """Faults by path and number of the request."""
    table = {
        {"generate": GENERATE, "models": "/v1/models"}.get(n, f"/{n}"): f
        for n, f in of_path.items()
    }
    return lambda path, number: table.get(path, {}).get(number)


def check(trajectories, tag, end_id):
    assert [t.ids for t in trajectories] == [
        expected(tag, prompt, number, end_id) for number, prompt in enumerate(PROMPTS)
    ]


def test_ids_go_in_and_come_out_with_their_log_probs(loaded, engine_for):
    end = loaded[1].eos_token_id
    ended = []
    with stand_in(end) as server:
        options = SamplingOptions(20, temperature=0.7, stop_strings=("stop",))
        seen = engine_for(server).generate(
            PROMPTS, options, seed=1, on_end=lambda number, _: ended.append(number)
        )
        requests = server.bodies(GENERATE)
    check(seen, 0, end)
    assert sorted(ended) == [0, 1, 2]
    for trajectory, prompt in zip(seen, PROMPTS, strict=True):
        assert trajectory.logprobs == [-i / 8 for i in trajectory.ids]
        assert (trajectory.wrote, trajectory.end) == ([True] * 3, "stop")
        assert trajectory.prompt_ids == prompt
    [params] = [r["sampling_params"] for r in requests if r["token_ids"] == PROMPTS[0]]
    assert params == {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 20,
        "seed": turn_seed(1, 0, 0),
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": [end],
        "detokenize": True,
        "stop": ["stop"],
        "include_stop_str_in_output": True,
    }


def test_new_weights_are_loaded_and_the_cache_reset_before_they_count(loaded, engine_for, tmp_path):
    end = loaded[1].eos_token_id
    with stand_in(end) as server:
        engine = engine_for(server)
        engine.update_weights(tagged(loaded[0], 1))
        asked = ("/health", "/v1/models", "/server_info")
        steps = [path for path in server.paths() if path not in asked]
        assert steps == [
            "/weight_info",
            "/update_weight_version",
            "/collective_rpc",
            "/reset_prefix_cache",
            "/weight_info",
            "/update_weight_version",
        ]
        loading, ours = [b["new_version"] for b in server.bodies("/update_weight_version")]
        assert loading != ours == server.version
        check(engine.generate(PROMPTS, OPTIONS, seed=1), 1, end)
        engine.update_weights(tagged(loaded[0], 2))
        check(engine.generate(PROMPTS, OPTIONS, seed=1), 2, end)
        assert len(server.bodies("/collective_rpc")) == 2, "generate pushed what was there"
        [home] = tmp_path.iterdir()
        assert len(list(home.iterdir())) == 1, "the old weights were not removed"
        assert home.stat().st_mode & 0o077 == 0


def test_a_server_that_was_restarted_gets_the_weights_before_it_samples(loaded, engine_for):
    end = loaded[1].eos_token_id
    with stand_in(end) as server:
        engine = engine_for(server)
        engine.update_weights(tagged(loaded[0], 3))
        server.restart()
        server.seen.clear()
        check(engine.generate(PROMPTS, OPTIONS, seed=1), 3, end)
        paths = server.paths()
        assert paths.index("/collective_rpc") < paths.index(GENERATE)
        assert paths.count(GENERATE) == 3


@pytest.mark.parametrize("how", ["restart and die", "restart", "die", 500, 503, 429])
@pytest.mark.parametrize("turn", [0, 2])
def test_no_trajectory_is_lost_to_a_server_that_fails_in_the_middle(loaded, engine_for, how, turn):
    """`restart` answers, by the initial weights: only the version in the answer tells."""
    end = loaded[1].eos_token_id
    with stand_in(end, faults(generate={turn: how})) as server:
        engine = engine_for(server)
        engine.update_weights(tagged(loaded[0], 4))
        check(engine.generate(PROMPTS, OPTIONS, seed=1), 4, end)
        assert server.paths().count(GENERATE) >= 4
        pushes = server.paths().count("/collective_rpc")
        assert pushes == (2 if str(how).startswith("restart") else 1)


@pytest.mark.parametrize(
    "place", ["collective_rpc", "reset_prefix_cache", "update_weight_version", "server_info"]
)
@pytest.mark.parametrize("how", ["restart and die", "restart"])
def test_a_restart_while_weights_are_pushed_is_noticed(loaded, engine_for, place, how):
    end = loaded[1].eos_token_id
    with stand_in(end, faults(**{place: {0: how}})) as server:
        engine = engine_for(server)
        engine.update_weights(tagged(loaded[0], 5))
        assert server.tag == 5
        check(engine.generate(PROMPTS, OPTIONS, seed=1), 5, end)


def test_a_server_that_never_comes_back_is_one_line_with_its_address(loaded, engine_for):
    with stand_in(loaded[1].eos_token_id) as server:
        engine = engine_for(server, restart_timeout_s=0.3)
    with pytest.raises(
        MachineError, match=rf"{server.url}: vLLM's server gave no answer"
    ) as caught:
        engine.generate(PROMPTS, OPTIONS, seed=1)
    assert "\n" not in str(caught.value)


def test_a_server_whose_engine_died_is_waited_for(loaded, engine_for):
    """It answers 500 until it ends, longer than a turn is tried; /health says what it is."""
    end = loaded[1].eos_token_id
    dead = dict.fromkeys(range(1, 9), 503)
    with stand_in(end, faults(generate={0: 500}, health=dead)) as server:
        seen = engine_for(server, max_retries=1).generate(PROMPTS, OPTIONS, seed=1)
    check(seen, 0, end)


def test_a_turn_that_always_fails_ends_the_call(loaded, engine_for):
    with stand_in(loaded[1].eos_token_id, lambda path, _: 500 if path == GENERATE else None) as s:
        engine = engine_for(s, max_retries=2)
        with pytest.raises(MachineError, match=r"no answer to a turn in 3 tries; .*HTTP 500: no"):
            engine.generate(PROMPTS[:1], OPTIONS, seed=1)
        assert s.paths().count(GENERATE) == 3


def test_weights_that_the_server_cannot_load_are_one_line(loaded, engine_for):
    fault = {"collective_rpc": dict.fromkeys(range(9), 500)}
    with stand_in(loaded[1].eos_token_id, faults(**fault)) as server:
        with pytest.raises(MachineError, match=r"can't load the weights in .*weights_dir"):
            engine_for(server).update_weights(loaded[0])
        assert server.paths().count("/collective_rpc") == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"generate": {0: 400}}, "refuses .*max_model_len"),
        ({"generate": {0: 401}}, "api_key_env"),
        ({"models": {0: 404}}, "base_url"),
    ],
)
def test_what_no_later_try_mends_is_refused_at_once(loaded, engine_for, fault, words):
    with stand_in(loaded[1].eos_token_id, faults(**fault)) as server:
        with pytest.raises(InputError, match=words):
            engine_for(server).generate(PROMPTS[:1], OPTIONS, seed=1)
        assert server.paths().count(GENERATE) <= 1


def test_a_server_without_its_development_mode_is_refused(loaded, engine_for):
    with (
        stand_in(loaded[1].eos_token_id, faults(weight_info={0: 404})) as server,
        pytest.raises(InputError, match="VLLM_SERVER_DEV_MODE=1"),
    ):
        engine_for(server).update_weights(loaded[0])


def test_the_key_is_sent_and_never_said(loaded, engine_for, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with stand_in(loaded[1].eos_token_id, faults(generate={3: 400})) as server:
        engine = engine_for(server, api_key_env="TEST_KEY")
        engine.generate(PROMPTS, OPTIONS, seed=1)
        assert server.keys == {f"Bearer {KEY}"}
        with pytest.raises(InputError) as caught:
            engine.generate(PROMPTS, OPTIONS, seed=1)
        assert KEY not in str(caught.value)
        assert KEY not in repr(vars(engine))
        monkeypatch.delenv("TEST_KEY")
        with pytest.raises(InputError, match="TEST_KEY holds no key"):
            engine_for(server, api_key_env="TEST_KEY")


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://u:p@host", "http://host/?key=1"])
def test_what_is_no_address_is_refused(loaded, url):
    with pytest.raises(InputError, match="base_url must"):
        VLLMServerEngine(url, loaded[1])


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, ""),
        ({"temperature": 0.0, "top_p": 0.5}, ""),
        ({"temperature": 0.7}, "processed_logprobs"),
        ({"top_p": 0.9}, "raw_logprobs"),
        ({"top_k": 5}, "raw_logprobs"),
    ],
)
def test_which_log_probs_of_vllm_are_those_of_a_trajectory(options, mode):
    assert logprobs_mode_for(SamplingOptions(**options)) == mode


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7, "top_p": 0.9}, {"temperature": 2, "top_k": 5}]
)
def test_log_probs_that_vllm_cannot_give_are_refused(loaded, engine_for, options):
    with (
        stand_in(loaded[1].eos_token_id) as server,
        pytest.raises(InputError, match="vLLM can't give log-probs"),
    ):
        engine_for(server).generate(PROMPTS, SamplingOptions(**options), seed=1)


def test_a_server_with_the_other_log_probs_is_refused(loaded, engine_for):
    with stand_in(loaded[1].eos_token_id) as server:
        with pytest.raises(InputError, match="want 'raw_logprobs'; start it with that"):
            engine_for(server).generate(PROMPTS, SamplingOptions(top_k=5), seed=1)
        assert GENERATE not in server.paths()


def test_a_temperature_that_vllm_would_raise_is_refused():
    with pytest.raises(InputError, match=r"temperature 0\.01 at least"):
        logprobs_mode_for(SamplingOptions(temperature=0.001))


def test_a_prompt_without_room_is_refused_and_a_trajectory_that_fills_it_ends(loaded, engine_for):
    end = loaded[1].eos_token_id
    with stand_in(end) as server:
        engine = engine_for(server)
        with pytest.raises(InputError, match="prompt 1 has 64 tokens; with max_model_len = 64"):
            engine.generate([[5], [5] * 64], OPTIONS, seed=1)
        with pytest.raises(InputError, match="prompt 0 is empty"):
            engine.generate([[]], OPTIONS, seed=1)
        [seen] = engine.generate([[5] * 62], OPTIONS, seed=1)
    assert (len(seen.ids), seen.end) == (2, "length")


@pytest.mark.parametrize(("device", "extension"), [("cpu", ""), ("cpu", EXTENSION), ("cuda", "")])
def test_a_tied_head_is_never_left_behind(engine_for, tmp_path_factory, device, extension):
    model, tokenizer = load_model(save_tiny_model(tmp_path_factory.mktemp("tied"), tied=True))
    with stand_in(tokenizer.eos_token_id) as server:
        server.config["parallel_config"]["worker_extension_cls"] = extension
        server.config["device_config"]["device_type"] = device
        engine = engine_for(server)
        if device == "cpu" and not extension:
            with pytest.raises(InputError, match="--worker-extension-cls fdfast"):
                engine.update_weights(model)
            return
        engine.update_weights(model)
        [call] = server.bodies("/collective_rpc")
        assert call["method"] == ("fdfast_load_folder" if extension else "reload_weights")


def test_a_server_sleeps_and_is_woken_before_it_samples(loaded, engine_for):
    end = loaded[1].eos_token_id
    with stand_in(end) as server:
        engine_for(server).sleep()
        assert not server.asleep, "nobody allowed it"
        engine = engine_for(server, may_sleep=True)
        engine.sleep()
        assert server.asleep
        server.seen.clear()
        check(engine.generate(PROMPTS, OPTIONS, seed=1), 0, end)
        assert server.paths().index("/wake_up") < server.paths().index(GENERATE)


CALL = '<tool_call>{"name": "echo", "arguments": {"x": 1}}</tool_call>'


class Echo:
    """Says what it was asked, when `before` is done."""

    schemas: ClassVar[list] = []

    def __init__(self, before=lambda: None):
        self.before = before

    def call(self, name, arguments):
        self.before()
        return ToolResult(f"{name} was asked {arguments}", 0.5, ok=True)


def test_the_others_go_on_while_one_waits_for_its_tool(loaded, engine_for):
    """The tool answers once the others are done; then its answer is read, not written."""
    tokenizer, done = loaded[1], threading.Event()
    call = [*tokenizer(CALL).input_ids, tokenizer.eos_token_id]
    ended = []

    def on_end(number, _trajectory):
        ended.append(number)
        if len(ended) == 5:
            done.set()

    def turn(request):
        first = request["token_ids"] == [11]
        return call if first else [20, tokenizer.eos_token_id]

    prompts = [[11], *([12 + n] for n in range(5))]
    with stand_in(tokenizer.eos_token_id) as server:
        server.max_model_len, server.turn = 4096, turn
        seen = engine_for(server, max_concurrency=2).generate(
            prompts,
            SamplingOptions(max_completion_length=500),
            seed=1,
            tools=lambda number: Echo(lambda: done.wait(30)),
            on_end=on_end,
        )
        requests = server.bodies(GENERATE)
    assert ended[-1] == 0
    first = seen[0]
    assert [c.output for c in first.tool_calls] == ['echo was asked {"x": 1}']
    sampled = [i for i, wrote in zip(first.ids, first.wrote, strict=True) if wrote]
    assert sampled == [*call, 20, tokenizer.eos_token_id]
    assert [lp for lp, wrote in zip(first.logprobs, first.wrote, strict=True) if not wrote] == [
        0.0
    ] * first.wrote.count(False)
    # The second turn read exactly what the trajectory holds.
    assert requests[-1]["token_ids"] == [11, *first.ids[:-2]]
    assert requests[-1]["sampling_params"]["seed"] == turn_seed(1, 0, 1)


def test_a_tools_answer_is_read_while_other_turns_are_in_flight(loaded, engine_for):
    """The other prompt's turn ends only when the second turn of the first has begun."""
    tokenizer, second = loaded[1], threading.Event()
    end = tokenizer.eos_token_id
    call = [*tokenizer(CALL).input_ids, end]

    def turn(request):
        if request["token_ids"] == [12]:
            assert second.wait(30)
            return [21, end]
        if request["token_ids"] == [11]:
            return call
        second.set()
        return [20, end]

    with stand_in(end) as server:
        server.max_model_len, server.turn = 4096, turn
        seen = engine_for(server).generate(
            [[11], [12]],
            SamplingOptions(max_completion_length=500),
            seed=1,
            tools=lambda number: Echo(lambda: time.sleep(0.2)),  # not done at once
        )
    assert [t.ids[-2:] for t in seen] == [[20, end], [21, end]]
    assert second.is_set()


def test_every_turn_has_a_seed_of_its_own():
    seeds = {turn_seed(s, n, r) for s in range(20) for n in range(20) for r in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_an_answer_of_a_tool_that_leaves_no_room_ends_the_trajectory(loaded, engine_for):
    tokenizer = loaded[1]
    call = [*tokenizer(CALL).input_ids, tokenizer.eos_token_id]
    with stand_in(tokenizer.eos_token_id) as server:
        server.max_model_len, server.turn = len(call) + 4, lambda request: call
        [seen] = engine_for(server).generate(
            [[11]],
            SamplingOptions(max_completion_length=500),
            seed=1,
            tools=lambda number: Echo(),
        )
    assert (seen.end, len(seen.tool_calls)) == ("length", 1)


def test_a_fault_in_a_tool_ends_the_call_and_leaves_no_thread(loaded, engine_for):
    tokenizer = loaded[1]
    call = [*tokenizer(CALL).input_ids, tokenizer.eos_token_id]

    def broken():
        raise MachineError("the disk is full")

    with stand_in(tokenizer.eos_token_id) as server:
        server.max_model_len, server.turn = 4096, lambda request: call
        with pytest.raises(MachineError, match="the disk is full"):
            engine_for(server).generate(
                PROMPTS,
                SamplingOptions(max_completion_length=500),
                seed=1,
                tools=lambda number: Echo(broken),
            )
    assert not [t for t in threading.enumerate() if t.name == "vllm"]


def test_without_vllm_its_engine_says_what_installs_it(monkeypatch):
    before = dict(os.environ)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MachineError, match=r"pip install 'fdfast\[vllm\]'"):
        VLLMEngine("anywhere")
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
