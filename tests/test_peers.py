"""The line protocol between a benchmark and the libraries that it is run beside, with a worker that embeds only."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peer_environments import PEERS, REPOSITORY
from benchmarks.peer_process import WorkerProcess

WORKER = """
import torch
from torch import nn
from benchmarks.peer_workers.serving import Loaded, padded, serve

def load(folder):
    print("a library's greeting")
    embedding = nn.Embedding.from_pretrained(torch.arange(10.0)[:, None])
    def last(rows, size):
        return torch.cat([batch.last_of(embedding(batch.tokens))[:, None] for batch in padded(rows.ids, size)])
    return Loaded(embedding, embedding, {"last": last}, encode=lambda text: [int(word) for word in text.split()])

serve(load)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    command = [sys.executable, "-c", WORKER, tmp_path_factory.getbasetemp()]
    with WorkerProcess("the fake", command, directory=REPOSITORY) as process:
        process.ask(do="take", ids=[[1, 2, 3], [4], [5, 6]], texts=["1 2 3", "4", "5 6"])
        yield process


def test_a_worker_finds_each_rows_last_token_and_counts_what_it_ran(worker: WorkerProcess, tmp_path: Path):
    array = tmp_path / "states.npy"

    result = worker.ask(do="inspect", method="last", size=2, array=str(array))

    assert np.load(array)[:, 0, 0].tolist() == [3, 4, 6]
    assert (result["forwards"], result["padded_tokens"]) == (2, 8)


def test_a_turn_is_timed_in_the_worker(worker: WorkerProcess):
    assert set(worker.ask(do="time", method="last", size=2)) == {"wall", "cpu"}


def test_a_workers_failure_is_raised_in_its_own_words(worker: WorkerProcess):
    with pytest.raises(RuntimeError, match=r"(?s)the fake failed.*KeyError: 'absent'"):
        worker.ask(do="time", method="absent", size=2)


def test_texts_that_give_other_tokens_are_refused(worker: WorkerProcess):
    with pytest.raises(RuntimeError, match="the work would differ"):
        worker.ask(do="take", ids=[[1, 2]], texts=["1 3"])


def test_a_worker_that_ends_is_an_error_with_what_it_said():
    dying = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        WorkerProcess("the fake", dying, directory=REPOSITORY) as process,
        pytest.raises(RuntimeError, match=r"(?s)the fake ended.*no such model"),
    ):
        process.ask(do="take", ids=[], texts=[])


def test_an_environment_for_another_version_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.peer_environments.FOLDER", tmp_path)
    (tmp_path / PEERS[0].name).mkdir()
    (tmp_path / PEERS[0].name / "installed").write_text(f"{PEERS[0].name}==0.0.1")

    assert not PEERS[0].installed
