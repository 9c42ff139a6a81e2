"""Tells a server that rejects one request from a server that rejects every request with these settings.

A request that was rejected for good (400, 413, 422) is that row's own fault, such as a text that is too long, only if
the server takes others with the same settings. Where none was answered since it was sent, a control request finds out:
the same body, with "Hello" in the place of every text.
"""

import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from persona_lens.clients.requests import RejectedRequest

CONTROL_TEXT = "Hello"


class Controls:
    """What is known in one run about which settings a server takes; for one event loop."""

    def __init__(self) -> None:
        import anyio

        self._taken_at: dict[str, float] = {}
        self._rejected_at: dict[str, float] = {}
        self._locks: defaultdict[str, Any] = defaultdict(anyio.Lock)

    def answered(self, body: Mapping[str, Any]) -> None:
        """Note that a request was answered."""
        self._taken_at[_settings(body)] = time.monotonic()

    async def takes_others(
        self, body: Mapping[str, Any], *, since: float, post: Callable[[dict[str, Any]], Awaitable[object]]
    ) -> bool:
        """Whether the server takes other requests with the settings of one that it rejected, which was sent at `since`.

        Asks, where no answer since then tells it; raises what `post` raises where the server fails meanwhile.
        """
        settings = _settings(body)
        async with self._locks[settings]:  # of several rejected at a time, one asks for all
            if self._taken_at.get(settings, -1.0) >= since:
                return True
            if self._rejected_at.get(settings, -1.0) >= since:
                return False
            try:
                await post(control_body(body))
            except RejectedRequest:
                self._rejected_at[settings] = time.monotonic()
                return False
            self._taken_at[settings] = time.monotonic()
            return True


def control_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body with the same settings and turns, whose texts say nothing."""
    turns = [{**message, "content": CONTROL_TEXT} for message in body["messages"]]
    return {**body, "messages": turns, **({"seed": 0} if "seed" in body else {})}


def _settings(body: Mapping[str, Any]) -> str:
    return json.dumps(control_body(body), sort_keys=True)
