"""Feedback by the model itself, and what the trainer makes of feedback that fails."""

import dataclasses

import peft
import pytest
import torch

from fdfast.data.jsonl import Theorem
from fdfast.data.problems import Problem, questions_path
from fdfast.errors import InputError, MachineError
from fdfast.feedback import AdapterEngine, FeedbackItem, SelfFeedback
from fdfast.lean import Verdict
from fdfast.models import load_model
from fdfast.rollout import HFEngine, SamplingOptions, Trajectory
from fdfast.trainer import load_config, train
from fdfast.trainer.batch import Prompts
from fdfast.trainer.config_file import make_config
from fdfast.trainer.feedback import make_provider
from fdfast.trainer.metrics import read_jsonl
from tests.chat_server import GOOD, Reply, chat_server, completion
from tests.tiny import save_tiny_model, tiny_tokenizer

THEOREM = Theorem("t", "train", "theorem t (a : Prop) (h : a) : a :=", "", "", "h")
ITEM = FeedbackItem(Problem("t", THEOREM.formal_statement, THEOREM), "x", Verdict("failed"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


class Scripted:
    """An engine that says what it is told to, call by call, and remembers what it was asked."""

    def __init__(self, *calls):
        self.calls, self.asked, self.seeds = list(calls), [], []

    def generate(self, prompts, options, *, seed):
        self.asked.append(prompts)
        self.seeds.append(seed)
        texts = self.calls.pop(0)
        ends = ["length" if text == "cut" else "stop" for text in texts]
        return [
            Trajectory([5, 6], [-1.0] * 2, [True] * 2, text, end)
            for text, end in zip(texts, ends, strict=True)
        ]


def own(engine, **values):
    return SelfFeedback(engine, tiny_tokenizer(), SamplingOptions(), **values)


def test_the_model_is_asked_again_only_about_what_broke_a_rule():
    engine = Scripted([GOOD, "Use h.", "cut"], [f"<think>so</think>{GOOD}", "cut"])
    provider = own(engine)
    items = [dataclasses.replace(ITEM, attempt=f"x {i}") for i in range(3)]
    assert provider.feedback_many(items) == [GOOD, GOOD, None]
    assert [len(prompts) for prompts in engine.asked] == [3, 2]
    again = provider.tokenizer.decode(engine.asked[1][0])
    assert "Use h." in again
    assert 'it does not begin with "1."' in again
    counters = provider.counters
    assert (counters.requests, counters.refused, counters.failed) == (5, 3, 1)
    assert counters.completion_tokens == 10
    assert provider.last_failure.endswith("it was cut off at its length limit")


def test_the_same_attempts_are_sampled_with_the_same_seed():
    """So a resumed run gets the feedback that it would have got."""
    engine = Scripted([GOOD], [GOOD], [GOOD], [GOOD])
    provider = own(engine)
    for item in (ITEM, ITEM, dataclasses.replace(ITEM, attempt="y")):
        provider.feedback_many([item])
    own(engine, seed=1).feedback_many([ITEM])
    one, same, other, reseeded = engine.seeds
    assert one == same
    assert len({one, other, reseeded}) == 3


def test_a_long_attempt_loses_its_middle_until_its_prompt_fits():
    engine = Scripted([GOOD], [GOOD])
    provider = own(engine)
    provider.feedback_many([ITEM])
    room = len(engine.asked[0][0]) + 200
    provider.max_prompt_length = room
    long = dataclasses.replace(ITEM, attempt="begin " + "x = y, " * 3000 + " end")
    assert provider.feedback_many([long]) == [GOOD]
    (ids,) = engine.asked[1]
    said = provider.tokenizer.decode(ids)
    assert len(ids) <= room
    assert "begin" in said
    assert "end\n</attempt>" in said
    assert THEOREM.formal_statement in said
    provider.max_prompt_length = 50
    assert provider.feedback_many([ITEM]) == [None]
    assert "50 is the limit" in provider.last_failure
    assert len(engine.asked) == 2


def test_a_model_without_a_chat_template_is_one_line():
    with pytest.raises(InputError, match="wants a model with a chat template"):
        SelfFeedback(Scripted(), tiny_tokenizer(chat_template=None), SamplingOptions())


def test_a_real_model_is_asked_and_its_nonsense_refused(tiny):
    model, tokenizer = load_model(tiny)
    options = SamplingOptions(max_completion_length=4)
    provider = SelfFeedback(HFEngine(model, tokenizer), tokenizer, options)
    assert provider.feedback_many([ITEM, ITEM]) == [None, None]
    assert provider.counters.requests == 4


@pytest.mark.filterwarnings("ignore::FutureWarning:peft.*", "ignore:.*is_gradient:FutureWarning")
def test_a_second_adapter_speaks_and_the_first_is_trained_as_before(tiny):
    model, tokenizer = load_model(tiny)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora, adapter_name="student")
    model.add_adapter("judge", lora)
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)  # as one who trains some layers alone does
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    engine = HFEngine(model, tokenizer)
    prompts, options = [[1, 5, 6]] * 2, SamplingOptions(max_completion_length=12, temperature=0)
    mine = engine.generate(prompts, options, seed=0)
    judged = AdapterEngine(engine, "judge").generate(prompts, options, seed=0)
    assert mine != judged
    assert model.active_adapter == "student"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert engine.generate(prompts, options, seed=0) == mine
    with pytest.raises(InputError, match="adapter must be one of student, judge; got 'critic'"):
        AdapterEngine(engine, "critic")
    with pytest.raises(InputError, match=r"adapter must be one of \(none\)"):
        AdapterEngine(HFEngine(load_model(tiny)[0], tokenizer), "judge")


# The trainer.


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def settings(tiny, folder, **values):
    defaults = {
        "model_name_or_path": str(tiny),
        "output_dir": str(folder),
        "task": "chat",
        "dataset": str(questions_path()),
        "dataset_split": "",
        "prompts_per_step": 3,
        "max_completion_length": 8,
        "teacher_top_k": 0,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "max_steps": 2,
        "save_steps": 1,
        "save_final_model": False,
    }
    return make_config(defaults | values)


def llm(server, **values):
    return {
        "feedback.source": "llm",
        "feedback.base_url": server.base_url,
        "feedback.model": "judge",
        "feedback.api_key_env": "",
        "feedback.max_retries": 0,
    } | values


def test_a_run_with_an_llms_feedback_trains_and_counts(tiny, tmp_path):
    with chat_server(lambda *_: Reply(completion(GOOD))) as server:
        values = llm(server, feedback_prices_usd=(1.0, 2.0))
        rows = train(settings(tiny, tmp_path / "run", **values), quiet=True)
    assert all(row["kl"] > 0 for row in rows)
    assert [row["feedback/requests"] for row in rows] == [3, 3]
    assert rows[0]["feedback/cost_usd"] == pytest.approx(3 * (100 + 80) / 1e6)
    assert rows[0]["feedback/skipped_ratio"] == 0
    attempts = read_jsonl(tmp_path / "run" / "attempts.jsonl")
    assert {a["feedback"] for a in attempts} == {GOOD}


def test_a_skipped_attempt_is_left_out_of_the_step_and_counted(tiny, tmp_path):
    """The step is the step of the other attempts alone."""

    def one_fails(number, request):
        return Reply(status=400) if number == 0 else Reply(completion(GOOD))

    with chat_server(one_fails) as server:
        values = llm(server, feedback_max_concurrency=1, max_steps=1, num_generations=2)
        (row,) = train(settings(tiny, tmp_path / "run", **values), quiet=True)
    attempts = read_jsonl(tmp_path / "run" / "attempts.jsonl")
    told = [a for a in attempts if a["feedback"] is not None]
    assert (len(attempts), len(told)) == (6, 5)
    assert row["feedback/skipped_ratio"] == pytest.approx(1 / 6)
    assert row["num_tokens"] == sum(len(a["ids"]) for a in told)
    assert row["feedback/failed"] == 1


def test_a_step_without_any_feedback_is_one_line_and_the_finished_steps_stay(tiny, tmp_path):
    def stops(number, request):
        return Reply(completion(GOOD)) if number < 3 else Reply(b"gone", status=500)

    with chat_server(stops) as server:
        config = settings(tiny, tmp_path / "run", **llm(server))
        with pytest.raises(MachineError, match="step 2: feedback 'llm' failed for all 3") as error:
            train(config, quiet=True)
        assert "HTTP 500: gone" in str(error.value)
        assert "\n" not in str(error.value)
        server.script = lambda *_: Reply(completion(GOOD))
        assert [r["step"] for r in train(config, resume=True, quiet=True)] == [1, 2]


def test_the_constant_steps_in_where_the_model_itself_fails(tiny, tmp_path):
    """A random model never keeps the rules, so every feedback is the other provider's."""
    config = settings(
        tiny, tmp_path / "run", feedback_source="self", feedback_on_failure="constant",
        feedback_text="Be concise.", feedback_max_tokens=4,
    )  # fmt: skip
    rows = train(config, quiet=True)
    assert [r["feedback/fallback"] for r in rows] == [3, 3]
    assert {a["feedback"] for a in read_jsonl(tmp_path / "run" / "attempts.jsonl")} == {
        "Be concise."
    }


@pytest.mark.parametrize(
    ("who", "is_initial", "is_the_teacher"),
    [("initial", False, False), ("initial", True, True), ("teacher", False, True)],
)
def test_self_is_the_initial_model_unless_the_teacher_is_asked_for(
    tiny, tmp_path, who, is_initial, is_the_teacher
):
    """A frozen teacher is the initial model: no second copy then."""
    config = settings(tiny, tmp_path, feedback_source="self", feedback_self_model=who)
    teacher, tokenizer = load_model(tiny)
    provider = make_provider(config, teacher, tokenizer, is_initial=is_initial)
    assert (provider.engine.model is teacher) == is_the_teacher
    for mine, theirs in zip(provider.engine.model.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_missing_key_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    config = settings(
        "no/such/model", tmp_path / "run", feedback_source="llm", feedback_model="judge",
        feedback_base_url="http://127.0.0.1:1/v1", feedback_api_key_env="MY_KEY",
    )  # fmt: skip
    with pytest.raises(InputError, match="environment variable MY_KEY holds no key"):
        train(config, quiet=True)


SELF = ["feedback.source=self"]
ENDPOINT = ["feedback_base_url=http://localhost:8000/v1", "feedback_model=m"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["feedback.source=llm"], "wants feedback.model"),
        (["feedback.source=llm", "feedback_model=m"], "wants feedback.base_url"),
        (["feedback.on_failure=llm"], "'verifier' never fails; got 'llm'"),
        (["feedback.on_failure=later"], "feedback.on_failure must be one of skip, .*; got 'later'"),
        (
            ["feedback.source=self", "feedback_on_failure=self"],
            "another source than feedback; got 'self'",
        ),
        (
            ["feedback.source=self", "feedback_on_failure=constant"],
            "'constant' wants feedback.text",
        ),
        (["feedback.source=self", "feedback_on_failure=llm"], "wants feedback.model"),
        (
            ["feedback.source=self", "task=chat", "feedback_on_failure=verifier"],
            "feedback 'verifier' wants task 'lean'",
        ),
        (["feedback.source=llm", *ENDPOINT, "feedback_budget_usd=5"], "wants feedback.prices_usd"),
        (["feedback_prices_usd=[-1, 2]"], r"must be two numbers, not negative; got \(-1"),
        (["feedback_prices_usd=[1]"], "feedback.prices_usd"),
        (["feedback_timeout_s=0"], "feedback.timeout_s must be positive"),
        (["feedback_max_concurrency=0"], "feedback.max_concurrency must be at least 1"),
        (["feedback_budget_tokens=-1"], "feedback.budget_tokens must not be negative"),
        (["feedback_position=middle"], "feedback.position: Input should be 'end' or 'start'"),
        (["feedback_template={prompt}"], r"feedback.template must contain \{feedback\}"),
    ],
)
def test_a_wrong_feedback_setting_is_one_line(words, line):
    with pytest.raises(InputError, match=line) as caught:
        load_config(None, words)
    assert "\n" not in str(caught.value)


# The teacher's prompt.


@pytest.mark.parametrize(
    ("values", "turn"),
    [
        ({"feedback.source": "constant"}, "Why?\n\nDo so."),
        ({"feedback.source": "constant", "feedback.position": "start"}, "Do so.\n\nWhy?"),
        ({"feedback.source": "self"}, "Why?\n\nKeep to these instructions:\nDo so."),
        (
            {"feedback.source": "self", "feedback.position": "start"},
            "Keep to these instructions:\nDo so.\n\nWhy?",
        ),
        (
            {
                "feedback.source": "self",
                "feedback.template": "Hint: {feedback}\n{prompt} {feedback}",
            },
            "Hint: Do so.\nWhy? Do so.",
        ),
    ],
)
def test_the_teachers_turn_has_its_sources_words_at_the_position_asked(tmp_path, values, turn):
    tokenizer = tiny_tokenizer()
    config = settings("x", tmp_path, feedback_text="Do so.", **values)
    ids, clipped = Prompts(tokenizer, config).teacher(Problem("p", "Why?"), "Do so.")
    assert not clipped
    assert tokenizer.decode(ids).startswith(f"<|im_start|>user\n{turn}<|im_end|>")


@pytest.mark.parametrize("preset", ["demo_concise", "demo_lean"])
def test_the_demos_keep_their_words(preset):
    """Their numbers in the README were measured with the feedback in front."""
    prompts = Prompts(tiny_tokenizer(), load_config(None, [], preset=preset))
    assert prompts.teacher_template == "{feedback}\n\n{prompt}"


@pytest.mark.parametrize("limit", range(10, 16))  # some of them cut within a character
@pytest.mark.parametrize("position", ["end", "start"])
def test_truncation_takes_from_the_feedback_and_never_from_the_statement(tmp_path, position, limit):
    tokenizer = tiny_tokenizer()
    config = settings(
        "x", tmp_path, feedback_source="self", feedback_position=position, max_feedback_length=limit
    )
    statement = "Why? " * 200
    ids, clipped = Prompts(tokenizer, config).teacher(Problem("p", statement), "ä→ " * 300)
    said = tokenizer.decode(ids)
    assert clipped
    assert statement.strip() in said
    assert "[...]" in said
    assert "\ufffd" not in said


def test_the_wrong_attempt_is_not_quoted_to_the_teacher(tiny, tmp_path, monkeypatch):
    """Nor is anything else that the feedback's writer was shown."""
    seen, teacher = [], Prompts.teacher

    def spy(self, problem, feedback):
        ids, clipped = teacher(self, problem, feedback)
        seen.append(self.tokenizer.decode(ids))
        return ids, clipped

    monkeypatch.setattr(Prompts, "teacher", spy)
    with chat_server(lambda *_: Reply(completion(GOOD))) as server:
        train(settings(tiny, tmp_path / "run", max_steps=1, **llm(server)), quiet=True)
    attempts = read_jsonl(tmp_path / "run" / "attempts.jsonl")
    assert len(seen) == len(attempts) == 3
    for attempt, prompt in zip(attempts, seen, strict=True):
        assert attempt["completion"] not in prompt
        assert GOOD in prompt
