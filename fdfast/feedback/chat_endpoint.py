"""A language model behind an OpenAI-compatible chat endpoint: retries, concurrency, budget.

The key is read from the environment when it is used, and is part of no object that outlives the
call, no error and no log.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fdfast.errors import InputError, MachineError
from fdfast.feedback.ledger import Budget, BudgetError, FeedbackCounters, Prices, Usage

if TYPE_CHECKING:
    import httpx2

# What a later try may mend: overload, a restart, a proxy's error. 529 is "overloaded" at some.
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# A wrong key, model or address: no attempt's fault, and no later request would fare better.
_REFUSED = frozenset({301, 302, 307, 308, 401, 403, 404})
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
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
            raise InputError("feedback 'llm' wants feedback_model, the model's name; got ''")
        _check_url(self.base_url)
        for name in ("max_concurrency", "timeout_s", "max_completion_length"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"feedback 'llm': {name} must be positive; got {self.__dict__[name]}"
                )
        if self.budget_usd and not self.prices.prompt + self.prices.completion:
            raise InputError(
                "feedback 'llm': feedback_budget_usd wants feedback_prices_usd, dollars per "
                "million tokens of prompts and of answers"
            )


def _check_url(url: str) -> None:
    """Refuse what is no address, or one that carries a secret; never repeat the secret."""
    if not url:
        raise InputError(
            "feedback 'llm' wants feedback_base_url, https://api.openai.com/v1, say; got ''"
        )
    try:
        parts = urlsplit(url)
        host = parts.hostname
        carries = "@" in parts.netloc or bool(parts.query or parts.fragment)
    except ValueError:
        host, carries, parts = None, False, urlsplit("")
    if carries:
        raise InputError(
            "feedback_base_url must carry no user, password or query (not shown here); put the key "
            "into the variable that feedback_api_key_env names"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"feedback_base_url must be http(s)://HOST[:PORT]/v1; got {url!r}")


def api_key(name: str) -> str:
    """The key in environment variable `name`; "" if `name` is "".

    Raises:
        InputError: it is not set, or can be no key; the message does not show it.
    """
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise InputError(
            f"feedback 'llm': the environment variable {name} holds no key; export it, or set "
            "feedback_api_key_env to another name ('' for a server that wants none)"
        )
    if not all("!" <= c <= "~" for c in key):
        raise InputError(
            f"feedback 'llm': the environment variable {name} must hold a key of printable ASCII "
            "without spaces; what it holds is not shown"
        )
    return key


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
        most = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**retry)
        await self.sleep(asked + self.uniform(0.0, most))

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
                "the budget is spent (feedback_budget_tokens, feedback_budget_usd)"
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
            return replace(answer, text=self._without_key(answer.text))
        said = self._safe(f"HTTP {response.status_code}: {_error_text(response)}")
        if response.status_code in _REFUSED:
            raise InputError(
                f"feedback 'llm': {self.settings.base_url} refused model {self.settings.model!r} "
                f"({said}); see feedback_base_url, feedback_model and feedback_api_key_env"
            )
        if response.status_code not in _RETRIED:
            raise NoAnswerError(said)
        raise _RetryError(said, lost=False, retry_after_s=_retry_after_s(response))

    def _safe(self, text: str) -> str:
        """One line of what the server said, which may repeat the key."""
        return " ".join(self._without_key(text).split())[:300]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


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


def _error_text(response: "httpx2.Response") -> str:
    """What the server says went wrong, without its JSON around it."""
    try:
        said = response.json()["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, LookupError, TypeError):
        return response.text


def _retry_after_s(response: "httpx2.Response") -> float:
    """Retry-After in seconds, of either form; 0 if there is none that can be read."""
    text = response.headers.get("Retry-After", "").strip()
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def import_httpx2() -> Any:
    """The module httpx2.

    Raises:
        MachineError: it is not installed.
    """
    try:
        import httpx2
    except ImportError as error:
        raise MachineError(
            f"feedback 'llm' needs httpx2 ({error}); run: pip install 'fdfast[train]'"
        ) from error
    return httpx2
