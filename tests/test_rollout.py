"""Rollouts: the ids that come back are the ids that were sampled, all of them, tools or not."""

import copy
import threading
from typing import ClassVar

import pytest
import torch

from fdfast.errors import InputError, MachineError
from fdfast.lean.tools import ToolResult
from fdfast.models import load_model
from fdfast.rollout import HFEngine, SamplingOptions
from fdfast.rollout.hf import _Batch
from fdfast.rollout.sampling import sample
from fdfast.rollout.tool_calls import Call
from tests.scripted import script
from tests.tiny import save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model, tokenizer = load_model(save_tiny_model(tmp_path_factory.mktemp("tiny")))
    return HFEngine(model, tokenizer, batch_size=3)


def prompts(engine):
    texts = ["Why", "theorem a + b = b + a", "x", "Why is the sky blue?"]
    return [engine.tokenizer(t).input_ids for t in texts]


def test_greedy_answers_are_those_of_each_prompt_alone(engine):
    """Left padding and batches of three change nothing."""
    options = SamplingOptions(max_completion_length=12, temperature=0.0)
    together = engine.generate(prompts(engine), options, seed=0)
    for prompt, completion in zip(prompts(engine), together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for sampled in completion.ids:
                logits = engine.model(torch.tensor([ids])).logits[0, -1]
                assert sampled == logits.argmax().item()
                ids.append(sampled)


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(engine):
    options = SamplingOptions(max_completion_length=16)
    before = torch.get_rng_state()
    first = engine.generate(prompts(engine), options, seed=1)
    assert torch.equal(before, torch.get_rng_state()), "the caller's random state moved"
    assert first == engine.generate(prompts(engine), options, seed=1)
    assert first != engine.generate(prompts(engine), options, seed=2)


def test_a_step_in_parts_of_any_size_gives_the_answers_of_the_whole(engine):
    prompts = [engine.tokenizer(text).input_ids for text in ("Why?", "x", "Why?", "a + b", "Why?")]
    options = SamplingOptions(max_completion_length=12)
    whole = engine.generate(prompts, options, seed=3)
    for size in (1, 2, 3):
        parts = [
            answer
            for first in range(0, len(prompts), size)
            for answer in engine.generate(
                prompts[first : first + size], options, seed=3, first=first
            )
        ]
        assert [answer.ids for answer in parts] == [answer.ids for answer in whole]
    assert whole[0].ids != whole[2].ids


def test_an_answer_ends_with_its_end_token_and_without_padding(engine):
    ends = {engine.tokenizer.eos_token_id, *range(40, 50)}  # a model may have several
    eager = HFEngine(engine.model, engine.tokenizer, batch_size=3)
    eager.end_ids = sorted(ends)
    answers = eager.generate(prompts(engine) * 8, SamplingOptions(max_completion_length=24), seed=0)
    assert any(a.truncated for a in answers)
    assert not all(a.truncated for a in answers)
    for answer in answers:
        assert (answer.ids[-1] in ends) == (not answer.truncated)
        assert ends.isdisjoint(answer.ids[:-1])
        assert len(answer.ids) == 24 or not answer.truncated


def test_a_stop_string_ends_an_answer_and_no_padding_token_is_taken_for_sampled(engine):
    """Where pad is the end token, as in SmolLM2, a row that stopped is padded with end tokens."""
    tokenizer, pad = engine.tokenizer, engine.tokenizer.pad_token_id
    tokenizer.pad_token_id = tokenizer.eos_token_id
    try:
        options = SamplingOptions(max_completion_length=64, stop_strings=("e",))
        answers = engine.generate(prompts(engine) * 8, options, seed=0)
    finally:
        tokenizer.pad_token_id = pad
    stopped = [a for a in answers if "e" in a.text]
    assert stopped
    for answer in stopped:
        assert not answer.truncated
        assert "e" not in tokenizer.decode(answer.ids[:-1], skip_special_tokens=True)
        assert tokenizer.eos_token_id not in answer.ids


def test_the_models_mode_is_left_as_it_was(engine):
    engine.model.train()
    engine.generate(prompts(engine)[:1], SamplingOptions(max_completion_length=2), seed=0)
    assert engine.model.training
    engine.model.eval()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_of_the_models_generation_config_changes_the_sampling(engine, temperature):
    options = SamplingOptions(max_completion_length=16, temperature=temperature)
    expected = engine.generate(prompts(engine), options, seed=0)
    before = engine.model.generation_config
    ours = copy.deepcopy(before)
    ours.update(repetition_penalty=5.0, min_p=0.9, suppress_tokens=expected[0].ids[:4])
    ours.update(do_sample=True, temperature=0.1, top_k=1, no_repeat_ngram_size=1)
    engine.model.generation_config = ours
    try:
        answers = engine.generate(prompts(engine), options, seed=0)
        assert engine.model.generation_config is ours, "the model's own settings were lost"
    finally:
        engine.model.generation_config = before
    assert answers == expected


def logprobs_of_the_whole(engine, prompt, trajectory, temperature=1.0):
    """What one pass over prompt and trajectory says of each id that the model wrote."""
    ids = torch.tensor([[*prompt, *trajectory.ids]])
    with torch.no_grad():
        logits = engine.model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    every = logits.log_softmax(-1).gather(1, torch.tensor(trajectory.ids)[:, None])[:, 0]
    return torch.where(torch.tensor(trajectory.wrote), every, 0.0)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_the_samplers_own(engine, temperature):
    options = SamplingOptions(max_completion_length=20, temperature=temperature, top_k=50)
    asked = prompts(engine) * 2  # eight rows in a batch of three: they come and go
    for prompt, seen in zip(asked, engine.generate(asked, options, seed=3), strict=True):
        right = logprobs_of_the_whole(engine, prompt, seen, temperature)
        torch.testing.assert_close(torch.tensor(seen.logprobs), right, rtol=0, atol=1e-4)
        assert seen.wrote == [True] * len(seen.ids)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.4}, {"top_k": 40, "top_p": 0.5}])
def test_the_nucleus_holds_and_is_drawn_from_as_it_should(options):
    torch.manual_seed(0)
    logits = torch.randn(50) * 2
    chosen = SamplingOptions(temperature=0.8, **options)
    probs = (logits / 0.8).softmax(-1)
    ranked, order = probs.sort(descending=True)
    kept = ranked.cumsum(-1) - ranked < chosen.top_p
    kept[chosen.top_k or 50 :] = False
    expected = torch.zeros(50).scatter(0, order, torch.where(kept, ranked, 0.0))
    expected /= expected.sum()
    count = 20_000
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    tokens, logprobs = sample(logits.expand(count, 50), chosen, generators)
    share = torch.bincount(torch.tensor(tokens), minlength=50) / count
    assert (share[expected == 0] == 0).all()
    assert (share - expected).abs().max() < 0.02
    assert torch.allclose(torch.tensor(logprobs), probs.log()[torch.tensor(tokens)])


class Echo:
    """A tool that says what it was asked, after `before` is done."""

    schemas: ClassVar[list] = []

    def __init__(self, before=lambda: None):
        self.before = before

    def call(self, name, arguments):
        self.before()
        return ToolResult(f"{name} was asked {arguments}", 0.5, ok=True)


CALL = '<tool_call>{"name": "echo", "arguments": {"x": "∀ x ∈ β"}}</tool_call>'


@pytest.fixture
def scripted(engine, monkeypatch):
    """Makes the model write given texts, a turn each; the log-probs stay the model's."""

    def set_up(turns_of):
        script(monkeypatch, engine.tokenizer, engine.end_ids[0], turns_of)

    return set_up


def test_tools_answer_between_turns_and_ids_are_what_was_sampled(engine, scripted):
    turns = {0: [CALL, "Now it is proved."], 1: ["Nothing to ask."], 2: [CALL + CALL, CALL, "x"]}
    scripted(lambda number: turns[number])
    asked = prompts(engine)[:3]
    options = SamplingOptions(max_completion_length=400)
    seen = engine.generate(asked, options, seed=0, tools=lambda _number: Echo())
    for number, (prompt, trajectory) in enumerate(zip(asked, seen, strict=True)):
        written = [i for i, wrote in zip(trajectory.ids, trajectory.wrote, strict=True) if wrote]
        expected = [engine.tokenizer(turn).input_ids for turn in turns[number]]
        assert written == [i for turn in expected for i in [*turn, engine.end_ids[0]]]
        right = logprobs_of_the_whole(engine, prompt, trajectory)
        torch.testing.assert_close(torch.tensor(trajectory.logprobs), right, rtol=0, atol=1e-4)
        assert trajectory.text == turns[number][-1]
        assert trajectory.end == "stop"
    assert [len(t.tool_calls) for t in seen] == [1, 0, 3]
    [call] = seen[0].tool_calls
    assert (call.name, call.ok, call.seconds) == ("echo", True, 0.5)
    answer = [i for i, wrote in zip(seen[0].ids, seen[0].wrote, strict=True) if not wrote]
    told = engine.tokenizer.decode(answer)
    assert told == (f"\n<|im_start|>tool\n{call.output}<|im_end|>\n<|im_start|>assistant\n")


def test_the_others_go_on_while_one_waits_for_its_tool(engine, scripted):
    """The tool answers when the last of the others is done: in lock-step nobody would ever be."""
    finished = threading.Event()
    scripted(lambda number: [CALL, "a"] if number == 0 else ["some words"] * 1)
    engine_turns = []

    def tools(number):
        def wait():
            assert finished.wait(30)

        return Echo(wait)

    original = _Batch._goes_on

    def goes_on(self, row, cache, place):
        result = original(self, row, cache, place)
        engine_turns.append(row.draft.number)
        if len(self.turns.done) == 7:
            finished.set()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Batch, "_goes_on", goes_on)
        seen = engine.generate(
            prompts(engine) * 2, SamplingOptions(max_completion_length=99), seed=0, tools=tools
        )
    assert [t.end for t in seen] == ["stop"] * 8
    assert seen[0].waited_s > 0
    assert engine_turns[-1] == 0


def test_a_turn_of_one_token_may_call_a_tool(engine, scripted, monkeypatch):
    """It ends in the pass that reads the prompt."""
    scripted(lambda number: ["", "", "end"])
    monkeypatch.setattr(
        "fdfast.rollout.tool_turns.ToolTurns.read_calls",
        lambda self, text, *others: [Call("echo", "{}")] if not text else [],
    )
    options = SamplingOptions(max_completion_length=99)
    for seed, asked in enumerate((prompts(engine), prompts(engine)[:1] * 4)):
        seen = engine.generate(asked, options, seed=seed, tools=lambda _number: Echo())
        assert [len(t.tool_calls) for t in seen] == [2] * 4
        for prompt, trajectory in zip(asked, seen, strict=True):
            right = logprobs_of_the_whole(engine, prompt, trajectory)
            torch.testing.assert_close(torch.tensor(trajectory.logprobs), right, rtol=0, atol=1e-4)


def test_calls_for_which_no_token_is_left_are_no_end_of_their_own(engine, scripted):
    scripted(lambda number: [CALL])
    count = len(engine.tokenizer(CALL).input_ids) + 1
    options = SamplingOptions(max_completion_length=count)
    [seen] = engine.generate([[5]], options, seed=0, tools=lambda _number: Echo())
    assert (seen.end, seen.truncated, seen.tool_calls) == ("length", True, [])


def test_a_turn_of_very_many_calls_is_cut(engine, scripted):
    scripted(lambda number: [CALL * 30, "end"])
    options = SamplingOptions(max_completion_length=4000)
    [seen] = engine.generate([[5]], options, seed=0, tools=lambda _number: Echo())
    assert [c.ok for c in seen.tool_calls] == [True] * 8 + [False]
    assert seen.tool_calls[8].output.startswith("not carried out: a turn may have 8 calls")


def test_a_window_of_attention_sees_what_it_should_whatever_prompts_share(tmp_path):
    """Padding behind a shared beginning would stand in the window."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=16,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    windowed = HFEngine(model, tiny_tokenizer(), batch_size=4)
    start = [*range(50, 62)]
    asked = [[*start, *range(70, 70 + extra)] for extra in (1, 9, 20, 3)]
    for prompt, seen in zip(
        asked,
        windowed.generate(asked, SamplingOptions(max_completion_length=9), seed=0),
        strict=True,
    ):
        right = logprobs_of_the_whole(windowed, prompt, seen)
        torch.testing.assert_close(torch.tensor(seen.logprobs), right, rtol=0, atol=1e-4)


def test_layers_without_keys_and_values_are_refused_at_once(engine, monkeypatch):
    monkeypatch.setattr(
        engine.model.config, "layer_types", ["linear_attention", "full_attention"], raising=False
    )
    with pytest.raises(InputError, match="linear_attention keep no keys and values"):
        HFEngine(engine.model, engine.tokenizer)


def test_a_date_is_a_seed(engine):
    options = SamplingOptions(max_completion_length=3)
    first = engine.generate([[5]], options, seed=20261125 * 1_000_003)
    assert first == engine.generate([[5]], options, seed=20261125 * 1_000_003)


def test_limits_of_tools(engine, scripted):
    scripted(lambda number: [CALL] * 9)
    asked = prompts(engine)[:1]
    options = SamplingOptions(
        max_completion_length=900, max_tool_calling_iterations=2, max_tool_tokens=10
    )
    [seen] = engine.generate(asked, options, seed=0, tools=lambda _number: Echo())
    assert (seen.end, len(seen.tool_calls)) == ("tool_limit", 2)
    told = engine.tokenizer.decode(
        [i for i, wrote in zip(seen.ids, seen.wrote, strict=True) if not wrote]
    )
    assert "tokens are left out ...]" in told
    assert seen.tool_calls[0].output not in told


def test_what_is_no_call_is_told_to_the_model(engine, scripted):
    scripted(lambda number: ["<tool_call>{oops</tool_call>", '<tool_call>{"a": 1}', "end"])
    [seen] = engine.generate(
        prompts(engine)[:1],
        SamplingOptions(max_completion_length=200),
        seed=0,
        tools=lambda _number: Echo(),
    )
    assert [(c.name, c.ok) for c in seen.tool_calls] == [("", False)] * 2
    assert seen.tool_calls[0].output.startswith("the call is not JSON")
    assert seen.tool_calls[1].output.startswith('a call is {"name": ...')


def test_a_fault_of_the_machine_in_a_tool_ends_the_rollout(engine, scripted):
    scripted(lambda number: [CALL, "a"])

    def broken():
        raise MachineError("the disk is full")

    with pytest.raises(MachineError, match="the disk is full"):
        engine.generate(
            prompts(engine)[:2],
            SamplingOptions(max_completion_length=99),
            seed=0,
            tools=lambda _number: Echo(broken),
        )


def test_a_template_without_tools_is_refused(engine, monkeypatch):
    template = engine.tokenizer.chat_template.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="does not write messages of the role 'tool'"):
        engine.generate([[5]], SamplingOptions(), seed=0, tools=lambda _number: Echo())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_prompts_share_passes_once_and_changes_nothing(tmp_path, kind):
    """A common beginning, prompts that are attempted several times, one that is a prefix."""
    model, tokenizer = load_model(save_tiny_model(tmp_path, kind=kind))
    engine = HFEngine(model, tokenizer, batch_size=4)
    start = [*range(50, 90)]
    asked = [[*start, *end] for end in ([7], [8, 9, 10, 11], [12, 13], [7], [7], [8, 9, 10, 11])]
    asked.append(start)
    passed = []

    def count(module, args, kwargs):
        passed.append(kwargs["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    options = SamplingOptions(max_completion_length=10)
    seen = engine.generate(asked, options, seed=4)
    hook.remove()
    assert passed[0] == len(start) - 1
    assert max(passed[1:]) < len(start)  # the beginning passed once
    assert passed[1] == 3 * 5  # three prompts that differ, of five tokens at most
    for prompt, trajectory in zip(asked, seen, strict=True):
        right = torch.tensor(trajectory.logprobs)
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *trajectory.ids]])
            logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(trajectory.ids)[:, None])[:, 0]
        torch.testing.assert_close(right, expected, rtol=0, atol=1e-4)
    assert seen[0].ids != seen[3].ids, "attempts at one prompt draw from one random stream"
    alone = engine.generate(asked[:1], options, seed=4)
    assert alone[0].ids == seen[0].ids
