"""Problems in, checked trajectories out: real Lean for tools and verdicts, scripted turns."""

import dataclasses
import json

import pytest

from fdfast.data.jsonl import Theorem
from fdfast.data.problems import Problem
from fdfast.errors import MachineError
from fdfast.lean import LeanPool, find_lean
from fdfast.models import load_model
from fdfast.rollout import HFEngine, SamplingOptions, Toolboxes, generate
from fdfast.rollout.judge import submissions
from tests.scripted import script
from tests.tiny import save_tiny_model

STATEMENT = "theorem swap (p q : Prop) (h : And p q) : And q p :="
SWAP = Problem("swap", STATEMENT, Theorem("swap", "", STATEMENT, "", "", ""))
QUESTION = Problem("sky", "Why is the sky blue?")
PROOF = "And.intro h.right h.left"


@pytest.fixture(scope="module")
def lean():
    with LeanPool(workers=2, toolchain=find_lean(backend="embedded")) as pool:
        yield pool


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model, tokenizer = load_model(save_tiny_model(tmp_path_factory.mktemp("tiny")))
    model.config.max_position_embeddings = 4096
    return HFEngine(model, tokenizer, batch_size=2)


def call(name, **arguments):
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def write(path, text):
    return call("write_file", path=path, content=text)


@pytest.fixture
def attempted(engine, lean, monkeypatch):
    """Attempts at SWAP that write these turns."""

    def run(*scripts, problems=None):
        script(monkeypatch, engine.tokenizer, engine.end_ids[0], lambda number: scripts[number])
        with Toolboxes(lean) as toolboxes:
            return generate(
                problems or [SWAP] * len(scripts),
                engine,
                SamplingOptions(max_completion_length=2000),
                toolboxes,
                prompt=lambda problem: engine.tokenizer(problem.prompt).input_ids,
                lean=lean,
            )

    return run


def test_a_file_that_was_written_proves_the_theorem_whatever_is_said_after(attempted):
    file = (
        f"theorem help (p q : Prop) (h : And p q) : q := h.right\n{STATEMENT} ⟨help p q h, h.1⟩\n"
    )
    wrong = file.replace("h.1", "h.2")
    good, bad, fenced, plain = attempted(
        [write("Main.lean", file), call("check_file", path="Main.lean"), "Done, see Main.lean."],
        [write("Main.lean", wrong), "It is proved."],
        [write("Main.lean", wrong), f"```lean\n{file}```"],
        [PROOF],
    )
    assert good.verdict.proved, good.verdict
    assert "help" in good.proof
    assert [c.ok for c in good.tool_calls] == [True, True]
    assert "0 errors" in good.tool_calls[1].output
    assert bad.verdict.kind == "failed"
    assert "h.2" in bad.proof
    assert fenced.verdict.proved
    assert plain.verdict.proved
    assert plain.proof == PROOF
    assert not plain.tool_calls


def test_each_trajectory_has_files_of_its_own(attempted):
    mine, others = attempted(
        [write("Main.lean", f"{STATEMENT} {PROOF}"), "done"],
        [call("check_file", path="Main.lean"), "sorry"],
    )
    assert mine.verdict.proved
    assert not others.tool_calls[0].ok
    assert "Main.lean" in others.tool_calls[0].output
    assert others.verdict.kind == "rejected"


def test_a_toolbox_begins_empty_each_time_and_leaves_no_folder(engine, lean, monkeypatch):
    turns = [[write("Main.lean", f"{STATEMENT} {PROOF}"), "done"], ["no idea"]]
    script(monkeypatch, engine.tokenizer, engine.end_ids[0], lambda number: turns[0])
    with Toolboxes(lean) as boxes:
        for right in (True, False):
            [seen] = generate(
                [SWAP],
                engine,
                SamplingOptions(max_completion_length=900),
                boxes,
                prompt=lambda problem: [5],
                lean=lean,
                seed=len(turns),
            )
            assert seen.verdict.proved == right
            assert not list(boxes._folder.iterdir())
            turns.pop(0)


def test_thinking_is_no_answer():
    honest = f"<think>```lean\n{STATEMENT} h\n```</think>\n```lean\n{STATEMENT} {PROOF}\n```"
    assert submissions(SWAP, honest, {}) == [(PROOF, "")]
    assert submissions(SWAP, f"I swap.\n</think>\n\n{PROOF}", {}) == [(PROOF, "")]
    assert submissions(SWAP, f"hm\n</think>\n\n{STATEMENT} {PROOF}", {}) == [(PROOF, "")]


def test_a_question_has_no_verdict_and_prompts_are_kept(attempted, engine):
    theorem, question = attempted([PROOF], ["Because."], problems=[SWAP, QUESTION])
    assert theorem.verdict.proved
    assert question.verdict is None
    assert question.proof == ""
    assert question.prompt_ids == engine.tokenizer(QUESTION.prompt).input_ids


def test_verdicts_come_while_others_are_sampled(engine, lean, monkeypatch):
    """The first trajectory is judged before the last has ended."""
    script(monkeypatch, engine.tokenizer, engine.end_ids[0], lambda n: [PROOF])
    ended, judged = [], []
    original = LeanPool.check

    def check(self, *arguments):
        judged.append(len(ended))
        return original(self, *arguments)

    monkeypatch.setattr(LeanPool, "check", check)
    real = engine.generate

    def generating(prompts, options, *, seed, first, tools, on_end):
        def noted(number, trajectory):
            on_end(number, trajectory)
            ended.append(number)

        return real(prompts, options, seed=seed, first=first, tools=tools, on_end=noted)

    monkeypatch.setattr(engine, "generate", generating)
    generate(
        [SWAP] * 12,
        engine,
        SamplingOptions(max_completion_length=200),
        prompt=lambda problem: [5],
        lean=lean,
    )
    assert len(judged) == 12
    assert min(judged) < 12


def test_a_fault_of_lean_is_no_verdict(engine, monkeypatch):
    script(monkeypatch, engine.tokenizer, engine.end_ids[0], lambda n: [PROOF])
    broken = LeanPool(workers=1, toolchain=find_lean(backend="embedded"))

    def check(*arguments):
        raise MachineError("lean: the library is gone")

    monkeypatch.setattr(broken, "check", check)
    with broken, pytest.raises(MachineError, match="library is gone"):
        generate([SWAP], engine, SamplingOptions(), prompt=lambda problem: [5], lean=broken)


def test_what_an_answer_submits():
    assert submissions(SWAP, PROOF, {}) == [(PROOF, "")]
    file = f"{STATEMENT} {PROOF}"
    assert submissions(SWAP, "see the file", {"A.lean": file}) == [(PROOF, "")]
    assert submissions(SWAP, f"```lean\n{file}\n```", {"A.lean": file}) == [(PROOF, "")]
    assert len(submissions(SWAP, "```\nrfl\n```", {"A.lean": file})) == 2
    assert submissions(SWAP, "see the file", {"A.lean": "def x : Nat := 0"}) == [
        ("see the file", "")
    ]
    renamed = dataclasses.replace(SWAP.theorem, formal_statement=STATEMENT.replace("swap", "s2"))
    other = Problem("s2", renamed.formal_statement, renamed)
    assert submissions(other, "rfl", {"A.lean": file}) == [("rfl", "")]
