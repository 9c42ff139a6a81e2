"""What may go wrong at a server: what the client overcomes, what it tells, and that no key stands anywhere."""

import logging
import traceback

import pytest

from persona_lens.clients.requests import ServerError
from tests.client_cases import SECRET, asked, client_of, forget_settings
from tests.fault_server import (
    Fault,
    FaultServer,
    always,
    bad_request,
    cut,
    dropped,
    first,
    hang,
    malformed,
    no_choices,
    no_logprobs,
    other_model,
    random_faults,
    server_error,
    too_many,
    unauthorized,
    unknown_model,
)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    forget_settings(monkeypatch)


OVERCOME = {
    "429 with a Retry-After": (too_many(0.01), "answered 429 (Rate limit reached.): 2 tries were too many for it"),
    "429 without one": (too_many(), "answered 429 (Rate limit reached.): 2 tries were too many for it"),
    "500": (server_error(), "answered 500 (The server had an error.): so did 2 tries"),
    "503": (server_error(503), "answered 503 (The server had an error.): so did 2 tries"),
    "a timeout": (hang(), "did not answer within 0.5 s in 2 tries: raise timeout, or lower concurrency."),
    "a body that is cut": (cut(), "could not be reached in 2 tries ("),
    "a dropped connection": (dropped(), "could not be reached in 2 tries ("),
    "malformed JSON": (malformed(), "gave no chat completion (the body: Invalid JSON"),
    "no choices": (no_choices(), "gave no chat completion (choices: "),
    "no log-probabilities": (no_logprobs(), "gave an answer without the log-probabilities that were asked for in 2 tr"),
}


@pytest.mark.parametrize("fault", [fault for fault, _ in OVERCOME.values()], ids=OVERCOME)
def test_a_passing_fault_is_overcome_by_one_more_try(fault):
    with FaultServer(lambda _: "fine", faults=first(fault)) as server:
        # Long enough for a busy machine, where the fault is not the waiting itself.
        client = client_of(server, timeout=0.5 if fault.hang else 20)
        answer = client.complete(asked(top_logprobs=5))
    assert answer.text == "fine"
    assert answer.tokens
    assert (client.usage.calls, client.usage.retries, len(server.seen)) == (1, 1, 2)
    assert sum(server.successes.values()) == 1


@pytest.mark.parametrize(("fault", "words"), OVERCOME.values(), ids=OVERCOME)
def test_a_fault_that_stays_is_told_in_one_sentence_after_all_tries(fault, words):
    with FaultServer(faults=always(fault)) as server:
        client = client_of(server, timeout=0.5, max_retries=1)
        with pytest.raises(ServerError) as told:
            client.complete(asked(top_logprobs=5))
    said = str(told.value)
    assert said.startswith(f"{server.url} {words}")
    assert "\n" not in said
    assert said.endswith((".", "?"))
    assert len(server.seen) == 2
    assert client.usage.calls == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            unknown_model(),
            "answered 404 (The model does not exist or you do not have access to it.): "
            "name a model that it serves instead of 'tiny', and check the URL, which mostly ends in /v1.",
        ),
        (
            unauthorized(),
            "answered 401 (Incorrect API key provided: Bearer none.): "
            "set the environment variable PERSONA_LENS_API_KEY to a key that may use 'tiny'.",
        ),
        (
            other_model("huge"),
            "was asked for the model 'tiny', and 'huge' answered: pass that name if it is the model you mean, or "
            "aliases=['huge'] (--alias tiny=huge) if it is another name for the same model.",
        ),
    ],
    ids=["404", "401", "another model"],
)
def test_a_fault_that_no_repeat_can_mend_is_told_after_one_try(fault, words):
    with FaultServer(faults=always(fault)) as server:
        client = client_of(server)
        with pytest.raises(ServerError) as told:
            client.complete(asked())
    assert str(told.value) == f"{server.url} {words}"
    assert len(server.seen) == 1


@pytest.mark.parametrize("seconds", [1, 0.3])
def test_the_next_try_waits_as_long_as_the_server_says(seconds):
    with FaultServer(faults=first(too_many(seconds), too_many(seconds))) as server:
        client_of(server).complete(asked())
    one, two, three = (request.at for request in server.seen)
    assert two - one >= seconds
    assert three - two >= seconds


def test_a_run_among_random_faults_ends_as_one_without_any(tmp_path):
    requests = [asked(f"question {number}", top_logprobs=3) for number in range(150)]
    with FaultServer() as calm:
        expected = dict(client_of(calm).complete_each(requests))
    with FaultServer(faults=random_faults(0.2, seed=1)) as server:
        client = client_of(server, cache=tmp_path / "calls.sqlite", concurrency=50)
        assert dict(client.complete_each(requests)) == expected
    failed = len(server.seen) - len(requests)
    assert failed > 20
    assert client.usage.retries == failed
    assert set(server.successes.values()) == {1}


# Keys


@pytest.fixture
def every_log(caplog):
    """All that any logger says, down to DEBUG."""
    names = [None, "openai", "openai._base_client", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio"]
    for name in [*names, *(each for each in logging.root.manager.loggerDict if each.startswith(("http", "openai")))]:
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


def logged(caplog):
    return caplog.text + "".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)


def test_a_key_stands_in_no_log_name_or_file(tmp_path, every_log, monkeypatch):
    monkeypatch.setenv("PERSONA_LENS_API_KEY", SECRET)
    with FaultServer(key=SECRET, faults=first(too_many(0.01), malformed())) as server:
        client = client_of(server, cache=tmp_path / "calls.sqlite")
        assert client.complete(asked()).text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"calls.sqlite", "calls.sqlite-wal"}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    for text in (logged(every_log), repr(client), client.name, repr(vars(client)), str(client.usage)):
        assert SECRET not in text
    assert "HTTP" in logged(every_log)  # or else nothing was logged, and the test shows nothing


@pytest.mark.parametrize("repeated", ["401", "400", "500"])
def test_a_key_that_the_server_repeats_stands_in_no_error(repeated, every_log, monkeypatch):
    monkeypatch.setenv("PERSONA_LENS_API_KEY", SECRET)
    message = f"You sent {SECRET}, and {SECRET}"
    faults = {"401": unauthorized(), "400": bad_request(message), "500": server_error()}
    with FaultServer(faults=always(faults[repeated])) as server:
        client = client_of(server, max_retries=0)
        with pytest.raises(ServerError) as told:
            client.complete(asked())
    written = "".join(traceback.format_exception(told.value))
    assert SECRET not in written + logged(every_log) + repr(told.value.args)
    assert ("[key]" in str(told.value)) == (repeated != "500")


@pytest.mark.parametrize("key", [f"{SECRET}\nsecond-line", f"{SECRET} with a blank", f"{SECRET}“"])
def test_a_key_that_cannot_be_one_is_told_before_anything_is_sent_and_without_it(key, every_log, monkeypatch):
    monkeypatch.setenv("PERSONA_LENS_API_KEY", key)
    with FaultServer() as server:
        client = client_of(server, max_retries=0)
        with pytest.raises(ValueError, match="PERSONA_LENS_API_KEY holds a blank or a sign that no key has") as told:
            client.complete(asked())
    assert not server.seen
    written = "".join(traceback.format_exception(told.value)) + logged(every_log)
    assert SECRET not in written
    assert "second-line" not in written


def test_a_long_message_of_a_server_is_shortened_to_one_line():
    page = Fault(502, "<p>Bad gateway</p>\n" * 100)
    with FaultServer(faults=always(page)) as server, pytest.raises(ServerError) as told:
        client_of(server, max_retries=0).complete(asked())
    assert 300 < len(str(told.value)) < 500
    assert "\n" not in str(told.value)
