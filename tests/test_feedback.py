"""What the teacher is told."""

import pytest

from fdfast.data.jsonl import Theorem
from fdfast.data.problems import Problem, proof_text, questions_path, read_problems
from fdfast.errors import InputError
from fdfast.feedback import feedback_provider
from fdfast.lean import Message, Verdict

THEOREM = Theorem("t", "train", "theorem t (a : Prop) (h : a) : a :=", "", "", "h")
PROBLEM = Problem("t", THEOREM.formal_statement, THEOREM)


def test_constant_feedback_is_its_text_whatever_happened():
    provider = feedback_provider("constant", "Be concise.")
    assert provider(PROBLEM, "h", None) == "Be concise."


def test_verifier_feedback_carries_the_attempt_and_leans_words():
    message = Message("error", 1, 4, "unknown identifier 'k'")
    text = feedback_provider("verifier")(PROBLEM, "k", Verdict("failed", (message,), ""))
    assert "\nk\n" in text
    assert "line 1: unknown identifier 'k'" in text


def test_verifier_feedback_on_a_proof_is_the_proof():
    text = feedback_provider("verifier")(PROBLEM, "h", Verdict("proved", level=1))
    assert text == "This proof is correct:\nh"


@pytest.mark.parametrize("kind", ["timeout", "crashed", "rejected"])
def test_verifier_feedback_without_messages_is_the_reason(kind):
    text = feedback_provider("verifier")(PROBLEM, "", Verdict(kind, (), "the reason"))
    assert "(nothing)" in text
    assert "the reason" in text
    assert kind in text


def test_solution_feedback_is_the_known_proof_and_its_lack_is_an_error():
    provider = feedback_provider("solution")
    assert provider(PROBLEM, "k", None).endswith("\nh")
    with pytest.raises(InputError, match="problem q has no field 'proof'"):
        provider(Problem("q", "Why?"), "k", None)


def test_wrong_names_are_one_line():
    with pytest.raises(InputError, match="feedback must be one of constant, verifier, solution"):
        feedback_provider("magic")
    with pytest.raises(InputError, match=r"wants feedback\.text"):
        feedback_provider("constant")
    with pytest.raises(InputError, match="wants Lean's verdict"):
        feedback_provider("verifier")(PROBLEM, "h", None)


@pytest.mark.parametrize(
    ("answer", "proof"),
    [
        ("h", "h"),
        ("  fun x => x \n", "fun x => x"),
        (":= h", "h"),
        ("```lean\nfun x => x\n```\nThis works.", "fun x => x"),
        ("theorem t (a : Prop) (h : a) : a := h", "h"),
        ("```lean4\ntheorem t : a :=\n  h\n```", "h"),
        ("", ""),
        ("h\n```", "h"),
        (" fun x => x\n```\nDone", "fun x => x"),
        ("```\nh", "h"),
        ("Here it is:\n```lean\nh", "h"),
        ("h\n```\n```", "h"),
        ("```lean\nleanest h\n```", "leanest h"),
        ("```\nleanest h\n```", "leanest h"),
        ("theorem t (n : Nat := 3) : a := h", "h"),
        ("theorem t /- := -/ {n : Nat := 3} : a :=\n  fun (x := 1) => h", "fun (x := 1) => h"),
        ("lemma t : a := h\n```", "h"),
        ("theorem t (n : Nat := 3) : a", "theorem t (n : Nat := 3) : a"),
    ],
)
def test_the_proof_is_found_in_an_answer(answer, proof):
    assert proof_text(answer) == proof


def test_chat_questions_are_read_and_a_bad_line_is_named(tmp_path):
    assert len(read_problems(questions_path(), task="chat", split="train")) == 8
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "Why?"}\n{"question": "What?"}\n')
    with pytest.raises(InputError, match=r"q\.jsonl:2: field 'prompt' is missing"):
        read_problems(path, task="chat")
    path.write_text('{"prompt": "Why?"\n')
    with pytest.raises(InputError, match=r"q\.jsonl:1: is not JSON"):
        read_problems(path, task="chat")
    path.write_text('{"prompt": "Why?", "split": "train"}\n')
    with pytest.raises(InputError, match="holds no problem of split 'test'"):
        read_problems(path, task="chat", split="test")
    with pytest.raises(InputError, match="task must be one of chat, lean"):
        read_problems(path, task="poetry")
