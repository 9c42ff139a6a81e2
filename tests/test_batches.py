"""Batch files: what OpenAI's Batch API is handed, and its results back into the cache."""

import json

import pytest

from persona_lens.clients.cache import read_batch, write_batch
from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import ChatRequest, ServerError
from tests import judge_servers
from tests.fault_server import FaultServer


@pytest.fixture
def make_client(tmp_path):
    def make(**options):
        settings = {"base_url": "http://127.0.0.1:9/v1", "cache": tmp_path / "calls.sqlite", "max_retries": 0}
        return OpenAIClient("judge-model", **{**settings, **options})

    return make


def requests(n, **fields):
    settings = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "top_logprobs": 20, **fields}
    return [ChatRequest(({"role": "user", "content": f"Text {index}"},), **settings) for index in range(n)]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def result(line, **changes):
    """A line of results for a line of requests, as the Batch API writes it."""
    body = {**judge_servers.whole_numbers(line["body"]), "model": "judge-model-2025-04-14"}
    response = {"status_code": 200, "request_id": "req_1", "body": body}
    return {"id": "batch_req_1", "custom_id": line["custom_id"], "response": response, "error": None, **changes}


def write_results(path, results):
    path.write_text("".join(json.dumps(each) + "\n" for each in results))
    return path


def test_a_batch_file_holds_the_requests_as_the_client_would_post_them(make_client, tmp_path):
    client = make_client()
    [path] = write_batch(client, requests(3), tmp_path / "batches" / "judge.jsonl")

    lines = rows(path)
    assert [line["body"] for line in lines] == [client.body(request) for request in requests(3)]
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    assert len({line["custom_id"] for line in lines}) == 3
    assert max(len(line["custom_id"]) for line in lines) <= 64


def test_results_answer_the_same_requests_without_a_call(make_client, tmp_path):
    [path] = write_batch(make_client(), requests(4), tmp_path / "judge.jsonl")
    results = write_results(tmp_path / "out.jsonl", [result(line) for line in reversed(rows(path))])
    found = read_batch(make_client(), results)

    with FaultServer(judge_servers.whole_numbers) as server:
        direct = dict(make_client(base_url=server.url, cache=None).complete_each(requests(4)))
    from_batch = dict(make_client().complete_each(requests(4)))  # nothing listens where this client would ask

    assert (found.kept, found.failed) == (4, {})
    assert {index: answer.tokens for index, answer in from_batch.items()} == {
        index: answer.tokens for index, answer in direct.items()
    }


def test_what_is_cached_already_is_not_written_again(make_client, tmp_path):
    client = make_client()
    [path] = write_batch(client, requests(2), tmp_path / "first.jsonl")
    read_batch(client, write_results(tmp_path / "out.jsonl", map(result, rows(path))))

    [rest] = write_batch(client, [*requests(3), *requests(3)], tmp_path / "rest.jsonl")

    assert [line["body"]["messages"][0]["content"] for line in rows(rest)] == ["Text 2"]
    assert write_batch(client, requests(2), tmp_path / "none.jsonl") == []
    assert not (tmp_path / "none.jsonl").exists()


def test_a_batch_beyond_the_limits_becomes_several_files(make_client, tmp_path):
    by_count = write_batch(make_client(), requests(5), tmp_path / "count.jsonl", max_requests=2)
    by_size = write_batch(make_client(), requests(5), tmp_path / "size.jsonl", max_bytes=by_count[0].stat().st_size)

    for files, name in ((by_count, "count"), (by_size, "size")):
        assert [file.name for file in files] == [f"{name}.jsonl", f"{name}-2.jsonl", f"{name}-3.jsonl"]
        assert [len(rows(file)) for file in files] == [2, 2, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"response": None, "error": {"code": "batch_expired", "message": "It expired."}}, "It expired."),
        (
            {"response": {"status_code": 429, "body": {"error": {"message": "Slow down."}}}},
            "status 429: Slow down.",
        ),
        ({"response": {"status_code": 200, "body": {"choices": []}}}, "no chat completion"),
    ],
    ids=["expired", "refused", "no choice"],
)
def test_a_failed_request_is_reported_and_asked_for_again(make_client, tmp_path, changes, said):
    client = make_client()
    [path] = write_batch(client, requests(2), tmp_path / "judge.jsonl")
    good, bad = rows(path)
    found = read_batch(client, write_results(tmp_path / "out.jsonl", [result(good), result(bad, **changes)]))

    assert found.kept == 1
    [problem] = found.failed.values()
    assert said in problem
    assert said in str(found)
    assert [request.messages[0]["content"] for request in client.uncached(requests(2))] == ["Text 1"]


def test_an_answer_without_the_log_probabilities_that_were_asked_for_is_a_failed_one(make_client, tmp_path):
    client = make_client()
    [path] = write_batch(client, [*requests(1), *requests(1, top_logprobs=None)], tmp_path / "judge.jsonl")
    results = [result(line) for line in rows(path)]
    for each in results:
        each["response"]["body"]["choices"][0]["logprobs"] = None
    found = read_batch(client, write_results(tmp_path / "out.jsonl", results))

    assert (found.kept, len(found.failed)) == (1, 1)
    assert client.uncached(requests(1)) == requests(1)


def test_foreign_results_are_refused_whole(make_client, tmp_path):
    client = make_client()
    [path] = write_batch(client, requests(2), tmp_path / "judge.jsonl")
    good, other = map(result, rows(path))
    foreign = write_results(tmp_path / "foreign.jsonl", [good, {**other, "custom_id": "row-7"}])
    other["response"]["body"]["model"] = "another-model"
    changed = write_results(tmp_path / "changed.jsonl", [good, other])

    with pytest.raises(ValueError, match=r"foreign\.jsonl, line 2: not a result of these files \('row-7'\)"):
        read_batch(client, foreign)
    with pytest.raises(ServerError, match="'another-model' answered"):
        read_batch(client, changed)
    with pytest.raises(FileNotFoundError, match="download the batch's output file"):
        read_batch(client, tmp_path / "nowhere.jsonl")
    assert len(client.cache) == 0


def test_a_client_without_a_cache_has_no_place_for_results(make_client, tmp_path):
    with pytest.raises(ValueError, match="pass OpenAIClient\\(cache="):
        write_batch(make_client(cache=None), requests(1), tmp_path / "judge.jsonl")
