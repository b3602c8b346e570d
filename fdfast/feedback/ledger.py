"""What written feedback came to: counts, tokens, cost, and the budget that bounds them."""

import asyncio
import dataclasses
from dataclasses import dataclass


@dataclass
class FeedbackCounters:
    """Counts of a provider since it was made.

    Attributes:
        requests: sent to the model, retries and second tries included.
        retries: requests sent again after an error.
        cached: feedbacks that took no request.
        refused: answers that broke the rules.
        failed: attempts that got no feedback.
        fallback: of these, attempts that the provider for failures took over.
        prompt_tokens: read by the model.
        completion_tokens: written by it.
        cost_usd: of these tokens.
    """

    requests: int = 0
    retries: int = 0
    cached: int = 0
    refused: int = 0
    failed: int = 0
    fallback: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    def metrics_since(self, before: "FeedbackCounters") -> dict[str, float]:
        """What was counted since `before`, by metric name."""
        now, then = dataclasses.asdict(self), dataclasses.asdict(before)
        return {f"feedback/{name}": float(now[name] - then[name]) for name in now}


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens; 0 where nobody is paid."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """In US dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int


class BudgetError(Exception):
    """What is left of the budget pays for no further request."""


class Budget:
    """Admits requests while what is spent and what those under way may spend is within limits.

    A request that does not fit waits for those under way, which mostly spend less than they may,
    and is refused when none is. One event loop uses it at a time.

    Args:
        counters: where the spending is counted.
        prices: of a token.
        max_tokens: of all requests together; 0 for no limit.
        max_usd: likewise.
    """

    def __init__(
        self, counters: FeedbackCounters, prices: Prices, *, max_tokens: int, max_usd: float
    ) -> None:
        self.counters, self.prices = counters, prices
        self.max_tokens, self.max_usd = max_tokens, max_usd
        self.under_way: list[Usage] = []
        self.changed = asyncio.Condition()

    async def reserve(self, most: Usage) -> None:
        """Wait until a request of `most` tokens may be sent.

        Raises:
            BudgetError: it may not.
        """
        async with self.changed:
            while not self._fits(most):
                if not self.under_way:
                    raise BudgetError
                await self.changed.wait()
            self.under_way.append(most)

    async def settle(self, most: Usage, spent: Usage) -> None:
        """Count what a request that was reserved as `most` came to."""
        self.under_way.remove(most)
        self.counters.prompt_tokens += spent.prompt_tokens
        self.counters.completion_tokens += spent.completion_tokens
        self.counters.cost_usd += self.prices.cost(spent.prompt_tokens, spent.completion_tokens)
        async with self.changed:
            self.changed.notify_all()

    def _fits(self, most: Usage) -> bool:
        prompt = sum(u.prompt_tokens for u in [*self.under_way, most])
        completion = sum(u.completion_tokens for u in [*self.under_way, most])
        so_far = self.counters.prompt_tokens + self.counters.completion_tokens
        tokens = so_far + prompt + completion
        usd = self.counters.cost_usd + self.prices.cost(prompt, completion)
        return (not self.max_tokens or tokens <= self.max_tokens) and (
            not self.max_usd or usd <= self.max_usd
        )
