"""What may go wrong between a client and a chat server, and plans that say when.

A plan chooses by (body, attempt), where `attempt` counts from 0 how often this body came before, so that runs repeat.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One way to fail: an error with a status, a changed answer (`change`), or what becomes of the connection."""

    status: int = 200
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[Body], Body | str] = dict
    hang: float = 0.0
    """Seconds of silence before the answer, which still comes where the client waits for it."""
    cut_at: float | None = None
    """The share of the body that is sent before the connection is closed, with a Content-Length of the whole."""
    dropped: bool = False
    """The connection is closed before any byte."""
    endless: bool = False
    """The body comes in chunks and has no end: it goes on until the client closes the connection."""


def too_many(retry_after: float | str | None = None) -> Fault:
    """429, with a Retry-After where one is given."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Fault(429, "Rate limit reached.", headers)


def server_error(status: int = 500, retry_after: float | None = None) -> Fault:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Fault(status, "The server had an error.", headers)


def hang(seconds: float = 60.0) -> Fault:
    return Fault(hang=seconds)


def cut(at: float = 0.5) -> Fault:
    """The connection ends in mid-body."""
    return Fault(cut_at=at)


def dropped() -> Fault:
    return Fault(dropped=True)


def malformed() -> Fault:
    """200 with half of the JSON, and nothing wrong with the connection."""
    return Fault(change=lambda answer: json.dumps(answer)[: len(json.dumps(answer)) // 2])


def no_choices() -> Fault:
    return Fault(change=lambda answer: {**answer, "choices": []})


def no_logprobs() -> Fault:
    return Fault(change=lambda answer: {**answer, "choices": [{**answer["choices"][0], "logprobs": None}]})


def other_model(name: str) -> Fault:
    return Fault(change=lambda answer: {**answer, "model": name})


def unknown_model() -> Fault:
    return Fault(404, "The model does not exist or you do not have access to it.")


def unauthorized() -> Fault:
    """401 whose message repeats the whole Authorization header."""
    return Fault(401, "Incorrect API key provided: {authorization}.")


def bad_request(message: str = "'temperature' is not supported.") -> Fault:
    return Fault(400, message)


def redirect(location: str, status: int = 307) -> Fault:
    return Fault(status, "It is elsewhere.", {"Location": location})


def error_in_success(error: object) -> Fault:
    """200 whose body is an error, as routers before other servers give it."""
    return Fault(change=lambda _: {"error": error})


Plan = Callable[[Body, int], Fault | None]

RECOVERABLE = (too_many(0.01), server_error(retry_after=0.01), cut(), dropped(), malformed(), no_choices())
"""What a client has to overcome by asking again; a hang is left out, since it takes a short timeout."""


def first(*faults: Fault | None) -> Plan:
    """These faults in turn for each body, and then none."""
    return lambda _body, attempt: faults[attempt] if attempt < len(faults) else None


def always(fault: Fault) -> Plan:
    return lambda _body, _attempt: fault


def random_faults(rate: float, seed: int = 0, *, kinds: Sequence[Fault] = RECOVERABLE, consecutive: int = 3) -> Plan:
    """A share `rate` of all attempts fails, always the same ones, at most `consecutive` of a body in a row."""

    def drawn(body: Body, attempt: int) -> Fault | None:
        digest = hashlib.sha256(f"{seed} {attempt} {canonical(body)}".encode()).digest()
        if int.from_bytes(digest[:8], "big") >= rate * 2**64:
            return None
        return kinds[int.from_bytes(digest[8:16], "big") % len(kinds)]

    def plan(body: Body, attempt: int) -> Fault | None:
        window = range(attempt - attempt % (consecutive + 1), attempt)
        spared = attempt % (consecutive + 1) == consecutive and all(drawn(body, each) for each in window)
        return None if spared else drawn(body, attempt)

    return plan


def canonical(body: Mapping[str, Any]) -> str:
    """A body as text that does not depend on the order of its fields."""
    return json.dumps(body, sort_keys=True)
