"""Tells a server that rejects one request from a server that rejects every request with these settings.

A request that was rejected for good (400, 413, 422) is that row's own fault, such as a text that is too long, only if
the server takes others with the same settings. Where none was answered since it was sent, a control request finds out:
the same body, with "Hello" in the place of every text. Where it takes that and none of the first 20 rows, what these
share is at fault, and the run stops before one of them is kept as rejected.

Models that reason before they answer: how an answer that holds nothing but reasoning is told, and what to do then.

Such a server returns `content: null`, its reasoning in a field of its own, and often `finish_reason: "length"`: every
call is paid for and no text comes.
"""

import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from persona_lens.clients.requests import ChatCompletion, ChatRequest, RejectedRequest, ServerError

CONTROL_TEXT = "Hello"
REJECTED_AT_FIRST = 20
"""So many rows, all rejected and none answered before, stop a run."""

Ask = Callable[[ChatRequest], Awaitable[ChatCompletion]]
Result = TypeVar("Result")


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


class Results(Generic[Result]):
    """Hands on the results of a run's jobs; those of rejected requests wait until the server has answered one."""

    def __init__(self, deliver: Callable[[tuple[int, Result]], None]):
        self._deliver = deliver
        self._held: list[tuple[int, Result]] = []
        self._answered = self._stopped = False

    async def add(self, index: int, job: Callable[[Ask], Awaitable[Result]], ask: Ask) -> None:
        """Run a job and hand its result on; raises ServerError where the first rows were all rejected."""
        rejections: list[RejectedRequest] = []

        async def noting(request: ChatRequest) -> ChatCompletion:
            try:
                completion = await ask(request)
            except RejectedRequest as error:
                rejections.append(error)
                raise
            self._answered = True
            return completion

        result = await job(noting)
        self._held.append((index, result))
        if self._answered or not rejections:
            self.release()
        elif len(self._held) >= REJECTED_AT_FIRST:
            self._stopped = True
            raise ServerError(
                f"{str(rejections[0]).removesuffix('.')}, nor any of the first {REJECTED_AT_FIRST} rows, though it "
                f"takes {CONTROL_TEXT!r}: change what they share, such as a long system prompt or rubric, "
                "or the server.",
                status=rejections[0].status,
            )

    def release(self) -> None:
        """Hand on what waits, unless the run was stopped for it."""
        while self._held and not self._stopped:
            self._deliver(self._held.pop(0))


def control_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body with the same settings and turns, whose texts say nothing."""
    turns = [{**message, "content": CONTROL_TEXT} for message in body["messages"]]
    return {**body, "messages": turns, **({"seed": 0} if "seed" in body else {})}


def _settings(body: Mapping[str, Any]) -> str:
    return json.dumps(control_body(body), sort_keys=True)


TEXTLESS_LIMIT = 5
"""So many answers of reasoning alone, without one answer that has text before them, are an error."""

_EXTRA_BODY = '{"chat_template_kwargs": {"enable_thinking": false}}'

Item = TypeVar("Item")


def only_reasoning(who: str, option: str) -> str:
    """The sentence that refuses a model which reasons where a text is wanted; `option` is the command line's."""
    return (
        f"{who} reasons before it answers, and its answer ends before there is text: turn reasoning off with "
        f"OpenAIClient(..., extra_body={_EXTRA_BODY.replace('false', 'False')}), or {option} '{_EXTRA_BODY}' on the "
        'command line (for OpenAI\'s own models {"reasoning_effort": "minimal"}), or name a model that does not reason.'
    )


def stop_if_textless(items: Iterable[Item], is_textless: Callable[[Item], bool], sentence: str) -> Iterator[Item]:
    """The items; an error where the first `TEXTLESS_LIMIT` of them are all without text.

    Textless items before the first one with text are held back, so that nothing of a run that is stopped is written.
    After it, and where there are fewer, they pass: one long chain of thought must not stop a run for good.

    Raises:
        ValueError: With `sentence`.
    """
    held: list[Item] = []
    seen_text = False
    for item in items:
        if not seen_text and is_textless(item):
            held.append(item)
            if len(held) == TEXTLESS_LIMIT:
                raise ValueError(sentence)
            continue
        seen_text = True
        yield from held
        held.clear()
        yield item
    yield from held
