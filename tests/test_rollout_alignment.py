"""Ids trained are ids sampled: from the engine through the trainer's trees to the loss.

Real chat templates, turns with tool calls, and token sequences that no tokenizer would write.
"""

import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from fdfast.data.problems import Problem, questions_path
from fdfast.lean.tools import ToolResult
from fdfast.losses import FeedbackDistillationLoss
from fdfast.models import hidden_states, lm_head, load_model
from fdfast.policy_head import policy_head
from fdfast.rollout import HFEngine, SamplingOptions
from fdfast.rollout.sampling import sample
from fdfast.rollout.tool_turns import ToolTurns
from fdfast.trainer.batch import Attempt, Prompts
from fdfast.trainer.config_file import make_config
from fdfast.trainer.scoring import Scorer, packs, trees
from fdfast.types import TeacherHidden
from tests.templates import CALLS, end_ids_of, tokenizer_of

KINDS = ["smollm2", "qwen3", "qwen3_5", "llama3_1"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_base = pytest.mark.parametrize("base", ["tiny", "smollm2"])
LEAN = "theorem t (x : β) : ∀ ε > 0, ∃ δ, ‖x‖ ≤ δ := by simp ⟨h₁, fun _ ↦ rfl⟩"
# A joined and a toned emoji, a combining mark, right to left, and whatever else there is.
GRAPHEMES = ["\U0001f469\u200d\U0001f52c", "\U0001f44d\U0001f3fd", "e\u0301", "\u05d0\u05d1", "\n"]


def texts(size):
    grapheme = st.sampled_from([*LEAN, *GRAPHEMES]) | st.characters(exclude_categories=["Cs"])
    return st.lists(grapheme, max_size=size).map("".join)


@functools.cache
def engine_of(kind, base="tiny", architecture="llama"):
    """A tiny model, as wide as the tokenizer, with its template; not to be changed."""
    tokenizer = tokenizer_of(kind, base)
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[architecture](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_ids_of(kind, base),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # as in tests/tiny.py: prompts should matter
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    return HFEngine(model, tokenizer, batch_size=3)


class Says:
    """Tools that answer with the given texts, one after the other."""

    def __init__(self, texts):
        self.texts, self.schemas = list(texts), []

    def call(self, name, arguments):
        return ToolResult(self.texts.pop(0), 0.0, ok=True)


def generate(engine, prompts, turns, outputs, **options):
    """Trajectories of a model that writes the given ids, then what it samples itself."""
    left = {number: list(ids) for number, ids in enumerate(turns)}

    def scripted(logits_BV, options, generators):
        tokens, logprobs = sample(logits_BV, options, generators)
        for row, generator in enumerate(generators):
            if script := left[generator.initial_seed() % 1_000_003]:
                tokens[row] = script.pop(0)
        return tokens, logprobs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fdfast.rollout.hf.sample", scripted)
        return engine.generate(
            prompts,
            SamplingOptions(**{"max_completion_length": sum(map(len, turns))} | options),
            seed=0,
            tools=lambda number: Says(outputs[number]),
        )


def pieces(draw, tokenizer, text):
    """A text in tokens as no tokenizer cuts it, character by character here and there."""
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=4)))
    bounds = [0, *cuts, len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
    return [i for part in parts for i in tokenizer(part, add_special_tokens=False).input_ids]


# A turn of Qwen3.5 begins in thinking.
THOUGHT = {"qwen3_5": "so\n</think>\n\n"}


@st.composite
def scripts(draw, kind, base, *, stop):
    """What a model writes: up to two turns that end in a call, and a last one of any tokens."""
    tokenizer, ends = tokenizer_of(kind, base), end_ids_of(kind, base)
    turns = []
    for _ in range(draw(st.integers(0, 2))):
        text = THOUGHT.get(kind, "") + CALLS[kind] % draw(texts(6))
        turns += pieces(draw, tokenizer, text) + ([] if stop else [draw(st.sampled_from(ends))])
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder))
    # Single bytes among them: characters that are cut, and what is no UTF-8 at all.
    turns += draw(st.lists(st.sampled_from(ordinary[:300]), max_size=8))
    turns += pieces(draw, tokenizer, draw(texts(12)))
    return [*turns, ends[0]] if not turns or draw(st.booleans()) else turns


@functools.cache
def config():
    return make_config(
        {
            "model_name_or_path": "tiny",
            "task": "chat",
            "dataset": str(questions_path()),
            "dataset_split": "",
            "feedback.source": "constant",
            "feedback.text": "Be concise.",
            "teacher_top_k": 0,
            "max_pass_tokens": 16384,  # one pass
        }
    )


def attempts_of(engine, problems, feedbacks, turns, outputs, **options):
    """The engine's trajectories as the trainer holds them."""
    prompts = Prompts(engine.tokenizer, config())
    asked = [prompts.student(problem) for problem in problems]
    seen = generate(engine, asked, turns, outputs, **options)
    return [
        Attempt(problem, trajectory, prompts.teacher(problem, feedback)[0], feedback)
        for problem, trajectory, feedback in zip(problems, seen, feedbacks, strict=True)
    ]


def scorer_of(model, teacher):
    return Scorer(config(), model, teacher, FeedbackDistillationLoss())


def trees_of(attempts, model):
    """The student's tree and the teacher's, from the trainer."""
    [pack] = packs(attempts, config().model.max_pass_tokens)
    return trees(pack)


def context(tree, row):
    """All that the hidden state of one target depends on, by what the tree says of itself."""
    place = tree.logits_index[row]
    seen = (torch.arange(tree.num_tokens) <= place) & (place < tree.kv_end)
    assert torch.equal(tree.position_ids[seen], torch.arange(int(seen.sum())))
    return tree.input_ids[seen].tolist()


def assert_targets_are_what_was_written(tree, prompts, attempts):
    rows = [
        (target, [*prompt, *attempt.completion.ids[:place]])
        for prompt, attempt in zip(prompts, attempts, strict=True)
        for place, target in enumerate(attempt.completion.ids)
        if attempt.completion.wrote[place]
    ]
    assert tree.target_ids.tolist() == [target for target, _ in rows]
    for row, (_, before) in enumerate(rows):
        assert context(tree, row) == before


def assert_told_is_what_the_template_writes(engine, kind, trajectory):
    turns = ToolTurns(engine.tokenizer, engine.end_ids)
    told = [False] * len(trajectory.ids)
    for position in sorted({call.position for call in trajectory.tool_calls}):
        calls = [call for call in trajectory.tool_calls if call.position == position]
        ended = trajectory.ids[position - 1] in engine.end_ids
        ids = turns.ids(calls, ended=ended, max_tokens=SamplingOptions.max_tool_tokens)
        assert trajectory.ids[position : position + len(ids)] == ids
        told[position : position + len(ids)] = [True] * len(ids)
    assert trajectory.wrote == [not flag for flag in told]


@each_base
@each_kind
@settings(max_examples=8)
@given(data=st.data())
def test_what_was_sampled_is_what_is_trained(kind, base, data):
    """The script is what the sampler drew: to the tree no id of it is changed, added or lost."""
    engine = engine_of(kind, base)
    stop = CALLS[kind].endswith("</tool_call>") and data.draw(st.booleans())
    turns = [data.draw(scripts(kind, base, stop=stop)) for _ in range(3)]
    text = texts(9)
    outputs = [[data.draw(text) for _ in range(3)] + ["."] * 9 for _ in turns]
    first, second = (Problem(name, LEAN + data.draw(text)) for name in "ab")
    feedbacks = [data.draw(text) for _ in turns]
    attempts = attempts_of(
        engine,
        [first, first, second],
        feedbacks,
        turns,
        outputs,
        max_completion_length=max(map(len, turns)),
        stop_strings=("</tool_call>",) if stop else (),
    )
    for script, attempt in zip(turns, attempts, strict=True):
        seen = attempt.completion
        written = [i for i, wrote in zip(seen.ids, seen.wrote, strict=True) if wrote]
        # Shorter where a limit, longer where the model went on by itself.
        assert written[: len(script)] == script[: len(written)]
        assert len(written) >= len(script) or seen.end != "length"
        assert_told_is_what_the_template_writes(engine, kind, seen)
    student, teacher = trees_of(attempts, engine.model)
    assert_targets_are_what_was_written(
        student, [a.completion.prompt_ids for a in attempts], attempts
    )
    assert_targets_are_what_was_written(teacher, [a.teacher_prompt_ids for a in attempts], attempts)


@each_base
@each_kind
def test_tokens_that_no_tokenizer_would_write_survive(kind, base):
    """Decoded and encoded again they would be others, and half a parrot would be U+FFFD."""
    engine = engine_of(kind, base)
    tokenizer = engine.tokenizer
    call = [
        token
        for character in THOUGHT.get(kind, "") + CALLS[kind] % "a theorem"
        for token in tokenizer(character, add_special_tokens=False).input_ids
    ]
    parrot = tokenizer("🦜", add_special_tokens=False).input_ids
    assert len(parrot) > 1
    script = [*call, end_ids_of(kind, base)[0], *parrot[:-1], *parrot[1:]]
    assert tokenizer(tokenizer.decode(script), add_special_tokens=False).input_ids != script
    problem = Problem("a", LEAN)
    attempts = attempts_of(engine, [problem], ["Go."], [script], [["🦜 <|im_end|>"]])
    [seen] = [a.completion for a in attempts]
    assert [i for i, wrote in zip(seen.ids, seen.wrote, strict=True) if wrote] == script
    assert [call.name for call in seen.tool_calls] == ["echo"]
    for tree in trees_of(attempts, engine.model):
        assert tree.target_ids.tolist() == script


def divergence_of(attempts, student, teacher):
    """For each trained token, from the hidden states of the trainer's two trees."""
    ours, its = trees_of(attempts, student)
    head, teacher_head = lm_head(student), lm_head(teacher)
    with torch.no_grad():
        hidden = TeacherHidden(hidden_states(teacher, its), teacher_head.weight)
        return policy_head(
            hidden_states(student, ours), head.weight, ours.target_ids, teacher=hidden
        ).divergence


def one_by_one(attempts, model):
    """The last hidden states of the trained tokens: each attempt alone, by transformers."""
    rows = []
    for attempt in attempts:
        prompt, seen = attempt.teacher_prompt_ids, attempt.completion
        with torch.no_grad():
            hidden = model.model(torch.tensor([[*prompt, *seen.ids]])).last_hidden_state[0]
        rows.append(hidden[len(prompt) - 1 : -1][torch.tensor(seen.wrote)])
    return torch.cat(rows)


def multi_turn(engine, kind, feedback, *, tokens=260):
    """Two attempts at one problem and one at another: a call, maybe another, and then what the
    model itself samples.
    """
    tokenizer, end = engine.tokenizer, engine.end_ids[0]
    call = tokenizer(THOUGHT.get(kind, "") + CALLS[kind] % "y", add_special_tokens=False).input_ids
    outputs = [["Main.lean:1:2: error ⊢ False", "a second error"], ["no error"], ["ok", "x"]]
    turns = [[*call, end] * len(said) for said in outputs]
    problems = [Problem("a", LEAN), Problem("a", LEAN), Problem("b", "Why?")]
    attempts = attempts_of(
        engine, problems, [feedback] * 3, turns, outputs, max_completion_length=tokens
    )
    for attempt, said in zip(attempts, outputs, strict=True):
        # By chance the model may sample a mark of a call, too.
        assert [call.output for call in attempt.completion.tool_calls][: len(said)] == said
        assert any(attempt.completion.wrote)
        assert not all(attempt.completion.wrote)
    return attempts


each_model = pytest.mark.parametrize(
    ("kind", "architecture"),
    [("smollm2", "llama"), ("llama3_1", "llama"), ("qwen3", "qwen3"), ("qwen3_5", "qwen3")],
)


@each_model
def test_without_feedback_no_trained_token_diverges(kind, architecture):
    engine = engine_of(kind, architecture=architecture)
    teacher = copy.deepcopy(engine.model)
    attempts = multi_turn(engine, kind, "")
    assert_no_token_diverges(attempts, engine.model, teacher)
    assert all(a.teacher_prompt_ids == a.completion.prompt_ids for a in attempts)
    totals = scorer_of(engine.model, teacher).score(attempts, backward=False)
    assert abs(totals["kl"]) <= 1e-6
    assert totals["num_tokens"] == sum(a.completion.num_sampled for a in attempts)
    # With feedback the same measure is far from 0: it does see the teacher's prompt.
    told = [
        dataclasses.replace(
            a, teacher_prompt_ids=Prompts(engine.tokenizer, config()).teacher(a.problem, "No.")[0]
        )
        for a in attempts
    ]
    divergence = divergence_of(told, engine.model, teacher)
    assert divergence.min() > 1e-5
    assert divergence.mean() > 1e-3


def assert_no_token_diverges(attempts, student, teacher):
    divergence = divergence_of(attempts, student, teacher)
    assert divergence.shape == (sum(a.completion.num_sampled for a in attempts),)
    assert divergence.abs().max() <= 1e-6
    # Nor from what transformers says of each attempt alone: no packing, no shared prefix.
    tree, _ = trees_of(attempts, student)
    with torch.no_grad():
        apart = policy_head(
            hidden_states(student, tree),
            lm_head(student).weight,
            tree.target_ids,
            teacher=TeacherHidden(one_by_one(attempts, teacher), lm_head(teacher).weight),
        ).divergence
    assert apart.abs().max() <= 1e-6


@each_model
def test_with_feedback_the_teacher_reads_the_same_response(kind, architecture):
    engine = engine_of(kind, architecture=architecture)
    attempts = multi_turn(engine, kind, "Use simp, and read the error.")
    student, teacher = trees_of(attempts, engine.model)
    assert torch.equal(student.target_ids, teacher.target_ids)
    assert_targets_are_what_was_written(
        student, [a.completion.prompt_ids for a in attempts], attempts
    )
    assert_targets_are_what_was_written(teacher, [a.teacher_prompt_ids for a in attempts], attempts)
    for attempt in attempts:
        assert attempt.teacher_prompt_ids != attempt.completion.prompt_ids
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(engine.model, teacher), one_by_one(attempts, engine.model)
        )


@each_model
def test_the_teacher_attends_to_what_tools_said(kind, architecture):
    """A token of an output that changes moves all that is trained after it, and nothing before."""
    engine = engine_of(kind, architecture=architecture)
    [attempt, *_] = multi_turn(engine, kind, "Use simp.")
    seen = attempt.completion
    places = [place for place, wrote in enumerate(seen.wrote) if not wrote]
    trained = [place for place, wrote in enumerate(seen.wrote) if wrote]

    def teacher_states(ids):
        changed = dataclasses.replace(attempt, completion=dataclasses.replace(seen, ids=ids))
        _, tree = trees_of([changed], engine.model)
        with torch.no_grad():
            return tree.target_ids, hidden_states(engine.model, tree)

    targets, before = teacher_states(seen.ids)
    for place in (places[0], places[len(places) // 2], places[-1]):
        ids = [*seen.ids[:place], (seen.ids[place] + 1) % 200 + 5, *seen.ids[place + 1 :]]
        same_targets, after = teacher_states(ids)
        assert torch.equal(same_targets, targets), "what a tool said is no target"
        moved = (after - before).abs().amax(-1)
        later = torch.tensor(trained) > place
        assert later.any()
        assert (moved[later] > 1e-5).all()
        assert (moved[~later] == 0).all()


@pytest.mark.slow
def test_smollm2_does_not_diverge_from_itself():
    """The demo's model, its own template and what it samples itself, in float32."""
    model, tokenizer = load_model("demo")
    engine = HFEngine(model.eval(), tokenizer)
    attempts = multi_turn(engine, "smollm2", "", tokens=180)
    assert_no_token_diverges(attempts, model, copy.deepcopy(model))
