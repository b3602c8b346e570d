"""From attempts to packs: the student's and the teacher's sequences, token for token the same
completions.

Legend: B attempts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fdfast.data.problems import Problem
from fdfast.errors import InputError
from fdfast.feedback.prompts import teacher_template
from fdfast.packing import PrefixTree, fill_packs
from fdfast.rollout import Trajectory
from fdfast.rollout.plain_text import PlainText
from fdfast.trainer.config import TrainConfig

_TORN = "\ufffd"


@dataclass(frozen=True)
class Attempt:
    """One rollout with what the teacher is told about it; of an attempt whose feedback failed
    `feedback` is None, and it is not trained on.
    """

    problem: Problem
    completion: Trajectory
    teacher_prompt_ids: list[int]
    feedback: str | None = ""
    feedback_clipped: bool = False
    advantage: float = 0.0


class Prompts:
    """Token ids of prompts for the student and, with feedback, for the teacher.

    Args:
        tokenizer: with a chat template.
        config: of the run.
        tools: schemas that the chat template shows the model.

    Raises:
        InputError: nothing tells the model of its tools.
    """

    def __init__(
        self, tokenizer: Any, config: TrainConfig, tools: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.tokenizer, self.config, self.tools = tokenizer, config, list(tools)
        self.plain = PlainText(tokenizer)
        own = teacher_template(config.feedback.source, config.feedback.position)
        self.teacher_template = config.feedback.template or own
        self._check_tools()

    def student(self, problem: Problem) -> list[int]:
        """The plain prompt.

        Raises:
            InputError: it has more than max_prompt_length tokens.
        """
        user = self.config.prompt.prompt_template.replace("{prompt}", problem.prompt)
        ids = self._ids(problem, user, [problem.prompt])
        if len(ids) > self.config.prompt.max_prompt_length:
            raise InputError(
                f"problem {problem.name}: its prompt has {len(ids)} tokens, max_prompt_length is "
                f"{self.config.prompt.max_prompt_length}; raise it, or drop the problem"
            )
        return ids

    def teacher(self, problem: Problem, feedback: str) -> tuple[list[int], bool]:
        """The prompt with the feedback in it, and whether that was cut; the student's without
        any.
        """
        if not feedback:
            return self.student(problem), False
        feedback, clipped = self._fit(feedback)
        prompt = self.config.prompt.prompt_template.replace("{prompt}", problem.prompt)
        parts = {"{prompt}": prompt, "{feedback}": feedback}
        # In one pass: what a text holds is never taken for a mark.
        user = re.sub(r"\{prompt\}|\{feedback\}", lambda m: parts[m[0]], self.teacher_template)
        return self._ids(problem, user, [problem.prompt, feedback]), clipped

    def _check_tools(self) -> None:
        names = [tool["function"]["name"] for tool in self.tools]
        shown = self._text(self.config.prompt.prompt_template, "") if names else ""
        if missing := [name for name in names if name not in shown]:
            raise InputError(
                f"tools: the model's chat template does not show them, and no prompt names "
                f"{', '.join(missing)}; describe the tools and the form of a call in "
                "system_prompt, or take a model whose template has tools"
            )

    def _fit(self, feedback: str) -> tuple[str, bool]:
        """Feedback of max_feedback_length tokens at most: its middle goes, its two ends say the
        most.
        """
        ids = self.tokenizer(feedback, add_special_tokens=False).input_ids
        limit = self.config.feedback.max_feedback_length
        if len(ids) <= limit:
            return feedback, False
        head, tail = ids[: (limit + 1) // 2], ids[len(ids) - limit // 2 :]
        # A cut within a character leaves U+FFFD where it was.
        begin, end = self.tokenizer.decode(head), self.tokenizer.decode(tail)
        return f"{begin.rstrip(_TORN)} [...] {end.lstrip(_TORN)}", True

    def _ids(self, problem: Problem, user: str, others: list[str]) -> list[int]:
        """Lean quotes what a model wrote: that must not pass for the template's own marks."""
        return self.plain.encode_chat(self._text(user, problem.prompt), others)

    def _text(self, user: str, prompt: str) -> str:
        messages = [{"role": "system", "content": self.config.prompt.system_prompt}]
        if not self.config.prompt.system_prompt:
            messages = []
        for question, answer in self.config.prompt.examples:
            asked = self.config.prompt.prompt_template.replace("{prompt}", question)
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": user})
        text: str = self.tokenizer.apply_chat_template(
            messages, tools=self.tools or None, tokenize=False, add_generation_prompt=True
        )
        return text + self.config.prompt.completion_prefix.replace("{prompt}", prompt)


def completion_tree(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    trained: Sequence[Sequence[bool]] | None = None,
) -> PrefixTree:
    """The pack of prompts with their completions; its targets are the completions' tokens.

    Args:
        prompts: token ids, B lists, none empty.
        completions: token ids, B lists.
        trained: for each completion, which of its tokens are targets (tools' answers are none);
            None: all.
    """
    trained = trained or [[True] * len(completion) for completion in completions]
    sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    masks = [[False] * len(p) + [*t] for p, t in zip(prompts, trained, strict=True)]
    return PrefixTree.from_sequences(sequences, masks)


def trees(attempts: Sequence[Attempt]) -> tuple[PrefixTree, PrefixTree]:
    """The student's and the teacher's, of the same attempts in the same order."""
    completions = [a.completion.ids for a in attempts]
    wrote = [a.completion.wrote for a in attempts]
    return (
        completion_tree([a.completion.prompt_ids for a in attempts], completions, wrote),
        completion_tree([a.teacher_prompt_ids for a in attempts], completions, wrote),
    )


def packs(attempts: Sequence[Attempt], max_tokens: int) -> list[list[Attempt]]:
    """The attempts of each pass; those at one problem stay together."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(attempt.problem.name, []).append(attempt)
    members = list(groups.values())
    sizes = [max(tree.num_tokens for tree in trees(group)) for group in members]
    return [[a for group in pack for a in members[group]] for pack in fill_packs(sizes, max_tokens)]
