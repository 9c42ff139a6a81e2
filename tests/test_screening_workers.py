"""Ray actors: the same bytes as without them, also where one of them is killed."""

import os
import signal
from functools import partial

import pytest

from persona_lens.clients.client import OpenAIClient
from persona_lens.interventions.hooks import steer
from persona_lens.screening.batches import scored_units
from persona_lens.screening.run import Workers, finish, score_here, score_units, score_with_ray
from tests.screening_cases import QUIET, StubScorer, assert_same_files, pair_of_vectors, planned_only, rows, screened


@pytest.mark.slow  # Ray takes about ten seconds to start
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_worker_that_is_killed_loses_and_doubles_nothing(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 5)
    plain, plan = (planned_only(tiny_bridge, rows(200), tmp_path / name) for name in ("plain", "ray"))
    pids = tmp_path / "pids"
    pids.mkdir()
    score_units(plain, partial(score_here, StubScorer(2).score, plain), **QUIET)
    killed, done = [], []

    def interrupted(units):
        make = lambda: StubScorer(2, seconds=0.1, pids=pids).score  # noqa: E731
        for unit in score_with_ray(make, plan, units, workers=Workers(2)):
            done.append(unit)
            if len(done) == 5:
                killed.append(int(next(pids.iterdir()).name))
                os.kill(killed[0], signal.SIGKILL)
            yield unit

    score_units(plan, interrupted, **QUIET)
    assert killed
    assert len(list(pids.iterdir())) > 2  # another one took its place
    assert sorted(done) == scored_units(plan.folder) == list(range(plan.n_units))
    assert plan.n_units > 30
    finish(plain.folder)
    finish(plan.folder)
    assert_same_files(plan.folder, plain.folder)


def test_workers_are_refused_where_a_server_or_an_intervention_would_stay_behind(tiny_bridge, tmp_path):
    client = OpenAIClient("model", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="by this process alone"):
        screened(tiny_bridge, rows(3), tmp_path / "a", base=client, workers=Workers(2), max_new_tokens=4)
    with (
        steer(tiny_bridge, pair_of_vectors(tiny_bridge)[0], coefficient=1.0),
        pytest.raises(ValueError, match="screen with them without workers"),
    ):
        screened(tiny_bridge, rows(3), tmp_path / "b", workers=Workers(2))


def test_no_workers_and_no_ray_are_refused(tiny_bridge, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="actors is 1 or more"):
        Workers(0)
    monkeypatch.setattr("persona_lens.screening.run.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'pip install "persona-lens\[scale\]"'):
        screened(tiny_bridge, rows(3), tmp_path, workers=Workers(2))
