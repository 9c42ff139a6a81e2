"""Whole commands with a key: it reaches the server that it is for, and no file, page or line of output."""

import logging

import pytest

from tests import judge_servers
from tests.fault_server import FaultServer, first, server_error

KEY = "sk-very-secret-0123456789abcdef"


@pytest.fixture
def everything_is_logged(caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    return caplog


def commands(server, folder):
    """Rollouts from the server, judged on it twice, and the page that compares the judges."""
    rollouts, one, two = (folder / f"{name}.jsonl" for name in ("rollouts", "one", "two"))
    few = ["--n-questions", 2, "--per-question", 1, "--max-new-tokens", 8]
    judge = ["judge", "--trait", "evil", "--rollouts", rollouts, "--judge", f"openai:m@{server.url}"]
    return [
        ["rollouts", "--trait", "evil", "--server", server.url, "--model", "m", *few, "--output", rollouts],
        [*judge, "--write-batch", folder / "batch.jsonl", "--output", one],
        [*judge, "--output", one],
        [*judge, "--output", two],
        ["agreement", "--rollouts", rollouts, "--scores", one, "--against", two, "--output", folder / "a.html"],
    ]


def test_the_key_is_in_no_file_and_no_output(cli, tmp_path, monkeypatch, everything_is_logged):
    def answers(body):
        return judge_servers.whole_numbers(body) if "logprobs" in body else f"Since {body['seed']}."

    monkeypatch.setenv("PERSONA_LENS_API_KEY", KEY)
    printed = ""
    with FaultServer(answers, key=KEY, faults=first(server_error(retry_after=0.01))) as server:
        for command in commands(server, tmp_path):
            code, out, err = cli(*command)
            assert code == 0, err
            printed += out + err

    assert all(each.headers["authorization"] == f"Bearer {KEY}" for each in server.seen)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"calls.sqlite", "rollouts.jsonl", "one.jsonl", "batch.jsonl", "a.html"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in printed + everything_is_logged.text
    assert len(everything_is_logged.records) > 50, "nothing was logged"


def test_a_refused_key_is_not_repeated(cli, tmp_path, monkeypatch, everything_is_logged):
    monkeypatch.setenv("PERSONA_LENS_API_KEY", KEY)
    with FaultServer(key="another") as server:
        code, out, err = cli(*commands(server, tmp_path)[0])

    assert code == 1
    assert "answered 401 (Incorrect API key provided: Bearer [key].)" in err
    assert "set the environment variable PERSONA_LENS_API_KEY" in err
    assert KEY not in out + err + everything_is_logged.text
