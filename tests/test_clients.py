"""What a client sends and to whom, how many calls run at a time, and what is left after a failure or an interrupt."""

import asyncio
import signal
import threading
import time

import pytest

from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.endpoint import OPENAI_URL
from persona_lens.clients.requests import CallEstimate, Prices, ServerError, Usage
from tests.client_cases import SECRET, asked, client_of, forget_settings, start_script
from tests.fault_server import FaultServer, completion, hang, other_model, unknown_model


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    forget_settings(monkeypatch)


def content(body):
    return body["messages"][-1]["content"]


# Many at a time


def test_every_request_gets_its_own_answer_and_concurrency_is_reached_and_never_passed():
    with FaultServer(delay=0.05) as server:
        found = list(client_of(server, concurrency=7).complete_each([asked(number) for number in range(40)]))
    assert sorted((index, answer.text) for index, answer in found) == [(n, f"You said: {n}") for n in range(40)]
    assert server.most_in_flight == 7


def test_answers_are_given_as_they_come():
    with FaultServer(faults=lambda body, _: hang(0.5) if content(body) == "0" else None) as server:
        order = [index for index, _ in client_of(server).complete_each([asked(number) for number in range(3)])]
    assert order[-1] == 0


def test_a_job_may_ask_several_times_and_all_of_them_keep_to_the_concurrency():
    async def job(ask):
        one = await ask(asked("begin"))
        others = await asyncio.gather(*(ask(asked(one.text, sample=sample)) for sample in range(4)))
        return len({each.text for each in others})

    with FaultServer(delay=0.02) as server:
        client = client_of(server, concurrency=3)
        assert dict(client.run_each([job] * 6)) == dict.fromkeys(range(6), 1)
    assert client.usage.calls == len(server.seen) == 30
    assert server.most_in_flight == 3


def test_after_a_failure_what_runs_is_finished_given_and_kept_and_no_more_is_begun(tmp_path):
    def fails(body, _):
        return unknown_model() if content(body) == "3" else hang(0.5)

    found = []
    with FaultServer(faults=fails) as server:
        client = client_of(server, concurrency=4, cache=tmp_path / "calls.sqlite")
        with pytest.raises(ServerError, match="answered 404"):
            found.extend(client.complete_each([asked(number) for number in range(50)]))
    assert sorted(index for index, _ in found) == [0, 1, 2]
    assert [asked(number) in client.uncached([asked(number)]) for number in range(5)] == [False] * 3 + [True] * 2
    assert len(server.seen) == 4


def test_an_error_of_a_job_itself_is_raised():
    async def job(ask):
        await ask(asked())
        raise ZeroDivisionError("of my own")

    with FaultServer() as server, pytest.raises(ZeroDivisionError, match="of my own"):
        list(client_of(server).run_each([job]))


# Interrupts, threads and notebooks


def test_an_iterator_that_is_left_drops_its_calls_and_its_threads_and_the_client_goes_on():
    before = set(threading.enumerate())
    with FaultServer(faults=lambda body, _: None if content(body) in ("0", "again") else hang()) as server:
        client, running = client_of(server, concurrency=5), set(threading.enumerate())
        answers = client.complete_each([asked(number) for number in range(20)])
        assert next(answers)[0] == 0
        started = time.monotonic()
        answers.close()
        assert time.monotonic() - started < 20  # a hang takes sixty seconds
        assert set(threading.enumerate()) == running
        assert client.complete(asked("again")).text == "You said: again"
        assert len(server.attempts) <= 7
    assert set(threading.enumerate()) == before


def test_an_interrupt_ends_a_run_at_once_and_the_client_can_be_used_again(tmp_path):
    script = """
import threading
client = client_of(url)
try:
    list(client.complete_each([asked(number) for number in range(20)]))
except KeyboardInterrupt:
    print("interrupted", threading.active_count(), client.complete(asked("again")).text)
"""
    with (
        FaultServer(faults=lambda body, _: None if content(body) == "again" else hang()) as server,
        start_script(script, server.url, tmp_path) as process,
    ):
        deadline = time.monotonic() + 60
        while server.in_flight < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert process.communicate(timeout=300) == ("interrupted 1 You said: again\n", "")
        assert time.monotonic() - sent < 20


def test_a_client_works_inside_a_running_event_loop():
    async def cell(client):
        return client.complete(asked("from a notebook")).text

    with FaultServer() as server:
        assert asyncio.run(cell(client_of(server))) == "You said: from a notebook"


def test_threads_may_share_a_client():
    with FaultServer() as server:
        client, found = client_of(server), {}
        threads = [
            threading.Thread(target=lambda n=number: found.update({n: client.complete(asked(n)).text}))
            for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: f"You said: {number}" for number in range(4)}


# What is sent


def sent_body(request, **settings):
    with FaultServer() as server:
        client = client_of(server, **settings)
        client.complete(request)
    assert server.bodies == [client.body(request)]
    return server.bodies[0]


def test_a_plain_request_sends_messages_and_settings_and_nothing_else():
    messages = [{"role": "user", "content": "Hello?"}]
    plain = {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 1.0, "top_p": 1.0}
    assert sent_body(asked()) == plain
    assert sent_body(asked(), limit_field="max_completion_tokens") == {
        **{name: value for name, value in plain.items() if name != "max_tokens"},
        "max_completion_tokens": 10,
    }
    assert sent_body(asked(seed=5, temperature=0.0, top_p=0.9)) == {
        **plain,
        "seed": 5,
        "temperature": 0.0,
        "top_p": 0.9,
    }
    assert sent_body(asked(top_logprobs=20)) == {**plain, "logprobs": True, "top_logprobs": 20}
    schema = {"type": "object", "properties": {"score": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    assert sent_body(asked(json_schema=schema)) == {**plain, "response_format": form}
    continued = {"messages": [*messages, {"role": "assistant", "content": "Well,"}]}
    continued |= {"add_generation_prompt": False, "continue_final_message": True}
    assert sent_body(asked(prefill="Well,")) == {**plain, **continued}
    thinking = {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 0.25}
    assert sent_body(asked(), extra_body=thinking) == {**plain, **thinking}


# Whose model


@pytest.mark.parametrize(
    ("asked_for", "answered"),
    [
        ("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14"),
        ("gpt-4.1-mini-2025-04-14", "gpt-4.1-mini"),
        ("gpt-4", "gpt-4-0613"),
        ("claude", "claude@20240620"),
        ("openai/gpt-4.1-mini", "gpt-4.1-mini-2025-04-14"),
        ("qwen2.5-7b-instruct", "/models/Qwen2.5-7B-Instruct-Q4_K_M.gguf"),
        ("qwen2.5-7b-instruct", "C:\\models\\qwen2.5-7b-instruct.Q8_0-00001-of-00002.gguf"),
        ("unsloth/Qwen3-4B-GGUF:Q4_K_M", "Qwen3-4B"),
        ("smollm2", "smollm2:latest"),
        ("Qwen/Qwen3-8B", "Qwen3-8B-FP8"),
        ("tiny", ""),
    ],
)
def test_a_model_under_another_form_of_its_name_is_the_same(asked_for, answered):
    with FaultServer(model=answered) as server:
        assert client_of(server, asked_for).complete(asked()).text


@pytest.mark.parametrize(
    ("asked_for", "answered"),
    [
        ("gpt-4.1", "gpt-4.1-mini"),
        ("gpt-4.1-mini", "gpt-4.1"),
        ("gpt-4.1", "gpt-4.1-mini-2025-04-14"),
        ("gpt-4", "gpt-4.1"),
        ("llama-3", "llama-3.1-8b"),
        ("Qwen3", "Qwen3-8B"),
        ("gpt-4.1-mini-2025-04-14", "gpt-4.1-mini-2026-01-01"),
        ("tiny", "huge"),
    ],
)
def test_another_model_is_refused_by_name(asked_for, answered):
    with FaultServer(faults=lambda *_: other_model(answered)) as server, pytest.raises(ServerError) as told:
        client_of(server, asked_for).complete(asked())
    assert f"was asked for the model {asked_for!r}, and {answered!r} answered" in str(told.value)


# What it costs


def test_usage_adds_up_what_the_server_counted():
    with FaultServer(lambda body: completion("So it is.", prompt_tokens=1000, completion_tokens=50)) as server:
        client = client_of(server, prices=Prices(0.40, 1.60))
        list(client.complete_each([asked(number) for number in range(3)]))
    assert client.usage == Usage(3, 0, 0, 3000, 150, Prices(0.40, 1.60))
    assert client.usage.cost == pytest.approx((3000 * 0.40 + 150 * 1.60) / 1e6)
    assert str(client.usage) == (
        "3 calls (0 more from the cache, 0 retries), 3,000 prompt and 150 completion tokens, less than $0.01"
    )


def test_an_estimate_counts_the_missing_calls_and_asks_nothing(tmp_path):
    with FaultServer() as server:
        client = client_of(server, cache=tmp_path / "calls.sqlite", prices=Prices(10_000, 1_000_000))
        client.complete(asked("known"))
        estimate = client.estimate([asked("known"), asked("a" * 67), asked("b" * 67, max_tokens=20)])
        assert len(server.seen) == 1
    # [{"role": "user", "content": "..."}] are 35 bytes around 67: a quarter of 102, and one more.
    assert estimate == CallEstimate(3, 1, 2 * 26, 30, pytest.approx(0.52 + 30))
    assert str(estimate) == (
        "3 calls, 1 of them in the cache; the rest would send about 52 tokens and receive at most 30, about $30.52"
    )


def test_without_a_cache_an_estimate_counts_equal_requests_as_the_calls_that_they_are(tmp_path):
    client = OpenAIClient("tiny", base_url="http://127.0.0.1:1/v1")
    assert client.estimate([asked()] * 3)[:2] == (3, 0)
    assert client.estimate([asked()] * 3).completion_tokens == 30
    cached = OpenAIClient("tiny", base_url="http://127.0.0.1:1/v1", cache=tmp_path / "calls.sqlite")
    assert cached.estimate([asked()] * 3).completion_tokens == 10


def test_list_prices_are_those_of_openai_and_of_no_server_that_borrows_a_name(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert OpenAIClient("gpt-4.1-mini").usage.prices == Prices(0.40, 1.60)
    assert OpenAIClient("gpt-4.1-mini", base_url=OPENAI_URL).usage.prices == Prices(0.40, 1.60)
    assert OpenAIClient("gpt-4.1-mini", base_url="http://127.0.0.1:1/v1").usage.prices is None
    assert OpenAIClient("gpt-4.1-mini", base_url="http://127.0.0.1:1/v1").estimate([asked()]).cost is None
