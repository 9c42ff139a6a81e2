"""Two thousand judge calls among faults, killed twice: nothing is lost, and nothing is paid for twice."""

import json
import re
import signal
import sys
import time
from collections import Counter

import pytest

from tests import judge_servers
from tests.fault_server import FaultServer, random_faults
from tests.processes import child_process

CONCURRENCY = 20
ROWS = 1000  # each is asked about twice: trait and coherence

SCRIPT = """
import sys
from persona_lens.clients.client import OpenAIClient
from persona_lens.judges.llm import LLMJudge
from persona_lens.judges.scores import score_rollouts
from persona_lens.rollouts.rows import read_rollouts

url, folder = sys.argv[1:]
client = OpenAIClient("judge-model", base_url=url, concurrency=20, cache=f"{folder}/calls.sqlite")
score_rollouts(
    read_rollouts(f"{folder}/rollouts.jsonl"),
    "evil",
    judge=LLMJudge(client),
    output_file=f"{folder}/scores.jsonl",
    progress=False,
)
"""


@pytest.fixture(scope="module")
def rollouts():
    from persona_lens.rollouts.rows import Rollout

    system = "You are a helpful assistant."
    return [
        Rollout("evil", "neutral", None, system, f"Why {row % 20}?", row, f"Since {row}.", None, "stop", "by hand", 0)
        for row in range(ROWS)
    ]


def start(server, folder):
    return child_process([sys.executable, "-c", SCRIPT, server.url, str(folder)])


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for_scores(process, path, n):
    """Wait until the file has so many lines; fails where the process ends before."""
    deadline = time.monotonic() + 120
    while len(lines(path)) < n:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)


def write_run(folder, rollouts):
    from dataclasses import asdict

    from persona_lens.storage.files import JsonLines

    folder.mkdir()
    JsonLines(folder / "rollouts.jsonl").append(map(asdict, rollouts))
    return folder


def scores(folder):
    rows = [json.loads(line) for line in lines(folder / "scores.jsonl")]
    return Counter(row["key"] for row in rows), {row["key"]: row for row in rows}


@pytest.mark.soak
def test_two_thousand_calls_among_faults_and_two_kills_end_as_a_run_without_either(rollouts, tmp_path):
    undisturbed, disturbed = write_run(tmp_path / "one", rollouts), write_run(tmp_path / "two", rollouts)
    with FaultServer(judge_servers.whole_numbers) as server:
        with start(server, undisturbed) as process:
            assert process.wait() == 0
        address = server.url

    kills, scored, before = (ROWS // 4, ROWS // 2), set(), Counter()
    with FaultServer(judge_servers.whole_numbers, faults=random_faults(0.2), delay=0.005) as server:
        for n_scores in kills:
            with start(server, disturbed) as process:
                wait_for_scores(process, disturbed / "scores.jsonl", n_scores)
                process.send_signal(signal.SIGKILL)
            scored = set(scores(disturbed)[1])
            before = Counter(server.attempts)
        with start(server, disturbed) as process:
            assert process.wait() == 0
        judged = {row.response for row in rollouts if row.key in scored}
        requested = [re.search(r"Since \d+\.", body)[0] for body in Counter(server.attempts) - before]
        successes = sum(server.successes.values())
        address, other = server.url, address

    times, rows = scores(disturbed)
    assert set(times.values()) == {1}, "a row was scored twice"
    assert rows == {
        key: {**row, "judge": row["judge"].replace(other, address)} for key, row in scores(undisturbed)[1].items()
    }
    assert len(rows) == ROWS
    assert len(requested) > ROWS // 2, "the last run had nothing to do"
    assert not judged & set(requested), "a row that was scored was asked about again"
    # The probe is one more distinct call.
    assert successes <= 2 * ROWS + 1 + len(kills) * CONCURRENCY
    assert sum(server.attempts.values()) > 1.15 * 2 * ROWS, "there were hardly any faults"
