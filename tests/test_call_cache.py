"""Answers that were paid for are there the next time: in every process, after a kill, and for their own request."""

import math
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.clients.cache import CallCache
from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import ChatCompletion, Token
from tests.client_cases import asked, client_of, forget_settings, start_script
from tests.fault_server import FaultServer, completion

ANSWER = ChatCompletion("yes", "stop", "tiny")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    forget_settings(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calls.sqlite"


# What is kept


def test_a_second_client_takes_the_same_answer_from_the_file(path):
    request = asked(top_logprobs=2)
    with FaultServer(lambda _: completion("yes", top={"yes": 0.75, "no": 0.25})) as server:
        one = client_of(server, cache=path).complete(request)
        client = client_of(server, cache=path)
        assert client.complete(request) == one
    assert len(server.seen) == 1
    assert (client.usage.calls, client.usage.cached, client.usage.prompt_tokens) == (0, 1, 0)
    assert one.tokens[0].alternatives == (("yes", math.log(0.75)), ("no", math.log(0.25)))


def test_without_a_cache_every_call_is_made():
    with FaultServer() as server:
        client = client_of(server)
        assert client.complete(asked()) == client.complete(asked())
    assert len(server.seen) == 2


def test_equal_requests_of_one_run_are_paid_for_once_and_have_the_answer_that_is_kept(path):
    answers = iter(range(100))
    with FaultServer(lambda _: str(next(answers)), delay=0.05) as server:
        client = client_of(server, cache=path)
        found = dict(client.complete_each([asked("the same")] * 5 + [asked("another")]))
        assert dict(client_of(server, cache=path).complete_each([asked("the same")] * 5 + [asked("another")])) == found
    assert len({found[index].text for index in range(5)}) == 1
    assert len(server.seen) == client.usage.calls == 2
    assert client.usage.cached == 4


BASE = asked("Hello?", seed=1, top_logprobs=3, prefill="Well", json_schema={"type": "object"})


@pytest.mark.parametrize(
    "change",
    [
        {"messages": ({"role": "user", "content": "Hello!"},)},
        {"messages": ({"role": "system", "content": "Hello?"},)},
        {"messages": ({"role": "system", "content": "Be kind."}, *BASE.messages)},
        {"max_tokens": 11},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"seed": 2},
        {"seed": None},
        {"top_logprobs": 4},
        {"top_logprobs": None},
        {"json_schema": {"type": "array"}},
        {"json_schema": None},
        {"prefill": "So"},
        {"prefill": ""},
        {"sample": 1},
    ],
    ids=str,
)
def test_a_key_changes_with_every_part_of_the_request(change):
    client = OpenAIClient("tiny", base_url="http://127.0.0.1:1/v1")
    assert client.key(replace(BASE, **change)) != client.key(BASE)


def test_a_key_changes_with_server_model_and_further_fields_and_with_nothing_else(monkeypatch, path):
    def key(model="tiny", url="http://127.0.0.1:1/v1", **settings):
        return OpenAIClient(model, base_url=url, **settings).key(BASE)

    one = key()
    shaping = {
        key(url="http://127.0.0.1:2/v1"),
        key(model="small"),
        key(extra_body={"min_p": 0.1}),
        key(extra_body={"min_p": 0.2}),
        key(extra_body={"temperature": 0.2}),
        key(limit_field="max_completion_tokens"),
    }
    assert len(shaping | {one}) == 7
    monkeypatch.setenv("PERSONA_LENS_API_KEY", "sk-another")
    assert key(url="http://127.0.0.1:1/v1/", timeout=1, concurrency=3, max_retries=0, cache=path) == one
    monkeypatch.setenv("OTHER", "sk-third")
    assert key(key_variable="OTHER") == one


def test_repeats_of_one_request_are_told_apart_by_their_sample(path):
    with FaultServer() as server:
        client = client_of(server, cache=path)
        requests = [asked(sample=sample) for sample in range(3)]
        assert len(list(client.complete_each(requests))) == 3
        assert client.uncached([*requests, asked(sample=3)]) == [asked(sample=3)]
    assert len(client.cache) == 3
    assert len(server.attempts) == 1  # the sample is not sent


finite = st.floats(max_value=0) | st.just(-math.inf)
tokens = st.builds(Token, st.text(), finite, st.lists(st.tuples(st.text(), finite), max_size=3).map(tuple))
completions = st.fixed_dictionaries(
    {
        "text": st.text(),
        "finish_reason": st.text(),
        "model": st.text(),
        "refusal": st.none() | st.text(),
        "tokens": st.none() | st.lists(tokens, max_size=3).map(tuple),
        "prompt_tokens": st.integers(0, 10**9),
        "completion_tokens": st.integers(0, 10**9),
    }
)


@given(completions)
def test_a_completion_comes_back_from_json_as_it_was(fields):
    completion = ChatCompletion(**fields)
    assert ChatCompletion.from_json(completion.to_json()) == completion


# The file


def test_a_key_keeps_its_first_answer(path):
    cache = CallCache(path)
    cache.put("key", ANSWER)
    cache.put("key", replace(ANSWER, text="no"))
    assert cache.get("key") == ANSWER
    assert cache.get("another") is None
    assert ("key" in cache, "another" in cache, len(cache)) == (True, False, 1)


def written_by_others(path, version, table):
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE TABLE {table} (key TEXT, answer TEXT)")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("version", "table", "words"),
    [
        (None, None, "file is not a database"),
        (2, "answers", "it has version 2, and this persona_lens reads version 1"),
        (0, "bookmarks", "it has version 0, and this persona_lens reads version 1"),
        (1, "bookmarks", "it has other tables, and this persona_lens reads version 1"),
    ],
)
def test_a_file_that_is_something_else_is_refused_and_left_as_it_was(path, version, table, words):
    if table is None:
        path.write_text("Dear diary, " * 200)
    else:
        written_by_others(path, version, table)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"calls\.sqlite is not a cache of calls") as told:
        OpenAIClient("tiny", base_url="http://127.0.0.1:1/v1", cache=path)
    assert str(told.value) == f"{path} is not a cache of calls ({words}): name another file."
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_told_at_once(tmp_path):
    with pytest.raises(OSError, match="it is a folder, and a file is expected"):
        CallCache(tmp_path)


def test_threads_share_one_cache(path):
    cache = CallCache(path)

    def write(number):
        cache.put(str(number % 50), ANSWER)
        return cache.get(str(number % 50))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write, range(400))) == {ANSWER}
    assert len(cache) == 50


def test_caches_of_one_new_file_can_be_opened_at_the_same_moment(tmp_path):
    for number in range(20):
        path, together = tmp_path / f"{number}.sqlite", threading.Barrier(8)

        def open_and_write(name, path=path, together=together):
            together.wait()
            CallCache(path).put(str(name), ANSWER)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(open_and_write, range(8)))
        assert len(CallCache(path)) == 8


def test_a_new_cache_waits_for_whoever_is_about_to_write_the_file(path):
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    leaving = threading.Timer(0.3, other.close)
    leaving.start()
    CallCache(path).put("key", ANSWER)
    leaving.join()
    assert len(CallCache(path)) == 1


def test_processes_may_fill_one_file_at_the_same_time(path):
    script = "print(sum(1 for _ in client_of(url, cache=path).complete_each([asked(n) for n in range(30)])))"
    with FaultServer() as server:
        with start_script(script, server.url, path) as one, start_script(script, server.url, path) as other:
            assert [process.communicate() for process in (one, other)] == [("30\n", "")] * 2
        client = client_of(server, cache=path)
        calls_before = len(server.seen)
        assert len(dict(client.complete_each([asked(number) for number in range(30)]))) == 30
    assert len(server.seen) == calls_before  # a third run asks nothing
    assert len(client.cache) == 30


def test_what_was_answered_before_a_kill_is_in_the_file(path):
    concurrency = 8
    requests = "[asked(number) for number in range(5000)]"
    script = f"list(client_of(url, cache=path, concurrency={concurrency}).complete_each({requests}))"
    with FaultServer(delay=0.01) as server:
        with start_script(script, server.url, path):
            deadline = time.monotonic() + 60
            while sum(server.successes.values()) < 200 and time.monotonic() < deadline:
                time.sleep(0.01)
        answered = len(server.successes)
        client = client_of(server, cache=path)
        assert answered >= 200
        assert answered - concurrency <= len(client.cache) <= answered
        known = len(client.cache)
        requests = [asked(number) for number in range(known + 20)]
        missing = client.uncached(requests)
        before = len(server.seen)
        assert len(dict(client.complete_each(requests))) == len(requests)
        assert len(server.seen) - before == len(missing) <= 20 + concurrency


@pytest.mark.parametrize("is_there", [False, True])
def test_a_link_to_no_file_or_an_empty_one_is_refused(path, tmp_path, is_there):
    target = tmp_path / "target"
    if is_there:
        target.touch()
    path.symlink_to(target)
    with pytest.raises(OSError, match="remove the link, or name another output"):
        CallCache(path)
    assert (target.read_bytes() if target.exists() else None) == (b"" if is_there else None)
    assert sorted(tmp_path.iterdir()) == sorted([path, *([target] if is_there else [])])
