"""Runs that are killed at random moments end with the files of one that nothing disturbed: none lost, none doubled."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from persona_lens.finetuning.result import Finetuning
from tests import killed_runs
from tests.finetuning_cases import assert_same_weights, losses

ROOT = Path(__file__).parent.parent
KILLS = 15


def kill(kind, folder, seed, kills):
    """Make and kill runs; gives what was done, and the folders of the runs."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.killed_runs", kind, folder, str(seed), str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= kills
    assert found["of them with files begun"] > 0, "nothing was killed at work"
    print(found)
    return [folder / str(number) for number in range(found["runs"])]


def contents(folder):
    """The files of a folder, without the lines that a kill cut short, which lie beside them."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if ".jsonl.damaged" not in name}


def assert_nothing_lost_or_doubled(kind, folder, runs):
    whole = contents(folder / "whole")
    for run in runs:
        found = contents(run)
        assert found.keys() == whole.keys()
        if kind != "training":
            assert found == whole
            continue
        # A resumed sum may round its last bit another way, and a record says how long it took.
        one, other = Finetuning.load(run), Finetuning.load(folder / "whole")
        assert losses(one) == pytest.approx(losses(other), abs=1e-8)
        assert_same_weights(one, other, rtol=0, atol=1e-8)


def test_an_extraction_killed_a_few_times_ends_with_the_files_of_an_undisturbed_one(tmp_path):
    assert_nothing_lost_or_doubled("extraction", tmp_path, kill("extraction", tmp_path, seed=1, kills=3))


HIDDEN = (".lock", ".plan.lock", ".rollouts.jsonl.lock", ".scores.jsonl.lock", ".shard-0-of-1.lock")


@pytest.mark.soak
@pytest.mark.parametrize("kind", killed_runs.KINDS)
@pytest.mark.parametrize("content", ["mine", '{"mine": 1}', None])
def test_no_run_writes_through_a_link_that_was_planted_under_a_name_that_it_writes(
    kind, content, tmp_path, tiny_bridge, monkeypatch
):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 64)  # put back afterwards
    run = killed_runs.KINDS[kind]
    run(tiny_bridge, tmp_path / "whole")
    written = [str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    for number, name in enumerate([*written, *HIDDEN]):
        victim, link = tmp_path / f"victim-{number}", tmp_path / str(number) / name
        if content is not None:
            victim.write_text(content)
        link.parent.mkdir(parents=True)
        link.symlink_to(victim)
        with suppress(OSError, ValueError):  # refused
            run(tiny_bridge, tmp_path / str(number))
        if content is not None:
            assert victim.read_text() == content, name
        else:  # a link to a file that is not there yet is followed for rows alone
            assert not victim.exists() or name.endswith(".jsonl"), name


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["extraction", "sweep", "screening", "training"])
def test_a_run_killed_at_random_moments_ends_with_the_files_of_an_undisturbed_one(kind, tmp_path):
    assert_nothing_lost_or_doubled(kind, tmp_path, kill(kind, tmp_path, seed=2, kills=KILLS))
