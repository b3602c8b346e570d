"""Sampling with `generate`: the ids that come back are the ids that were sampled, all of them."""

import copy

import pytest
import torch

from fdfast.models import load_model
from fdfast.rollout import HFEngine, SamplingOptions
from tests.tiny import save_tiny_model


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


def test_where_an_answer_stopped_takes_few_looks(engine):
    """A look at each length would decode 8,192 tokens 8,192 times."""
    ids = engine.tokenizer("x" * 2000).input_ids + engine.tokenizer("END and more").input_ids
    looks = []

    class Counting:
        def decode(self, ids, **options):
            looks.append(len(ids))
            return engine.tokenizer.decode(ids, **options)

    counted = HFEngine(engine.model, engine.tokenizer)
    counted.tokenizer = Counting()
    stopped = counted._stopped_at(ids, ["END"])
    assert "END" in engine.tokenizer.decode(ids[:stopped])
    assert "END" not in engine.tokenizer.decode(ids[: stopped - 1])
    assert len(looks) <= 2 + len(ids).bit_length()
    assert counted._stopped_at(ids, ["NEVER"]) is None
