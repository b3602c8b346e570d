"""The rules that written feedback must keep, and what is said of feedback that breaks one.

Source: Feedback Distillation (2026), arXiv 2605.30861: one to three numbered orders of 10 to 50
words, each self-contained, no mention of a student. That an order is one, and that it helps, no
rule here can tell.
"""

import re

from fdfast.feedback.item import FeedbackItem

MAX_ORDERS = 3
MIN_WORDS, MAX_WORDS = 10, 50

_NUMBERED = re.compile(r"^[ \t]*(?:\*\*)?(\d+)[.)](?:\*\*)?[ \t]+", re.MULTILINE)
_NOT_SELF_CONTAINED = re.compile(
    r"\bstudents?\b"
    r"|\b(?:previous|earlier|prior|last|failed|original|your|the|this) (?:attempt|try)\b"
    r"|\b(?:previous|earlier|prior) (?:answer|response|proof|solution|output)\b",
    re.IGNORECASE,
)
# Of a chat template: in the teacher's prompt it would end the turn.
_TEMPLATE_MARK = re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]")
# A shorter proof ("h", "rfl") is found in any text.
_MIN_PROOF_CHARACTERS = 16


def broken_rule(text: str, item: FeedbackItem, *, allow_solution: bool, cut_off: bool) -> str:
    """What is wrong with a feedback, as a clause to tell its writer; "" if nothing is.

    Args:
        text: the feedback.
        item: the attempt that it is about.
        allow_solution: whether it may say the solution.
        cut_off: whether it ran into its length limit.
    """
    if not text:
        return "it was empty"
    if cut_off:
        return "it was cut off at its length limit"
    if "<think>" in text:
        return "it holds unfinished thinking"
    marks = list(_NUMBERED.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return 'it does not begin with "1."'
    numbers = [int(mark[1]) for mark in marks]
    if numbers != [*range(1, len(marks) + 1)]:
        return f"its instructions are numbered {', '.join(map(str, numbers))}"
    if len(marks) > MAX_ORDERS:
        return f"it holds {len(marks)} instructions, and {MAX_ORDERS} is the most"
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for number, (mark, end) in enumerate(zip(marks, ends, strict=True), 1):
        words = len(text[mark.end() : end].split())
        if not MIN_WORDS <= words <= MAX_WORDS:
            return (
                f"instruction {number} has {words} words, not between {MIN_WORDS} and {MAX_WORDS}"
            )
    if mark_in_text := _TEMPLATE_MARK.search(text):
        return f"it holds {mark_in_text[0]}, a mark of chat templates"
    if mention := _NOT_SELF_CONTAINED.search(text):
        return f"it speaks of {mention[0].lower()!r}, which its reader knows nothing of"
    if not allow_solution and _gives_solution(text, item):
        return "it gives the solution away"
    return ""


def _gives_solution(text: str, item: FeedbackItem) -> bool:
    proof = "" if item.problem.theorem is None else item.problem.theorem.proof
    proof = " ".join(proof.split())
    known = len(proof) >= _MIN_PROOF_CHARACTERS and proof in " ".join(text.split())
    return known or "```" in text
