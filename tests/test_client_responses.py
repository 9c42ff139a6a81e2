"""What a client makes of responses: nulls, parts, errors that come with success, redirects, and endless bodies."""

import json
import logging

import pytest

from persona_lens.clients import connection
from persona_lens.clients.client import OpenAIClient, control_body
from persona_lens.clients.requests import RejectedRequest, ServerError, UnusableAnswer, read_completion
from tests.client_cases import SECRET, asked, client_of, forget_settings
from tests.fault_server import Fault, FaultServer, always, bad_request, completion, error_in_success, redirect, too_many


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    forget_settings(monkeypatch)


# Redirects


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_is_not_followed_and_is_told(status, monkeypatch):
    monkeypatch.setenv("PERSONA_LENS_API_KEY", SECRET)
    with FaultServer() as elsewhere:
        target = f"{elsewhere.url}/chat/completions?token={SECRET}"
        with FaultServer(faults=always(redirect(target, status))) as server, pytest.raises(ServerError) as told:
            client_of(server).complete(asked("a secret"))
    assert not elsewhere.seen
    assert len(server.seen) == 1
    assert str(told.value) == (
        f"{server.url} answered {status}, a redirect to {elsewhere.url}: "
        "no redirect is followed, so pass that URL yourself if you trust it."
    )


@pytest.mark.parametrize("location", ["//127.0.0.2:9/v1", "https://127.0.0.1/v1", "http://[bad", "/v1/elsewhere", ""])
def test_no_form_of_a_redirect_is_followed(location):
    with (
        FaultServer(faults=always(redirect(location, 308))) as server,
        pytest.raises(ServerError, match=r"answered 308, a redirect to .*: no redirect is followed"),
    ):
        client_of(server).complete(asked())
    assert len(server.seen) == 1


def test_a_proxy_that_the_environment_names_is_used(monkeypatch):
    with FaultServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        with pytest.raises(ServerError, match="answered 404"):  # the test server knows no absolute path
            OpenAIClient("tiny", base_url="http://models.invalid/v1", max_retries=0).complete(asked())
    assert [each.path for each in proxy.seen] == ["http://models.invalid/v1/chat/completions"]


# Size


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_body_without_an_end_is_left_after_some_megabytes(status):
    with FaultServer(faults=always(Fault(status, endless=True))) as server, pytest.raises(ServerError) as told:
        client_of(server).complete(asked())
    assert str(told.value) == (
        f"{server.url} sent an answer of more than 16 MiB, and the rest was not read: "
        "lower the length limit, or check that it serves chat completions."
    )
    assert 16 * 2**20 <= server.flooded < 40 * 2**20  # what stands in the buffers of the connection is sent too
    assert len(server.attempts) == 1 == sum(server.attempts.values())


def test_a_compressed_answer_is_not_unpacked():
    with (
        FaultServer(faults=always(Fault(headers={"Content-Encoding": "gzip"}))) as server,
        pytest.raises(ServerError, match="sent an answer compressed as 'gzip', which was not asked for"),
    ):
        client_of(server).complete(asked())
    assert server.seen[0].headers["accept-encoding"] == "identity"


def test_an_answer_that_trickles_is_given_up_after_the_timeout(monkeypatch):
    read = connection.BoundedHttpClient._read

    async def slowly(self, response):
        import anyio

        await anyio.sleep(5)
        return await read(self, response)

    monkeypatch.setattr(connection.BoundedHttpClient, "_read", slowly)
    with FaultServer() as server, pytest.raises(ServerError, match=r"did not answer within 0\.2 s in 1 tries"):
        client_of(server, timeout=0.2, max_retries=0).complete(asked())


# Nulls and parts


def changed(**changes):
    """A server's answer whose choice, usage or log-probabilities are changed."""

    def change(answer):
        choice = {**answer["choices"][0], **changes.get("choice", {})}
        for place in choice["logprobs"]["content"] if choice["logprobs"] else ():
            place |= changes.get("place", {})
            for alternative in place["top_logprobs"] or ():
                alternative |= changes.get("alternative", {}) if alternative["token"] == "no" else {}
        return {**answer, "choices": [choice], **changes.get("answer", {})}

    return Fault(change=change)


def asked_once(fault, **fields):
    """The answer among a fault that is not to be one, asked for once."""
    said = completion("85", top={"85": 0.5, "no": 0.25})
    with FaultServer(lambda _: said, faults=always(fault)) as server:
        found = client_of(server).complete(asked(**fields))
    assert len(server.seen) == 1
    return found


def one_token(fault, **fields):
    tokens = asked_once(fault, **fields).tokens
    assert tokens is not None
    return tokens


def test_top_log_probabilities_that_are_null_are_absent():
    [token] = one_token(changed(place={"top_logprobs": None}), top_logprobs=5)
    assert (token.text, token.logprob, token.alternatives) == ("85", pytest.approx(-0.693147), ())


def test_a_log_probability_that_is_null_leaves_the_others():
    [token] = one_token(changed(alternative={"logprob": None}), top_logprobs=5)
    assert token.alternatives == (("85", pytest.approx(-0.693147)),)
    [token] = one_token(changed(place={"logprob": None}), top_logprobs=5)
    assert token.logprob is None
    assert [text for text, _ in token.alternatives] == ["85", "no"]


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": None, "completion_tokens": None}, {}])
def test_usage_that_is_null_is_no_tokens(usage):
    found = asked_once(changed(answer={"usage": usage, "model": None}))
    assert (found.text, found.prompt_tokens, found.completion_tokens) == ("85", 0, 0)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([{"type": "text", "text": "8"}, {"type": "text", "text": "5"}], "85"),
        ([{"type": "thinking", "thinking": [{"text": "Hm."}]}, {"type": "text", "text": "85"}], "85"),
        (["85", None, {"type": "text", "text": None}], "85"),
        ([], ""),
    ],
)
def test_content_in_parts_is_the_text_of_the_parts(content, text):
    assert asked_once(changed(choice={"message": {"content": content, "refusal": None}})).text == text


# Errors that come with success


def test_an_error_that_comes_with_success_says_the_servers_own_message(monkeypatch):
    monkeypatch.setenv("PERSONA_LENS_API_KEY", SECRET)
    fault = error_in_success({"message": f"Out of credit for {SECRET}.", "code": 402})
    with FaultServer(faults=always(fault)) as server, pytest.raises(ServerError) as told:
        client_of(server).complete(asked())
    assert type(told.value) is ServerError
    assert str(told.value).startswith(f"{server.url} answered 402 (Out of credit for [key].): ")
    assert len(server.seen) == 1


def test_an_error_with_success_that_may_pass_is_asked_again():
    with (
        FaultServer(faults=always(error_in_success({"message": "Busy.", "code": 503}))) as server,
        pytest.raises(ServerError, match=r"answered 503 \(Busy\.\): so did 2 tries"),
    ):
        client_of(server, max_retries=1).complete(asked())
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Too long.", "code": 400},
        {"message": "Too long.", "type": "invalid_request_error", "code": "context_length_exceeded"},
        {"message": "Too long.", "type": "BadRequestError", "code": "400"},
    ],
)
def test_an_error_with_success_about_one_request_is_its_own(error):
    def plan(body, _):
        return error_in_success(error) if body["messages"][0]["content"] == "long" else None

    with FaultServer(faults=plan) as server:
        client = client_of(server, concurrency=1)
        found = dict(client.complete_each([asked("short"), asked("long"), asked("short again")]))
    assert [found[index].text for index in range(3)] == ["You said: short", "", "You said: short again"]
    assert "answered 400 (Too long.)" in str(found[1].rejection)
    assert [found[index].rejection is None for index in range(3)] == [True, False, True]


def test_an_error_of_another_form_is_told_too():
    for body in ({"error": "No such thing."}, {"object": "error", "message": "No such thing."}):
        fault = Fault(change=lambda _, body=body: body)
        with FaultServer(faults=always(fault)) as server, pytest.raises(ServerError, match=r"\(No such thing\.\)"):
            client_of(server, max_retries=0).complete(asked())


@pytest.mark.parametrize("depth", [300, 100_000])
def test_a_body_that_is_nested_too_deeply_is_no_chat_completion(depth):
    with pytest.raises(UnusableAnswer, match="no chat completion"):
        read_completion("[" * depth, with_logprobs=False)


# Requests that are rejected


def long_is(fault):
    return lambda body, _: fault if body["messages"][0]["content"] == "long" else None


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_request_that_the_server_will_not_take_is_told_from_a_server_that_fails(status):
    with FaultServer(faults=long_is(Fault(status, "Too long."))) as server:
        client = client_of(server)
        with pytest.raises(RejectedRequest, match=rf"answered {status} \(Too long\.\): it does not take this") as told:
            client.complete(asked("long"))
        assert told.value.status == status
        assert [body["messages"][0]["content"] for body in server.bodies] == ["long", "Hello"]
    assert client.usage.rejected == 1


def test_settings_that_the_server_takes_from_nobody_stop_the_run_with_its_message():
    with FaultServer(faults=always(bad_request("No logprobs."))) as server, pytest.raises(ServerError) as told:
        list(client_of(server, concurrency=5).complete_each([asked(number) for number in range(50)]))
    assert type(told.value) is ServerError
    assert told.value.status == 400
    assert str(told.value) == (
        f"{server.url} answered 400 (No logprobs.): it does not take this request, nor 'Hello' with the same settings: "
        "change these."
    )
    assert len(server.seen) <= 6  # five at a time, and one control


def test_a_server_that_comes_to_reject_everything_stops_a_run_that_went_well():
    came = []

    def unloads(body, _):
        came.append(body)
        return bad_request("The model was unloaded.") if len(came) > 3 else None

    found = []
    with FaultServer(faults=unloads) as server, pytest.raises(ServerError, match="The model was unloaded"):
        found.extend(client_of(server, concurrency=1).complete_each([asked(number) for number in range(9)]))
    assert [answer.rejection for _, answer in found] == [None] * 3


@pytest.mark.parametrize("concurrency", [1, 7, 50])
def test_first_rows_that_are_all_rejected_stop_the_run_and_none_is_given(concurrency):
    def takes_only_the_control(body, _):
        return None if body["messages"][0]["content"] == "Hello" else bad_request("Filtered.")

    found, requests = [], [asked(number) for number in range(100)]
    with FaultServer(faults=takes_only_the_control) as server, pytest.raises(ServerError) as told:
        found.extend(client_of(server, concurrency=concurrency).complete_each(requests))
    assert found == []
    assert str(told.value) == (
        f"{server.url} answered 400 (Filtered.): it does not take this request, nor any of the first 20 rows, though "
        "it takes 'Hello': change what they share, such as a long system prompt or rubric, or the server."
    )
    assert len(server.seen) < 100


@pytest.mark.parametrize("rows", [19, 30])
def test_rejected_rows_before_the_first_answer_are_given_once_there_is_one_or_the_run_is_short(rows):
    def rejects_the_first(body, _):
        text = body["messages"][0]["content"]
        return bad_request("Too long.") if text.isdigit() and int(text) < 19 else None

    with FaultServer(faults=rejects_the_first) as server:
        found = dict(client_of(server, concurrency=1).complete_each([asked(number) for number in range(rows)]))
    assert [found[index].rejection is not None for index in range(rows)] == [index < 19 for index in range(rows)]


def test_a_control_that_fails_for_another_reason_tells_that_one():
    def plan(body, _):
        return bad_request("Too long.") if body["messages"][0]["content"] == "long" else too_many(0.01)

    with FaultServer(faults=plan) as server, pytest.raises(ServerError, match="answered 429"):
        client_of(server, max_retries=1).complete(asked("long"))


def test_a_control_says_nothing_of_the_row_and_keeps_its_settings():
    request = asked("a secret", seed=77, top_logprobs=3, prefill="a beginning")
    client = client_of("http://127.0.0.1:1/v1", extra_body={"min_p": 0.1})
    body = client.body(request)
    control = control_body(body)
    assert [turn["content"] for turn in control["messages"]] == ["Hello", "Hello"]
    assert control == {**body, "messages": control["messages"], "seed": 0}
    assert "secret" not in json.dumps(control)


# Names


def test_a_stated_alias_may_answer_and_no_other_name():
    with FaultServer(model="gpt-4.1-mini-2025-04-14") as server:
        client = client_of(server, "my-deployment", aliases=["gpt-4.1-mini"])
        assert client.complete(asked()).text
        assert client.name == f"my-deployment (also answering as gpt-4.1-mini) at {server.url}"
        with pytest.raises(ServerError, match=r"aliases=\['gpt-4\.1-mini-2025-04-14'\]"):
            client_of(server, "my-deployment", aliases=["gpt-4.1"]).complete(asked())


@pytest.mark.parametrize("aliases", ["gpt-4.1-mini", ["gpt-4.1-mini", " "]])
def test_aliases_that_are_no_names_are_refused(aliases):
    with pytest.raises(ValueError, match="Expected aliases as a list of model names"):
        OpenAIClient("tiny", base_url="http://127.0.0.1:1/v1", aliases=aliases)


def test_no_jobs_need_no_key():
    assert list(client_of("http://127.0.0.1:1/v1", key_variable="A_KEY_THAT_IS_NOT_SET").complete_each([])) == []


def test_what_a_server_says_of_a_row_holds_no_key(monkeypatch, caplog):
    monkeypatch.setenv("PERSONA_LENS_API_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    with FaultServer(faults=long_is(bad_request(f"Too long, {SECRET}."))) as server:
        [(_, found)] = client_of(server).complete_each([asked("long")])
    assert "[key]" in str(found.rejection)
    assert SECRET not in str(found.rejection) + caplog.text
