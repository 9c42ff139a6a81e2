"""What calls cost: the tokens of those that were made, and an estimate of those that would be.

Knows nothing about what the calls are for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from persona_lens.clients.requests import ChatCompletion, ChatRequest


class Prices(NamedTuple):
    """US dollars a million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars for so many tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


# The paper's judge, at OpenAI's list prices of April 2025; any other model's are the caller's to give.
LIST_PRICES = {"gpt-4.1-mini": Prices(0.40, 1.60), "gpt-4.1-mini-2025-04-14": Prices(0.40, 1.60)}


@dataclass
class Usage:
    """What a client has asked for so far: calls answered by the server and by the cache, retries, and tokens.

    `rejected` counts the requests that the server did not take while it took others.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prices: Prices | None = None
    rejected: int = 0

    def add(self, completion: ChatCompletion) -> None:
        """Count an answer that the server gave."""
        self.calls += 1
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens

    @property
    def cost(self) -> float | None:
        """US dollars, None where no prices are known."""
        return None if self.prices is None else self.prices.cost(self.prompt_tokens, self.completion_tokens)

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        rejected = f", {self.rejected:,} rejected by the server" if self.rejected else ""
        return (
            f"{self.calls:,} calls ({self.cached:,} more from the cache, {self.retries:,} retries{rejected}), {tokens}"
            f"{_dollars(self.cost)}"
        )


class CallEstimate(NamedTuple):
    """What calls would take: how many, how many of them are cached, and at most so many tokens for the rest.

    Tokens of prompts are estimated at four bytes each, completions at their limit.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, {self.cached:,} of them in the cache; the rest would send about "
            f"{self.prompt_tokens:,} tokens and receive at most {self.completion_tokens:,}{_dollars(self.cost)}"
        )


def estimate_calls(missing: Sequence[ChatRequest], *, cached: int, prices: Prices | None) -> CallEstimate:
    """An estimate for requests that are not in the cache, with those that are only counted."""
    texts = (json.dumps(request.messages, ensure_ascii=False) for request in missing)
    prompt = sum(len(text.encode()) // 4 + 1 for text in texts)
    completion = sum(request.max_tokens for request in missing)
    cost = None if prices is None else prices.cost(prompt, completion)
    return CallEstimate(len(missing) + cached, cached, prompt, completion, cost)


def _dollars(cost: float | None) -> str:
    return "" if cost is None else f", about ${cost:.2f}" if cost >= 0.01 else ", less than $0.01"
