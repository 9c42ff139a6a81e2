"""One client for every server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama and others.

Calls run many at a time over the openai SDK, which repeats those that failed for the moment (408, 409, 429, 5xx,
dropped connections, timeouts) after the time that the server names, or else after 0.5, 1, 2, ... 8 seconds.
A request that the server rejects for good (400, 413, 422) while it takes others is told apart from a server that fails.
Knows nothing about traits or judges: requests go out, completions come in, and a cache keeps each as it comes.
"""

import queue
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.clients.cache import CallCache
from persona_lens.clients.endpoint import NO_KEY, OPENAI_URL, PASSING, Endpoint
from persona_lens.clients.refusals import CONTROL_TEXT, Ask, Controls, Result, Results
from persona_lens.clients.requests import (
    ChatCompletion,
    ChatRequest,
    ErrorAnswer,
    MissingLogprobs,
    RejectedRequest,
    ServerError,
    UnusableAnswer,
    read_completion,
    request_key,
)
from persona_lens.clients.usage import LIST_PRICES, CallEstimate, Prices, Usage, estimate_calls
from persona_lens.storage.text import missing_package

if TYPE_CHECKING:
    import openai


class OpenAIClient:
    """Asks a model on a server; safe to use in notebooks, from threads, and again after an interrupt.

    Args:
        model: The name under which the server knows it.
        base_url: Where the server is, such as `http://localhost:8000/v1`; `$OPENAI_BASE_URL` or OpenAI by default.
        key_variable: The environment variable that holds the key. By default `OPENAI_API_KEY` without a `base_url` or
            with OpenAI's; with another, `PERSONA_LENS_API_KEY` where it is set: OpenAI's key goes to no other server.
        concurrency: How many calls run at a time.
        max_retries: How often a call is repeated that failed for the moment.
        timeout: Seconds that one try may take.
        cache: A file that keeps every answer as it comes, and from which it is taken the next time; None keeps none.
        prices: US dollars a million tokens, for estimates.
        limit_field: What the server calls the length limit; OpenAI's reasoning models want `max_completion_tokens`.
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
            import openai  # noqa: F401 (a missing package is better told before anything is planned)
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
        known = LIST_PRICES.get(model) if self.endpoint.url == OPENAI_URL else None
        self.usage = Usage(prices=prices or known)
        self.limit_field, self.extra_body = limit_field, dict(extra_body or {})

    def __repr__(self) -> str:
        return f"OpenAIClient({self.name})"

    @property
    def name(self) -> str:
        """Model, with its aliases, server and further fields: what shapes an answer beside the request."""
        extra = "".join(f", {name} {value!r}" for name, value in self.extra_body.items())
        return f"{self.endpoint.model_name} at {self.endpoint.url}{extra}"

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The JSON body that is posted for a request."""
        return {**request.body(self.endpoint.model, limit_field=self.limit_field), **self.extra_body}

    def key(self, request: ChatRequest) -> str:
        """What names the request's answer in the cache and in batch files."""
        return request_key(self.body(request), url=self.endpoint.url, sample=request.sample)

    def uncached(self, requests: Sequence[ChatRequest]) -> list[ChatRequest]:
        """The requests, each once, that the cache has no answer to."""
        distinct = {self.key(request): request for request in requests}
        return [request for key, request in distinct.items() if self.cache is None or key not in self.cache]

    def estimate(self, requests: Sequence[ChatRequest]) -> CallEstimate:
        """How many calls these are, and what those that are not in the cache would cost; asks nothing."""
        missing = requests if self.cache is None else self.uncached(requests)
        return estimate_calls(missing, cached=len(requests) - len(missing), prices=self.usage.prices)

    def complete(self, request: ChatRequest) -> ChatCompletion:
        """The answer to one request; raises as `run_each` does, and RejectedRequest where the server rejects it."""
        only: list[Callable[[Ask], Awaitable[ChatCompletion]]] = [lambda ask: ask(request)]
        [(_, completion)] = self.run_each(only)
        return completion

    def complete_each(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatCompletion]]:
        """(index, answer) of every request, as they come; see `run_each`.

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
        """(index, result) of every job, as they finish; a job asks as often as it needs to, with `await ask(request)`.

        At most `concurrency` jobs run and `concurrency` calls are under way. After a job that fails no further one is
        begun, those that run are finished and yielded, and then the error is raised. An iterator that is left early,
        as by an interrupt, drops the calls under way. No jobs need neither key nor network.

        Raises:
            ValueError: The server needs a key, and its variable is not set.
            ServerError: The server could not be asked, takes no request with these settings, or none of the first rows.
            RejectedRequest: It takes other requests, but not this one; a job may catch it.
            UnusableAnswer: It answered every time, with no chat completion or without log-probabilities.
        """
        from anyio.from_thread import start_blocking_portal

        if not jobs:
            return
        _ = self.endpoint.key  # a missing one is told here, before anything is begun
        # An event loop in a thread of its own: a notebook runs one already in this thread.
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

        from persona_lens.clients.endpoint import MAX_ANSWER_BYTES, BoundedHttpClient

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
                    except Exception as error:  # raised below, once what runs has finished
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
        # Of requests that are equal one is paid for, and the others have the answer that the cache keeps.
        async with equals[key]:
            if (found := self.cache.get(key)) is not None:
                self.usage.cached += 1
                return found
            completion = await send(body)
            self.cache.put(key, completion)
            return completion

    async def _send(self, sdk: "openai.AsyncOpenAI", controls: Controls, body: dict[str, Any]) -> ChatCompletion:
        """Post a request; where it is rejected, find out whether the server takes others."""
        sent_at = time.monotonic()
        try:
            completion = await self._post(sdk, body)
        except RejectedRequest as error:
            if await controls.takes_others(body, since=sent_at, post=lambda control: self._post(sdk, control)):
                self.usage.rejected += 1
                raise
            told = f"{str(error).removesuffix('.')}, nor {CONTROL_TEXT!r} with the same settings: change these."
            raise ServerError(told, status=error.status) from None
        controls.answered(body)
        return completion

    async def _post(self, sdk: "openai.AsyncOpenAI", body: dict[str, Any]) -> ChatCompletion:
        """Post until a usable answer comes: the SDK repeats what failed, and this what came and cannot be used."""
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
        told = f"{self.endpoint.url} gave {unusable} in {tries} tries: {remedy}."
        raise MissingLogprobs(told) if lacking else UnusableAnswer(told)
