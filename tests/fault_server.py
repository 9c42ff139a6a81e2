"""A local chat server that speaks OpenAI's chat completions, counts what it is asked, and fails by plan.

It runs on a thread of its own: `with FaultServer(answer, faults=...) as server`, and `server.url` is the base URL.
Its answer depends on the request's body alone, so a run among faults must end as one without. A plan chooses a fault by
(body, attempt), where `attempt` counts from 0 how often this body came before, so that runs repeat.
"""

import asyncio
import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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


TopTokens = Mapping[str, float]
"""What could stand at one position of an answer: token to probability."""


def completion(
    text: str, *, top: TopTokens | Sequence[TopTokens] | None = None, finish_reason: str = "stop", **usage: int
) -> Body:
    """A chat completion as OpenAI gives it; `top` has the probabilities of the first token, or of each.

    A position's token is the longest of its mapping with which the text goes on, or else its likeliest. Without `top`
    every word is a token of probability 1. The server adds its model's name, counts prompt tokens as words, and leaves
    out log-probabilities that were not asked for. `usage` may set `prompt_tokens` and `completion_tokens`.
    """
    words = [word + " " for word in text.split(" ")]
    positions = [{word: 1.0} for word in [*words[:-1], words[-1][:-1]]] if top is None else top
    content, rest = [], text
    for each in [positions] if isinstance(positions, Mapping) else positions:
        fitting = [token for token in each if token and rest.startswith(token)]
        token = max(fitting, key=len, default=max(each, key=lambda token: each[token]))
        rest = rest[len(token) :]
        likeliest = sorted(each.items(), key=lambda pair: -pair[1])
        content.append({**_logprob(token, each[token]), "top_logprobs": [_logprob(*pair) for pair in likeliest]})
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}}
    choice |= {"finish_reason": finish_reason, "logprobs": {"content": content, "refusal": None}}
    return {
        "id": "chatcmpl-local",
        "object": "chat.completion",
        "created": 0,
        "choices": [choice],
        "usage": {"completion_tokens": len(content), **usage},
    }


def _logprob(token: str, probability: float) -> Body:
    logprob = math.log(probability) if probability > 0 else -9999.0
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


@dataclass(frozen=True)
class Seen:
    """A request as it came, `at` a time of `time.monotonic`; `outcome` is a status, 'dropped', 'cut' or 'left'."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: Body
    at: float
    attempt: int
    outcome: int | str | None = None


class FaultServer:
    """Serves POST /v1/chat/completions and GET /v1/models on a free port of 127.0.0.1, while it is entered.

    Args:
        answer: Body to completion, or to the text of one; an echo of the last message by default.
        delay: Seconds that every answer takes.
        faults: (body, attempt) to what goes wrong, or None.
        model: What it calls itself; the name that it is asked for by default.
        key: The API key that it wants; None takes any and none.

    Attributes:
        seen: Every request in the order of its end.
        successes: How often each body, in its `canonical` form, was answered in full and without a fault.
        attempts: How often each body came.
        most_in_flight: The most requests that were under way at a time.
        flooded: How many bytes of endless bodies were sent.
    """

    def __init__(
        self,
        answer: Callable[[Body], Body | str] | None = None,
        *,
        delay: float = 0.0,
        faults: Plan | None = None,
        model: str | None = None,
        key: str | None = None,
    ):
        self.answer = answer or (lambda body: f"You said: {body['messages'][-1]['content']}")
        self.delay, self.faults, self.model, self.key = delay, faults, model, key
        self.seen: list[Seen] = []
        self.successes: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = self.port = self.flooded = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def bodies(self) -> list[Body]:
        return [each.body for each in self.seen]

    def __enter__(self) -> "FaultServer":
        self._thread.start()
        assert self._ready.wait(10), "the server did not start"
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the server did not stop"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # cancels what is open at the end
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection lives on."""
        start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        method, path, _ = start.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(content) if content else {}
        name = canonical(body)
        request = Seen(method, path, headers, body, time.monotonic(), self.attempts[name])
        outcome: int | str = "left"
        self.attempts[name] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            fault = self._refusal(request) or (self.faults and self.faults(body, request.attempt)) or Fault()
            if await self._client_left(reader, self.delay + fault.hang):
                return False
            outcome = await self._respond(writer, request, fault)
            if fault == Fault() and path.endswith("/chat/completions"):
                self.successes[name] += 1
            return isinstance(outcome, int) and headers.get("connection", "").lower() != "close"
        finally:
            self.in_flight -= 1
            self.seen.append(replace(request, outcome=outcome))

    def _refusal(self, request: Seen) -> Fault | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return unauthorized()
        served = [("POST", "/v1/chat/completions"), ("GET", "/v1/models")]
        return None if (request.method, request.path) in served else Fault(404, "Not found.")

    @staticmethod
    async def _client_left(reader: asyncio.StreamReader, seconds: float) -> bool:
        """Wait so long, or until the client closes the connection: it sends nothing before it has its answer."""
        if not seconds:
            return False
        try:
            return await asyncio.wait_for(reader.read(1), seconds) == b""
        except TimeoutError:
            return False

    async def _respond(self, writer: asyncio.StreamWriter, request: Seen, fault: Fault) -> int | str:
        if fault.dropped:
            return "dropped"
        if fault.endless:
            return await self._flood(writer, fault)
        if fault.status != 200:
            said = fault.message.replace("{authorization}", request.headers.get("authorization", "none"))
            found: Body | str = {"error": {"message": said, "type": "error", "param": None, "code": None}}
        elif request.method == "GET":
            found = {"object": "list", "data": [{"id": self.model or "model", "object": "model"}]}
        else:
            found = fault.change(self._completion(request.body))
        data = (found if isinstance(found, str) else json.dumps(found)).encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data)), **fault.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        sent = data if fault.cut_at is None else data[: int(len(data) * fault.cut_at)]
        writer.write(f"HTTP/1.1 {fault.status} Said\r\n{head}\r\n".encode() + sent)
        await writer.drain()
        return fault.status if fault.cut_at is None else "cut"

    async def _flood(self, writer: asyncio.StreamWriter, fault: Fault) -> str:
        """Send up to 300 MiB for as long as the client takes them; `flooded` counts the bytes."""
        fields = {"Content-Type": "application/json", "Transfer-Encoding": "chunked", **fault.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {fault.status} Said\r\n{head}\r\n".encode())
        chunk = b" " * 2**20
        with suppress(ConnectionError):
            while self.flooded < 300 * 2**20:
                writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                await writer.drain()
                self.flooded += len(chunk)
        return "flooded"

    def _completion(self, body: Body) -> Body:
        found = self.answer(body)
        answer = completion(found) if isinstance(found, str) else dict(found)
        answer.setdefault("model", self.model or body["model"])
        words = sum(len(message["content"].split()) for message in body["messages"])
        usage = {"prompt_tokens": words, **answer.get("usage", {})}
        answer["usage"] = {**usage, "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"]}
        choices: list[Body] = [dict(choice) for choice in answer["choices"]]
        for choice in choices:
            asked, given = body.get("logprobs"), choice.get("logprobs")
            n = body.get("top_logprobs", 0)
            limited = given and {**given, "content": [_limited(each, n) for each in given["content"]]}
            choice["logprobs"] = limited if asked else None
        return {**answer, "choices": choices}


def _limited(position: Body, n: int) -> Body:
    return {**position, "top_logprobs": position["top_logprobs"][:n]}
