"""Other people's LLM servers: asked many at a time, what they answered kept, and nothing paid for twice.

The only part that knows how to reach a server; it knows nothing about traits, judges or the model under study.
"""

from persona_lens.clients.batches import BatchResults, read_batch, write_batch
from persona_lens.clients.cache import CallCache
from persona_lens.clients.client import Ask, OpenAIClient
from persona_lens.clients.requests import (
    ChatCompletion,
    ChatRequest,
    MissingLogprobs,
    RejectedRequest,
    ServerError,
    Token,
    UnusableAnswer,
)
from persona_lens.clients.usage import CallEstimate, Prices, Usage

__all__ = [
    "Ask",
    "BatchResults",
    "CallCache",
    "CallEstimate",
    "ChatCompletion",
    "ChatRequest",
    "MissingLogprobs",
    "OpenAIClient",
    "Prices",
    "RejectedRequest",
    "ServerError",
    "Token",
    "UnusableAnswer",
    "Usage",
    "read_batch",
    "write_batch",
]
