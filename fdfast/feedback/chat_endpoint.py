"""A language model behind an OpenAI-compatible chat endpoint: retries, concurrency, budget.

The key is read from the environment when it is used, and is part of no object that outlives the
call, no error and no log.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fdfast import http_calls
from fdfast.errors import InputError
from fdfast.feedback.ledger import Budget, BudgetError, FeedbackCounters, Prices, Usage

if TYPE_CHECKING:
    import httpx2

# A wrong key, model or address: no attempt's fault, and no later request would fare better.
_REFUSED = frozenset({301, 302, 307, 308, 401, 403, 404})
# A server that wants more patience than this is not asked again for this attempt.
_MOST_PATIENCE_S = 600.0


@dataclass(frozen=True)
class LLMSettings:
    """How the endpoint is asked.

    Attributes:
        base_url: of the API, with its version: https://api.openai.com/v1, say.
        model: its name there.
        api_key_env: the environment variable that holds the key; "" sends none.
        max_concurrency: requests at once.
        max_retries: requests sent again for one answer, after an error.
        timeout_s: seconds from sending a request to the last byte of its answer.
        max_completion_length: tokens of an answer, thinking included.
        allow_solution: whether feedback may say the solution.
        prices: US dollars per million tokens.
        budget_tokens: of prompts and answers in all; 0 for no limit.
        budget_usd: likewise; wants prices.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    max_concurrency: int = 16
    max_retries: int = 5
    timeout_s: float = 120.0
    max_completion_length: int = 2048
    allow_solution: bool = False
    prices: Prices = field(default_factory=Prices)
    budget_tokens: int = 0
    budget_usd: float = 0.0

    def __post_init__(self) -> None:
        """Check them."""
        if not self.model.strip():
            raise InputError("feedback 'llm' wants feedback.model, the model's name; got ''")
        _check_url(self.base_url)
        for name in ("max_concurrency", "timeout_s", "max_completion_length"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"feedback 'llm': {name} must be positive; got {self.__dict__[name]}"
                )
        if self.budget_usd and not self.prices.prompt + self.prices.completion:
            raise InputError(
                "feedback 'llm': feedback.budget_usd wants feedback.prices_usd, dollars per "
                "million tokens of prompts and of answers"
            )


def _check_url(url: str) -> None:
    """Refuse what is no address, or one that carries a secret; never repeat the secret."""
    if not url:
        raise InputError(
            "feedback 'llm' wants feedback.base_url, https://api.openai.com/v1, say; got ''"
        )
    http_calls.check_url(
        url,
        setting="feedback.base_url",
        form="http(s)://HOST[:PORT]/v1",
        key_setting="feedback.api_key_env",
    )


def api_key(name: str) -> str:
    """The key in environment variable `name`; "" if `name` is "".

    Raises:
        InputError: it is not set, or can be no key; the message does not show it.
    """
    return http_calls.read_key(name, user="feedback 'llm'", setting="feedback.api_key_env")


class NoAnswerError(Exception):
    """No answer came; the message says why, without the key."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote, whether it ran into its limit, and what the server says it took."""

    text: str
    cut_off: bool
    usage: Usage | None


class ChatEndpoint:
    """One event loop's way to the server.

    Args:
        settings: how it is asked.
        counters: what is counted, and bounded by the budget.
        sleep: waits so many seconds.
        uniform: a random number between two bounds, the jitter.
    """

    def __init__(
        self,
        settings: LLMSettings,
        counters: FeedbackCounters,
        *,
        sleep: Callable[[float], Awaitable[None]],
        uniform: Callable[[float, float], float],
    ) -> None:
        self.settings, self.counters = settings, counters
        self.sleep, self.uniform = sleep, uniform
        self._key = api_key(settings.api_key_env)
        self.client: httpx2.AsyncClient = import_httpx2().AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=import_httpx2().Limits(max_connections=settings.max_concurrency),
            timeout=settings.timeout_s,
        )
        self.slots = asyncio.Semaphore(self.settings.max_concurrency)
        self.budget = Budget(
            self.counters,
            self.settings.prices,
            max_tokens=self.settings.budget_tokens,
            max_usd=self.settings.budget_usd,
        )

    async def __aenter__(self) -> "ChatEndpoint":
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.client.__aexit__(*error)

    async def answer(self, request: dict[str, Any]) -> Answer:
        """The model's answer, after as many tries as the settings allow.

        Raises:
            NoAnswerError: none came.
            InputError: none will ever come.
        """
        async with self.slots:
            for retry in range(self.settings.max_retries + 1):
                self.counters.retries += retry > 0
                try:
                    return await self._within_budget(request)
                except _RetryError as failure:
                    if retry == self.settings.max_retries:
                        raise NoAnswerError(f"{failure} ({retry + 1} tries)") from None
                    await self._wait(retry, failure)
        raise AssertionError

    async def _wait(self, retry: int, failure: "_RetryError") -> None:
        """Exponential back-off with full jitter, on top of what the server asks for. The slot is
        kept meanwhile: an overloaded server gets fewer requests.
        """
        asked = failure.retry_after_s
        if asked > _MOST_PATIENCE_S:
            raise NoAnswerError(f"{failure}; it asks for {asked:.0f} s of patience")
        await self.sleep(http_calls.backoff_s(retry, asked, self.uniform))

    async def _within_budget(self, request: dict[str, Any]) -> Answer:
        """One request. What it may cost is reserved; what it did cost is counted, and where no
        answer says that (it was lost, or names no usage) all that was reserved is.
        """
        characters = sum(len(m["content"]) for m in request["messages"])
        most = Usage(characters // 2, self.settings.max_completion_length)
        try:
            await self.budget.reserve(most)
        except BudgetError:
            raise NoAnswerError(
                "the budget is spent (feedback.budget_tokens, feedback.budget_usd)"
            ) from None
        self.counters.requests += 1
        spent = most
        try:
            answer = await self._send(request)
            spent = answer.usage or most
        except _RetryError as failure:
            spent = most if failure.lost else Usage(0, 0)
            raise
        except (NoAnswerError, InputError):
            spent = Usage(0, 0)
            raise
        finally:
            await self.budget.settle(most, spent)
        return answer

    async def _send(self, request: dict[str, Any]) -> Answer:
        httpx, url = import_httpx2(), f"{self.settings.base_url.rstrip('/')}/chat/completions"
        try:
            # httpx2's own limit is per read: of bytes that trickle in it would wait for ever.
            async with asyncio.timeout(self.settings.timeout_s):
                response = await self.client.post(url, json=request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _RetryError(self._safe(f"can't connect: {error}"), lost=False) from None
        except (TimeoutError, httpx.TimeoutException):
            late = f"no answer within {self.settings.timeout_s:g} s"
            raise _RetryError(late, lost=True) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _RetryError(self._safe(f"answer lost: {error}"), lost=True) from None
        if response.status_code == 200:
            answer = _read(response)
            return replace(answer, text=http_calls.without_key(answer.text, self._key))
        said = self._safe(f"HTTP {response.status_code}: {http_calls.error_text(response)}")
        if response.status_code in _REFUSED:
            raise InputError(
                f"feedback 'llm': {self.settings.base_url} refused model {self.settings.model!r} "
                f"({said}); see feedback.base_url, feedback.model and feedback.api_key_env"
            )
        if response.status_code not in http_calls.RETRIED:
            raise NoAnswerError(said)
        raise _RetryError(said, lost=False, retry_after_s=http_calls.retry_after_s(response))

    def _safe(self, text: str) -> str:
        """One line of what the server said, which may repeat the key."""
        return http_calls.one_line(text, self._key)


class _RetryError(Exception):
    """No answer came, and another try may help.

    Args:
        said: why.
        lost: whether the model may have worked for it.
        retry_after_s: seconds that the server asks for.
    """

    def __init__(self, said: str, *, lost: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(said)
        self.lost, self.retry_after_s = lost, retry_after_s


def _read(response: "httpx2.Response") -> Answer:
    """The answer in a response of status 200."""
    try:
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"]["content"] or ""  # None: it thought until its tokens were gone
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, LookupError, TypeError):
        raise _RetryError("the answer is no chat completion", lost=True) from None
    usage = None
    with contextlib.suppress(LookupError, TypeError, ValueError):
        said = body["usage"]
        usage = Usage(int(said["prompt_tokens"]), int(said["completion_tokens"]))
    return Answer(text, choice.get("finish_reason") == "length", usage)


def import_httpx2() -> Any:
    """The module httpx2.

    Raises:
        MachineError: it is not installed.
    """
    return http_calls.import_httpx2("feedback 'llm'")
