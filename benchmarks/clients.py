"""Calls of a server that takes its time: what a client adds to the waiting that no client can avoid.

The server runs in this process, on a thread of its own, so its work slows the client down too. A row is a call.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.comparison import Claim, Comparison, compare
from benchmarks.texts import Workload
from benchmarks.timing import Contestant
from persona_lens.chat.batches import ChatTokens
from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import ChatRequest
from tests.fault_server import FaultServer

CALLS, CONCURRENCY, DELAY = 500, 20, 0.2
GOAL = 1 / 1.2


def client_throughput(repeats: int) -> list[Comparison]:
    """500 calls, 20 at a time, of a server that answers after 200 ms: the bare waiting, and the client's time."""
    with FaultServer(delay=DELAY) as server, TemporaryDirectory() as folder:
        requests = [ChatRequest(({"role": "user", "content": str(number)},), 10) for number in range(CALLS)]

        def ideal() -> None:
            time.sleep(CALLS / CONCURRENCY * DELAY)

        def asking(*, cached: bool) -> Callable[[], list[str]]:
            def run() -> list[str]:
                path = Path(folder) / f"{time.monotonic_ns()}.sqlite"
                client = OpenAIClient(
                    "model", base_url=server.url, concurrency=CONCURRENCY, cache=path if cached else None
                )
                answers = dict(client.complete_each(requests))
                return [answers[number].text for number in range(CALLS)]

            return run

        contestants = {
            "ideal": [Contestant("waiting alone", ideal)],
            "cache": [Contestant("OpenAIClient with a cache", asking(cached=True))],
            "no cache": [Contestant("OpenAIClient without one", asking(cached=False))],
        }
        name = f"{CALLS} calls of {1000 * DELAY:.0f} ms, {CONCURRENCY} at a time"
        work = Workload(name, (ChatTokens((0,)),) * CALLS, (True,) * CALLS)
        claims = [Claim(each, "ideal", GOAL, cpu_counts=False) for each in ("cache", "no cache")]
        expected = [f"You said: {number}" for number in range(CALLS)]

        def equal_answers(found: list[str]) -> float:
            return sum(one == other for one, other in zip(found, expected, strict=True)) / CALLS

        return [
            compare(
                "Client throughput",
                work,
                contestants,
                claims,
                agreement=equal_answers,
                minimum=1.0,
                repeats=repeats,
            )
        ]
