"""Rollouts from a server: complete among faults, and kept as they come."""

import os
import signal
import sys
import time
from dataclasses import replace
from textwrap import dedent

import pytest

from persona_lens.clients.requests import ServerError
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.storage.files import JsonLines
from tests.fault_server import FaultServer, bad_request, completion, hang, random_faults, unauthorized
from tests.judge_servers import only_reasons
from tests.processes import child_process
from tests.server_cases import GRUMPY, PROMPTS, collect, engine_at, says


def first_asked_last_answered(count):
    """A plan by which the first few requests are answered after the others."""
    came = []

    def plan(body, attempt):
        came.append(body)
        return hang(0.3) if len(came) <= count else None

    return plan


@pytest.fixture
def server():
    with FaultServer(says) as server:
        yield server


# What is asked and what comes back


def test_each_row_is_the_answer_to_its_own_prompt_in_the_order_of_the_plan(tmp_path):
    with FaultServer(says, faults=first_asked_last_answered(5)) as server:
        rows = collect(engine_at(server), tmp_path / "rollouts.jsonl")
    assert [row.prompt for row in rows] == PROMPTS
    for row in rows:
        assert row.response.startswith(row.question)
        assert row.response.endswith(row.system_prompt)
        assert row.response_tokens is None
    written = read_rollouts(tmp_path / "rollouts.jsonl")
    assert written != rows, "nothing came out of order"
    assert sorted(written, key=lambda row: row.key) == sorted(rows, key=lambda row: row.key)


def test_every_row_is_one_call_with_a_seed_of_its_own(server):
    collect(engine_at(server, sampling={"temperature": 0.5, "top_p": 0.9}))
    assert len(server.bodies) == len(PROMPTS)
    seeds = {body["seed"] for body in server.bodies}
    assert len(seeds) == len(PROMPTS)
    assert all(0 <= seed < 2**31 for seed in seeds)
    for body in server.bodies:
        assert "n" not in body
        assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("studied", 20, 0.5, 0.9)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_seeds_depend_on_the_runs_seed_and_on_the_row_alone(server):
    engine = engine_at(server)
    everything, alone = collect(engine), collect(engine, prompts=PROMPTS[7:8])
    other = collect(engine, seed=1)
    assert alone == everything[7:8]
    assert not {row.response for row in other} & {row.response for row in everything}


def test_samples_of_one_question_are_told_apart_in_the_cache_even_by_one_seed(server, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.rollouts.server.row_seed", lambda _seed, _row: 7)
    engine = engine_at(server, cache=tmp_path / "calls.sqlite")
    collect(engine)
    assert len(engine.client.cache) == len(PROMPTS)


def test_rows_among_faults_are_those_without():
    with FaultServer(says) as calm:
        expected = collect(engine_at(calm))
    with FaultServer(says, faults=random_faults(0.3, seed=1)) as stormy:
        found = collect(engine_at(stormy))
        assert len(stormy.seen) > len(PROMPTS), "nothing went wrong"
    assert [row.response for row in found] == [row.response for row in expected]
    assert [row.prompt for row in found] == PROMPTS


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("reason", ["content_filter", "stop", "length"])
def test_an_answer_that_was_held_back_is_an_empty_row(tmp_path, content, reason):
    answer = completion("", finish_reason=reason)
    answer["choices"][0]["message"] |= {"content": content, "refusal": "No."}
    with FaultServer(lambda body: answer) as server:
        rows = collect(engine_at(server), tmp_path / "rollouts.jsonl", prompts=PROMPTS[:2])
    assert [(row.response, row.finish_reason) for row in rows] == [("", reason)] * 2
    assert all(row.is_empty and row.conversation().is_empty for row in rows)
    assert len(read_rollouts(tmp_path / "rollouts.jsonl")) == 2


TOO_LONG = bad_request("This model's maximum context length is 20 tokens.")


def test_a_prompt_that_the_server_will_not_take_is_an_empty_row_that_says_so_and_is_not_asked_again(tmp_path):
    def one_is_too_long(body, _):
        return TOO_LONG if "film" in body["messages"][1]["content"] else None

    with FaultServer(says, faults=one_is_too_long) as server:
        engine = engine_at(server, concurrency=1)
        rows = collect(engine, tmp_path / "rollouts.jsonl")
        asked = len(server.seen)
        again = collect(engine, tmp_path / "rollouts.jsonl")
    rejected = [row for row in rows if row.rejected]
    assert {row.question for row in rejected} == {"How was the film?"}
    assert len(rejected) == len(PROMPTS) / 2 == engine.client.usage.rejected
    assert all(row.is_empty and "maximum context length is 20 tokens" in row.finish_reason for row in rejected)
    assert (again, len(server.seen)) == (rows, asked)
    # No row was answered while another was asked, so a control request tells for each that the fault is the row's.
    assert asked == len(PROMPTS) + len(rejected)


def test_a_server_that_takes_no_row_stops_the_run_before_a_row_is_written(tmp_path):
    with (
        FaultServer(says, faults=lambda *_: bad_request("System role not supported.")) as server,
        pytest.raises(ServerError) as told,
    ):
        collect(engine_at(server, concurrency=3), tmp_path / "rollouts.jsonl")
    assert "System role not supported.): it does not take this request, nor 'Hello' with the same sett" in str(
        told.value
    )
    assert not (tmp_path / "rollouts.jsonl").exists() or not read_rollouts(tmp_path / "rollouts.jsonl")
    assert len(server.seen) <= 4, "each of three was asked, and one control for them all"


def test_a_row_that_wants_an_intervention_is_refused(server):
    with pytest.raises(ValueError, match="A server runs no interventions, got a row with 'evil x 2'"):
        collect(engine_at(server), prompts=[replace(PROMPTS[0], intervention="evil x 2")])
    assert server.seen == []


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_sampling_settings_that_mean_nothing_are_refused(server, setting):
    with pytest.raises(ValueError, match="Sampling needs max_new_tokens >= 1"):
        engine_at(server, sampling=setting)


# What is kept


def test_what_was_answered_before_the_server_failed_is_in_the_file(tmp_path):
    output, came = tmp_path / "rollouts.jsonl", []

    def fails_after_ten(body, attempt):
        came.append(body)
        return unauthorized() if len(came) > 10 else None

    with FaultServer(says, faults=fails_after_ten) as server:
        with pytest.raises(ServerError, match="answered 401"):
            collect(engine_at(server, concurrency=3), output)
        kept = read_rollouts(output)
        assert len(kept) == 10 == sum(server.successes.values())


def test_a_file_that_cannot_be_written_to_any_more_ends_the_asking(tmp_path, monkeypatch):
    append, rows = JsonLines.append, []

    def full_disk(self, new):
        rows.append(new)
        if len(rows) > 2:
            raise OSError("No space left on device")
        append(self, new)

    monkeypatch.setattr(JsonLines, "append", full_disk)
    with FaultServer(says, delay=0.1) as server:
        with pytest.raises(OSError, match="No space left") as failure:
            collect(engine_at(server, concurrency=2), tmp_path / "rollouts.jsonl")
        asked = len(server.seen)
        time.sleep(0.5)  # the traceback that is held here keeps every frame alive
        assert failure.value
        assert len(server.seen) == asked < len(PROMPTS) / 2


def test_a_finished_file_needs_no_server_and_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("MISSING_KEY", raising=False)
    with FaultServer(says) as server:
        rows = collect(engine_at(server), tmp_path / "rollouts.jsonl")
    assert collect(engine_at(server, key_variable="MISSING_KEY"), tmp_path / "rollouts.jsonl") == rows


def test_the_bar_begins_at_what_is_done_and_moves_row_by_row(server, tmp_path, monkeypatch):
    from persona_lens.rollouts import collection

    moves, begun = [], []

    class Bar(collection.tqdm):
        def __init__(self, *arguments, **options):
            begun.append((options["initial"], options["total"]))
            super().__init__(*arguments, **options)

        def update(self, n=1):
            moves.append(n)
            return super().update(n)

    monkeypatch.setattr(collection, "tqdm", Bar)
    collect(engine_at(server), tmp_path / "rollouts.jsonl", prompts=PROMPTS[:4])
    collect(engine_at(server), tmp_path / "rollouts.jsonl")
    assert begun == [(0, 4), (4, len(PROMPTS))]
    assert moves == [1] * len(PROMPTS)


KILLED = """
    import json, sys

    from persona_lens.clients.client import OpenAIClient
    from persona_lens.rollouts.server import ServerEngine
    from persona_lens.rollouts.collection import collect_rollouts, plan_rollouts
    from persona_lens.traits.trait import load_trait

    url, trait, output = sys.argv[1:]
    engine = ServerEngine(OpenAIClient("studied", base_url=url, concurrency=3), max_new_tokens=20)
    collect_rollouts(engine, plan_rollouts(load_trait(trait), per_question=3), output_file=output, progress=False)
"""


def test_a_killed_run_lost_no_answered_row_and_asks_for_none_again(tmp_path, request):
    output, trait = tmp_path / "rollouts.jsonl", tmp_path / "grumpy.json"
    GRUMPY.save(trait)
    root = str(request.config.rootpath)
    with FaultServer(says, delay=0.2) as server:
        command = [sys.executable, "-W", "ignore", "-c", dedent(KILLED), server.url, str(trait), str(output)]
        with child_process(command, cwd=root, env=os.environ | {"PYTHONPATH": root}) as running:
            deadline = time.monotonic() + 120
            while not (output.exists() and output.read_bytes().count(b"\n") >= 7):
                assert running.poll() is None, "the run ended before it was killed"
                assert time.monotonic() < deadline, "the run wrote no rows"
                time.sleep(0.01)
            running.send_signal(signal.SIGKILL)
        kept = JsonLines(output).whole()
        assert 7 <= len(kept) < len(PROMPTS)
        # At most the calls that were under way when it died were answered and not written.
        assert len(kept) >= sum(server.successes.values()) - 3

        server.delay, before = 0.0, len(server.seen)
        resumed = collect(engine_at(server), output)
        again = {body["seed"] for body in server.bodies[before:]}
        assert len(again) == len(PROMPTS) - len(kept)
        assert not again & {seed_of(row["response"]) for row in kept}
        assert resumed == collect(engine_at(server))
        assert len(read_rollouts(output)) == len(PROMPTS)


def seed_of(response):
    """The seed that `says` put into a response."""
    return int(response.partition(": ")[2].partition(",")[0])


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"max_new_tokens": 21}},
        {"sampling": {"temperature": 0.5}},
        {"sampling": {"top_p": 0.9}},
        {"model": "other"},
        {"extra_body": {"top_k": 5}},
    ],
)
def test_rows_of_another_engine_are_refused_and_nothing_is_asked(server, tmp_path, change):
    output = tmp_path / "rollouts.jsonl"
    collect(engine_at(server), output)
    before, asked = output.read_bytes(), len(server.seen)
    with pytest.raises(ValueError, match="holds rollouts made with another engine"):
        collect(engine_at(server, **change), output, prompts=[*PROMPTS, replace(PROMPTS[0], sample=9)])
    assert (output.read_bytes(), len(server.seen)) == (before, asked)


def test_a_servers_rows_are_not_gone_on_with_by_a_model(server, tiny_model, tmp_path):
    from persona_lens.rollouts.collection import sample_rollouts

    collect(engine_at(server), tmp_path / "rollouts.jsonl")
    with pytest.raises(ValueError, match=r"another engine \('studied on the server http://127\.0\.0\.1:\d+/v1, temp"):
        sample_rollouts(tiny_model, GRUMPY, per_question=3, output_file=tmp_path / "rollouts.jsonl", progress=False)


# A model that reasons


def test_a_server_that_gives_nothing_but_reasoning_is_stopped_before_a_row_is_written(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    with FaultServer(only_reasons) as server, pytest.raises(ValueError, match=r"enable_thinking.*--server-extra"):
        collect(engine_at(server, concurrency=3), output)
    assert JsonLines(output).whole() == []
    assert len(server.bodies) < len(PROMPTS)


def test_a_row_whose_answer_ended_in_reasoning_is_an_empty_row_and_stops_nothing(tmp_path):
    hard = PROMPTS[-1].question

    def serve(body):
        return only_reasons(body) if body["messages"][-1]["content"] == hard else says(body)

    with FaultServer(serve) as server:
        rows = collect(engine_at(server, concurrency=1), tmp_path / "rollouts.jsonl")
    assert [row.is_empty for row in rows] == [row.question == hard for row in rows]
    assert 0 < sum(row.is_empty for row in rows) < len(rows)
