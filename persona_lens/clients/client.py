"""One client for every server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama and others.

Many calls run at a time. The openai SDK retries those that failed for the moment (408, 409, 429, 5xx, dropped
connections, timeouts) after the time that the server names, or else after 0.5, 1, 2, ... 8 seconds.

A request that is rejected for good (400, 413, 422) is that row's own fault, for example because its text is too long,
only if the server takes other requests with the same settings. If it has answered none since the request was sent, a
control request finds out: the same body with "Hello" in place of every text. If the server takes that and yet none of
the first 20 rows, what these rows share is at fault, and the run stops before one of them is kept as rejected.
"""

import json
import queue
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from persona_lens.clients.cache import CallCache
from persona_lens.clients.endpoint import NO_KEY, OPENAI_URL, PASSING, Endpoint
from persona_lens.clients.requests import (
    LIST_PRICES,
    CallEstimate,
    ChatCompletion,
    ChatRequest,
    ErrorAnswer,
    MissingLogprobs,
    Prices,
    RejectedRequest,
    ServerError,
    UnusableAnswer,
    Usage,
    read_completion,
    request_key,
)
from persona_lens.storage.text import missing_package

if TYPE_CHECKING:
    import openai

CONTROL_TEXT = "Hello"
REJECTED_AT_FIRST = 20
"""A run stops where this many rows were all rejected and none was answered before."""

Ask = Callable[[ChatRequest], Awaitable[ChatCompletion]]
Result = TypeVar("Result")


class OpenAIClient:
    """Asks a model on a server; works in notebooks, from threads, and again after an interrupt.

    Args:
        model: The model's name on the server.
        base_url: The server's address, such as `http://localhost:8000/v1`; `$OPENAI_BASE_URL` or OpenAI by default.
        key_variable: The environment variable that holds the key. By default `OPENAI_API_KEY` without a `base_url` or
            with OpenAI's; with another, `PERSONA_LENS_API_KEY` if it is set: OpenAI's key goes to no other server.
        concurrency: Calls at a time.
        max_retries: Retries of a call that failed for the moment.
        timeout: Seconds that one try may take.
        cache: A file that keeps every answer as it comes, and gives it the next time; None keeps none.
        prices: US dollars per million tokens, for estimates.
        limit_field: The server's name for the length limit; OpenAI's reasoning models want `max_completion_tokens`.
        extra_body: Further fields for every request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.
        aliases: Other names under which the server may say that the model answered, such as the model behind a
            deployment; any further name is refused.

    Raises:
        ImportError: The package openai is not installed.
        ValueError: The URL is none, or carries a password or a query.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_variable: str | None = None,
        concurrency: int = 20,
        max_retries: int = 6,
        timeout: float = 60.0,
        cache: str | Path | None = None,
        prices: Prices | None = None,
        limit_field: str = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ):
        try:
            import openai  # noqa: F401 (report a missing package before anything is planned)
        except ImportError as error:
            raise missing_package("OpenAIClient", "openai", extra="servers") from error
        if concurrency < 1 or max_retries < 0 or timeout <= 0:
            raise ValueError(
                "Expected concurrency >= 1, max_retries >= 0 and timeout > 0; "
                f"got {concurrency}, {max_retries} and {timeout:g}."
            )
        self.endpoint = Endpoint.of(model, base_url, key_variable, aliases)
        self.concurrency, self.max_retries, self.timeout = concurrency, max_retries, timeout
        self.cache = None if cache is None else CallCache(cache)
        list_prices = LIST_PRICES.get(model) if self.endpoint.url == OPENAI_URL else None
        self.usage = Usage(prices=prices or list_prices)
        self.limit_field, self.extra_body = limit_field, dict(extra_body or {})

    def __repr__(self) -> str:
        return f"OpenAIClient({self.name})"

    @property
    def name(self) -> str:
        """Model with its aliases, server and further fields: all that shapes an answer beside the request."""
        extra = "".join(f", {name} {value!r}" for name, value in self.extra_body.items())
        return f"{self.endpoint.model_name} at {self.endpoint.url}{extra}"

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The JSON body to post for a request."""
        return {**request.body(self.endpoint.model, limit_field=self.limit_field), **self.extra_body}

    def key(self, request: ChatRequest) -> str:
        """The name of the request's answer in the cache and in batch files."""
        return request_key(self.body(request), url=self.endpoint.url, sample=request.sample)

    def uncached(self, requests: Sequence[ChatRequest]) -> list[ChatRequest]:
        """The requests, each once, that the cache has no answer to."""
        distinct = {self.key(request): request for request in requests}
        return [request for key, request in distinct.items() if self.cache is None or key not in self.cache]

    def estimate(self, requests: Sequence[ChatRequest]) -> CallEstimate:
        """The number of calls, and the cost of those that are not in the cache; asks nothing."""
        missing = requests if self.cache is None else self.uncached(requests)
        return CallEstimate.of(missing, cached=len(requests) - len(missing), prices=self.usage.prices)

    def complete(self, request: ChatRequest) -> ChatCompletion:
        """The answer to one request; raises as `run_each` does."""
        only: list[Callable[[Ask], Awaitable[ChatCompletion]]] = [lambda ask: ask(request)]
        [(_, completion)] = self.run_each(only)
        return completion

    def complete_each(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatCompletion]]:
        """Yield (index, answer) of every request, as they come; see `run_each`.

        A request that the server rejects for good while it takes others, such as one longer than its context, yields
        a completion without text whose `rejection` says why.
        """

        def job(request: ChatRequest) -> Callable[[Ask], Awaitable[ChatCompletion]]:
            async def answer(ask: Ask) -> ChatCompletion:
                try:
                    return await ask(request)
                except RejectedRequest as error:
                    return ChatCompletion("", "rejected", self.endpoint.model, rejection=str(error))

            return answer

        return self.run_each([job(request) for request in requests])

    def run_each(self, jobs: Sequence[Callable[[Ask], Awaitable[Result]]]) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) of every job, as they finish; a job calls `await ask(request)` as often as it needs.

        At most `concurrency` jobs and `concurrency` calls run at a time. After a job fails, no further one begins,
        those that run are finished and yielded, and then the error is raised. An iterator that is left early, as by an
        interrupt, drops the calls that run. Without jobs it needs neither key nor network.

        Raises:
            ValueError: The server needs a key, and its variable is not set.
            ServerError: The server could not be asked, takes no request with these settings, or none of the first rows.
            RejectedRequest: It takes other requests, but not this one; a job may catch it.
            UnusableAnswer: It answered every time, with no chat completion or without log-probabilities.
        """
        from anyio.from_thread import start_blocking_portal

        if not jobs:
            return
        _ = self.endpoint.key  # raises for a missing one, before anything begins
        # The event loop runs in a thread of its own, because a notebook already runs one in this thread.
        results: queue.SimpleQueue[tuple[int, Result] | None] = queue.SimpleQueue()
        with start_blocking_portal() as portal:
            work = portal.start_task_soon(self._work, jobs, results.put)
            work.add_done_callback(lambda _: results.put(None))
            try:
                while (item := results.get()) is not None:
                    yield item
            finally:
                work.cancel()
            work.result()

    async def _work(
        self, jobs: Sequence[Callable[[Ask], Awaitable[Result]]], deliver: Callable[[tuple[int, Result]], None]
    ) -> None:
        import anyio
        import openai

        from persona_lens.clients.connection import MAX_ANSWER_BYTES, BoundedHttpClient

        limiter, failures, waiting = anyio.Semaphore(self.concurrency), [], iter(enumerate(jobs))
        equals: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        controls, results = Controls(), Results(deliver)
        async with openai.AsyncOpenAI(
            api_key=self.endpoint.key or NO_KEY,
            base_url=self.endpoint.url,
            timeout=self.timeout,
            max_retries=self.max_retries,
            default_headers=self.endpoint.withheld_headers,
            http_client=BoundedHttpClient(max_bytes=MAX_ANSWER_BYTES, timeout=self.timeout),
        ) as sdk:

            async def send(body: dict[str, Any]) -> ChatCompletion:
                async with limiter:
                    return await self._send(sdk, controls, body)

            async def ask(request: ChatRequest) -> ChatCompletion:
                return await self._ask(send, equals, request)

            async def worker() -> None:
                for index, job in waiting:
                    if failures:
                        return
                    try:
                        await results.add(index, job, ask)
                    except Exception as error:  # raised below, once the jobs that run have finished
                        failures.append(error)

            async with anyio.create_task_group() as group:
                for _ in range(min(self.concurrency, len(jobs))):
                    group.start_soon(worker)
        results.release()
        if failures:
            raise failures[0]

    async def _ask(
        self,
        send: Callable[[dict[str, Any]], Awaitable[ChatCompletion]],
        equals: Mapping[str, Any],
        request: ChatRequest,
    ) -> ChatCompletion:
        body = self.body(request)
        if self.cache is None:
            return await send(body)
        key = request_key(body, url=self.endpoint.url, sample=request.sample)
        # Of equal requests only one is paid for; the others wait and take its answer from the cache.
        async with equals[key]:
            if (answer := self.cache.get(key)) is not None:
                self.usage.cached += 1
                return answer
            completion = await send(body)
            self.cache.put(key, completion)
            return completion

    async def _send(self, sdk: "openai.AsyncOpenAI", controls: "Controls", body: dict[str, Any]) -> ChatCompletion:
        """Post a request; where it is rejected, find out whether the server takes others."""
        sent_at = time.monotonic()
        try:
            completion = await self._post(sdk, body)
        except RejectedRequest as error:
            if await controls.takes_others(body, since=sent_at, post=lambda control: self._post(sdk, control)):
                self.usage.rejected += 1
                raise
            message = f"{str(error).removesuffix('.')}, nor {CONTROL_TEXT!r} with the same settings: change these."
            raise ServerError(message, status=error.status) from None
        controls.answered(body)
        return completion

    async def _post(self, sdk: "openai.AsyncOpenAI", body: dict[str, Any]) -> ChatCompletion:
        """Post until a usable answer comes: the SDK retries what failed, this what came and cannot be used."""
        import anyio
        import openai

        unusable: UnusableAnswer | None = None
        tries = self.max_retries + 1
        for attempt in range(tries):
            if attempt:
                self.usage.retries += 1
                await anyio.sleep(min(0.25 * 2 ** (attempt - 1), 2.0))  # the server is up and not too busy
            try:
                raw = await sdk.chat.completions.with_raw_response.create(
                    model=self.endpoint.model, messages=body["messages"], extra_body=body
                )
            except openai.OpenAIError as error:
                # Without its cause, which may repeat the key.
                raise self.endpoint.explain(error, tries=tries, timeout=self.timeout) from None
            self.usage.retries += raw.retries_taken
            try:
                completion = read_completion(raw.content, with_logprobs="logprobs" in body)
            except UnusableAnswer as error:
                unusable = error
                if isinstance(error, ErrorAnswer) and error.status not in PASSING:
                    break
                continue
            self.endpoint.check(completion.model)
            self.usage.add(completion)
            return completion
        if isinstance(unusable, ErrorAnswer):
            raise self.endpoint.explain_status(unusable.status, unusable.said, tries=tries)
        lacking = isinstance(unusable, MissingLogprobs)
        remedy = "ask it for none, or another server" if lacking else "check that it serves chat completions"
        message = f"{self.endpoint.url} gave {unusable} in {tries} tries: {remedy}."
        raise MissingLogprobs(message) if lacking else UnusableAnswer(message)


class Controls:
    """Which settings the server is known to take, in one run; for one event loop."""

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
        """Whether the server takes other requests with the settings of a rejected one, which was sent at `since`.

        Posts a control request unless an answer since then has shown it; raises what `post` raises where that fails.
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
    """Delivers the results of a run's jobs; those of rejected requests wait until the server has answered one."""

    def __init__(self, deliver: Callable[[tuple[int, Result]], None]):
        self._deliver = deliver
        self._waiting: list[tuple[int, Result]] = []
        self._answered = self._stopped = False

    async def add(self, index: int, job: Callable[[Ask], Awaitable[Result]], ask: Ask) -> None:
        """Run a job and deliver its result; raises ServerError where the first rows were all rejected."""
        rejections: list[RejectedRequest] = []

        async def noting(request: ChatRequest) -> ChatCompletion:
            try:
                completion = await ask(request)
            except RejectedRequest as error:
                rejections.append(error)
                raise
            self._answered = True
            return completion

        self._waiting.append((index, await job(noting)))
        if self._answered or not rejections:
            self.release()
        elif len(self._waiting) >= REJECTED_AT_FIRST:
            self._stopped = True
            raise ServerError(
                f"{str(rejections[0]).removesuffix('.')}, nor any of the first {REJECTED_AT_FIRST} rows, though it "
                f"takes {CONTROL_TEXT!r}: change what they share, such as a long system prompt or rubric, "
                "or the server.",
                status=rejections[0].status,
            )

    def release(self) -> None:
        """Deliver what waits, unless the run was stopped for it."""
        while self._waiting and not self._stopped:
            self._deliver(self._waiting.pop(0))


def control_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body with the same settings and turns, whose texts say nothing."""
    turns = [{**message, "content": CONTROL_TEXT} for message in body["messages"]]
    return {**body, "messages": turns, **({"seed": 0} if "seed" in body else {})}


def _settings(body: Mapping[str, Any]) -> str:
    return json.dumps(control_body(body), sort_keys=True)
