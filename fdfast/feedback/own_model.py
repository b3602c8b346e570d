"""Feedback by a copy of the model that is trained: source "self" of the paper.

Source: Feedback Distillation (2026), arXiv 2605.30861, its list of feedback sources.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from fdfast.data.problems import spoken
from fdfast.errors import InputError
from fdfast.feedback.item import FeedbackItem
from fdfast.feedback.ledger import FeedbackCounters
from fdfast.feedback.prompts import (
    MAX_ATTEMPT_CHARACTERS,
    Message,
    ask_again,
    feedback_messages,
)
from fdfast.feedback.rules import broken_rule
from fdfast.rollout import HFEngine, SamplingOptions, Trajectory
from fdfast.rollout.plain_text import PlainText


class Engine(Protocol):
    """What samples: rollout.HFEngine, say, over the frozen copy or over a second adapter."""

    def generate(
        self, prompts: Sequence[Sequence[int]], options: SamplingOptions, *, seed: int
    ) -> list[Trajectory]:
        """One trajectory a prompt, in order."""


class AdapterEngine:
    """An engine whose model wears another LoRA adapter while it samples, one trained to judge, say.

    Args:
        engine: over a peft model, its `model`.
        adapter: a name that the model knows.

    Raises:
        InputError: it does not know it.
    """

    def __init__(self, engine: HFEngine, adapter: str) -> None:
        known = getattr(engine.model, "peft_config", {})
        if adapter not in known:
            raise InputError(
                f"AdapterEngine: adapter must be one of {', '.join(known) or '(none)'}; got "
                f"{adapter!r}: load it with model.load_adapter"
            )
        self.engine, self.adapter = engine, adapter

    def generate(
        self, prompts: Sequence[Sequence[int]], options: SamplingOptions, *, seed: int
    ) -> list[Trajectory]:
        """One trajectory a prompt, in order; afterwards the model is as it was."""
        model = self.engine.model
        active = model.active_adapter
        # peft's set_adapter also decides what is trained; the student's choice must survive.
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        model.set_adapter(self.adapter)
        try:
            return self.engine.generate(prompts, options, seed=seed)
        finally:
            model.set_adapter(active)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained[name])


class SelfFeedback:
    """The model reads its own attempts and writes the feedback, under the rules of source llm.

    The seed follows from the prompts, so that a resumed run gets the feedback that it would have
    got.

    Args:
        engine: samples from the model that gives feedback.
        tokenizer: its tokenizer, with a chat template.
        options: how to sample.
        max_prompt_length: tokens of a prompt; a long attempt loses its middle to fit. None for no
            limit.
        allow_solution: whether feedback may say the solution.
        seed: of sampling.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        options: SamplingOptions,
        *,
        max_prompt_length: int | None = None,
        allow_solution: bool = False,
        seed: int = 0,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "feedback 'self' wants a model with a chat template; this tokenizer has none: take "
                "an instruct model, or feedback.source=llm"
            )
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.plain = PlainText(tokenizer)
        self.max_prompt_length, self.allow_solution = max_prompt_length, allow_solution
        self.seed = seed
        self.counters: FeedbackCounters | None = FeedbackCounters()
        self.last_failure = ""

    def feedback_many(self, items: Sequence[FeedbackItem]) -> list[str | None]:
        """Feedback on each attempt, in order; None where it failed (see `last_failure`)."""
        assert self.counters is not None
        answers: list[str | None] = [None] * len(items)
        chats: dict[int, list[Message]] = {}
        reason = ""
        for index, item in enumerate(items):
            if chat := self._chat(item):
                chats[index] = chat
        for _ in range(2):  # after an answer that breaks the rules one more try, told what broke
            completions = self._generate([*chats.values()])
            again = {}
            for (index, chat), completion in zip(chats.items(), completions, strict=True):
                text, item = spoken(completion.text), items[index]
                wrong = broken_rule(
                    text, item, allow_solution=self.allow_solution, cut_off=completion.truncated
                )
                if not wrong:
                    answers[index] = text
                    continue
                self.counters.refused += 1
                reason = wrong
                again[index] = ask_again(chat, text, wrong)
            chats = again
        if chats:
            self.last_failure = f"the model's answer broke the rules twice: {reason}"
        self.counters.failed += sum(answer is None for answer in answers)
        return answers

    def _chat(self, item: FeedbackItem) -> list[Message] | None:
        """The messages for one attempt, within the length limit; None if none fits."""
        limit = MAX_ATTEMPT_CHARACTERS
        while True:
            messages = feedback_messages(
                item, allow_solution=self.allow_solution, max_attempt_characters=limit
            )
            length = len(self._ids(messages))
            if self.max_prompt_length is None or length <= self.max_prompt_length:
                return messages
            if limit < 100:
                self.last_failure = (
                    f"its prompt has {length} tokens, {self.max_prompt_length} is the limit"
                )
                return None
            limit = min(limit, len(item.attempt)) // 2

    def _generate(self, chats: Sequence[list[Message]]) -> list[Trajectory]:
        if not chats:
            return []
        assert self.counters is not None
        prompts = [self._ids(chat) for chat in chats]
        digest = hashlib.sha256(repr((self.seed, prompts)).encode()).digest()
        seed = int.from_bytes(digest[:4])
        completions = self.engine.generate(prompts, self.options, seed=seed)
        self.counters.requests += len(prompts)
        self.counters.prompt_tokens += sum(map(len, prompts))
        self.counters.completion_tokens += sum(len(c.ids) for c in completions)
        return completions

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return self.plain.encode_chat(text, [message["content"] for message in messages])
