"""Feedback by a language model behind an OpenAI-compatible chat endpoint: source "llm" of the
paper.

Source: Feedback Distillation (2026), arXiv 2605.30861, its list of feedback sources.
"""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fdfast.data.problems import spoken
from fdfast.errors import InputError, MachineError
from fdfast.feedback.cache import FeedbackCache, content_key
from fdfast.feedback.chat_endpoint import (
    ChatEndpoint,
    LLMSettings,
    NoAnswerError,
    api_key,
    import_httpx2,
)
from fdfast.feedback.item import FeedbackItem
from fdfast.feedback.ledger import FeedbackCounters
from fdfast.feedback.prompts import Message, ask_again, feedback_messages
from fdfast.feedback.rules import broken_rule
from fdfast.files import cache_dir
from fdfast.http_calls import LoopThread
from fdfast.interrupts import result_of


class LLMFeedback:
    """Asks the endpoint about each attempt, many at once; what it answered once it is not asked
    again.

    Args:
        settings: how it is asked.
        cache_path: SQLite file; the user's cache by default.
        sleep: waits so many seconds (tests replace it).
        uniform: a random number between two bounds, the jitter (tests replace it).

    Raises:
        InputError: the key is missing.
        MachineError: httpx2 is missing, or the cache can't be used.
    """

    def __init__(
        self,
        settings: LLMSettings,
        *,
        cache_path: Path | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        import_httpx2()
        api_key(settings.api_key_env)
        self.settings, self.sleep, self.uniform = settings, sleep, uniform
        self.cache = FeedbackCache(cache_path or cache_dir() / "feedback.sqlite")
        self.counters, self.last_failure = FeedbackCounters(), ""
        self._one_call = threading.Lock()

    def feedback_many(self, items: Sequence[FeedbackItem]) -> list[str | None]:
        """Feedback on each attempt, in order; None where it failed (see `last_failure`).

        Raises:
            InputError: the endpoint refuses the key, the model or the address.
            MachineError: the cache can't be used.
        """
        with self._one_call, LoopThread("feedback") as loop:
            return result_of(loop.submit(self._all(items)))

    async def _all(self, items: Sequence[FeedbackItem]) -> list[str | None]:
        groups: dict[str, list[int]] = {}  # equal attempts are asked about once
        for index, item in enumerate(items):
            groups.setdefault(self._key(item), []).append(index)
        answers: list[str | None] = [None] * len(items)
        async with ChatEndpoint(
            self.settings, self.counters, sleep=self.sleep, uniform=self.uniform
        ) as endpoint:

            async def one(cache_key: str, indices: list[int]) -> None:
                text = self.cache.get(cache_key)
                if text is not None:
                    self.counters.cached += len(indices)
                else:
                    text = await self._ask(endpoint, items[indices[0]])
                    if text is None:
                        self.counters.failed += len(indices)
                    else:
                        self.cache.put(cache_key, text)
                        self.counters.cached += len(indices) - 1
                for index in indices:
                    answers[index] = text

            try:
                async with asyncio.TaskGroup() as group:
                    for cache_key, indices in groups.items():
                        group.create_task(one(cache_key, indices))
            except* (InputError, MachineError) as errors:
                raise _first(errors) from None
        return answers

    def _key(self, item: FeedbackItem) -> str:
        return content_key(
            {"base_url": self.settings.base_url.rstrip("/")}
            | self._request(feedback_messages(item, allow_solution=self.settings.allow_solution))
        )

    def _request(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {
            "model": self.settings.model,
            "messages": list(messages),
            "max_completion_tokens": self.settings.max_completion_length,
        }

    async def _ask(self, endpoint: ChatEndpoint, item: FeedbackItem) -> str | None:
        """Feedback that keeps the rules; after one that doesn't, one more try."""
        allow = self.settings.allow_solution
        messages, wrong = feedback_messages(item, allow_solution=allow), ""
        for _ in range(2):
            try:
                answer = await endpoint.answer(self._request(messages))
            except NoAnswerError as failure:
                self.last_failure = str(failure)
                return None
            text = spoken(answer.text)
            wrong = broken_rule(text, item, allow_solution=allow, cut_off=answer.cut_off)
            if not wrong:
                return text
            self.counters.refused += 1
            messages = ask_again(messages, text, wrong)
        self.last_failure = f"the model's answer broke the rules twice: {wrong}"
        return None


def _first(errors: BaseExceptionGroup[Exception]) -> BaseException:
    """The first error of a group, however deep."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
