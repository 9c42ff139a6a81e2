"""Ray actors: the same bytes as without them, also where one of them is killed."""

import os
import signal
from functools import partial

import pytest

from persona_lens.clients.client import OpenAIClient
from persona_lens.interventions.hooks import steer
from persona_lens.screening.plan import read_plan
from persona_lens.screening.run import ShardsMissing, finish, score_here, score_units, screen
from persona_lens.screening.scores import scored_units
from persona_lens.screening.workers import score_with_ray
from tests.screening_cases import QUIET, SlowStub, StubScorer, pair_of_vectors, rows


@pytest.fixture
def unscored(tiny_bridge, tmp_path, monkeypatch):
    """A folder with a plan of 40 units that nobody has scored."""
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 5)

    def make(name):
        vectors = pair_of_vectors(tiny_bridge)[:1]
        with pytest.raises(ShardsMissing):
            screen(tiny_bridge, rows(200), vectors, output=tmp_path / name, base="proxy", shard=(999, 1000), **QUIET)
        return tmp_path / name

    return make


@pytest.mark.slow  # Ray takes about ten seconds to start
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_worker_that_is_killed_loses_and_doubles_nothing(unscored, tmp_path):
    plain, folder, pids = unscored("plain"), unscored("ray"), tmp_path / "pids"
    pids.mkdir()
    score_units(plain, read_plan(plain), score_here(StubScorer(), read_plan(plain)), **QUIET)
    killed = []

    def interrupted(units):
        make = partial(SlowStub, pids, 0.1)
        for found in score_with_ray(make, read_plan(folder), units, actors=2):
            if len(scored_units(folder)) == 5 and not killed:
                killed.append(int(next(pids.iterdir()).name))
                os.kill(killed[0], signal.SIGKILL)
            yield found

    score_units(folder, read_plan(folder), interrupted, **QUIET)
    assert killed
    assert len(list(pids.iterdir())) > 2  # another one took its place
    lines = (folder / "scored.jsonl").read_text().splitlines()
    assert len(lines) == read_plan(folder).n_units == len(scored_units(folder))
    finish(plain)
    finish(folder)
    assert (folder / "scores.parquet").read_bytes() == (plain / "scores.parquet").read_bytes()


def test_a_server_is_not_asked_by_actors(tiny_bridge, tmp_path):
    client = OpenAIClient("model", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="by this process alone"):
        screen(
            tiny_bridge,
            rows(3),
            pair_of_vectors(tiny_bridge),
            output=tmp_path,
            base=client,
            actors=2,
            max_new_tokens=4,
            **QUIET,
        )


def test_actors_are_refused_where_an_intervention_would_stay_behind(tiny_bridge, tmp_path):
    vectors = pair_of_vectors(tiny_bridge)
    with steer(tiny_bridge, vectors[0], coefficient=1.0), pytest.raises(ValueError, match="screen with them without"):
        screen(tiny_bridge, rows(3), vectors, output=tmp_path, base="proxy", actors=2, **QUIET)
