"""Disks that fill up, folders that are read-only, files that are damaged, clocks that jump, and Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from persona_lens.clients.cache import CallCache
from persona_lens.clients.requests import ChatCompletion
from persona_lens.generation.capture import CapturedMeans
from persona_lens.judges.scores import read_scores
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.screening.run import ShardsMissing, screen
from persona_lens.storage.files import JsonLines, read_json, write_json, zeros_on_disk
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.evaluation_cases import make_rollout
from tests.fault_cases import full_disk, mounted
from tests.processes import child_process
from tests.screening_cases import QUIET, assert_same_files, pair_of_vectors, rows
from tests.vector_cases import make_vectors

ROOT = Path(__file__).parent.parent
FULL = r"^Cannot write .*{}.* \(.*(File too large|No space left on device).*\): free disk space and run again"

# A full disk


def test_a_line_that_finds_no_room_leaves_the_file_as_it_was(tmp_path):
    file = JsonLines(tmp_path / "rows.jsonl")
    file.append([{"text": "x" * 900}])
    whole = file.path.read_bytes()
    with full_disk(1500), pytest.raises(OSError, match=FULL.format("rows.jsonl") + ", which goes on from what is"):
        file.append([{"text": "y" * 900}])
    assert file.path.read_bytes() == whole
    file.append([{"text": "y"}])  # without opening it anew
    assert [row["text"][0] for row in file.read()] == ["x", "y"]


def test_a_file_that_is_written_whole_stays_the_older_one(tmp_path):
    write_json(tmp_path / "summary.json", 1)
    with full_disk(1500), pytest.raises(OSError, match=FULL.format("summary.json")):
        write_json(tmp_path / "summary.json", "x" * 2000)
    assert read_json(tmp_path / "summary.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_mapped_file_has_its_room_before_anything_is_put_there(tmp_path):
    with full_disk(100_000), pytest.raises(OSError, match=FULL.format("means.npy")):
        zeros_on_disk(tmp_path / "means.npy", np.float32, (1000, 1000))
    assert list(tmp_path.iterdir()) == []
    found = zeros_on_disk(tmp_path / "means.npy", np.float32, (100, 100))
    assert os.stat(tmp_path / "means.npy").st_blocks * 512 >= found.nbytes


def test_a_screening_on_a_full_disk_goes_on_to_the_same_files(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 4)
    vectors = pair_of_vectors(tiny_bridge)
    with full_disk(2_000), pytest.raises(OSError, match=r"seen.sqlite \(.*\): free disk space and run again"):
        screen(tiny_bridge, rows(60), vectors, output_dir=tmp_path / "full", base="proxy", **QUIET)
    with pytest.raises(ShardsMissing):  # the plan
        screen(tiny_bridge, rows(60), vectors, output_dir=tmp_path / "full", base="proxy", shard=(999, 1000), **QUIET)
    screen(tiny_bridge, rows(60), vectors, output_dir=tmp_path / "whole", base="proxy", **QUIET)
    parts = sorted((tmp_path / "whole" / "scores").iterdir())
    for limit in (2_000, max(part.stat().st_size for part in parts) - 1):
        with full_disk(limit), pytest.raises(OSError, match=FULL.format(r"unit-\d+.parquet")):
            screen(tiny_bridge, rows(60), vectors, output_dir=tmp_path / "full", base="proxy", **QUIET)
        written = sorted((tmp_path / "full" / "scores").iterdir())
        assert [part.read_bytes() for part in written] == [part.read_bytes() for part in parts[: len(written)]]
        assert len(written) < len(parts)
    screen(tiny_bridge, rows(60), vectors, output_dir=tmp_path / "full", base="proxy", **QUIET)
    assert_same_files(tmp_path / "full", tmp_path / "whole")


def test_what_a_killed_screening_left_of_a_file_is_taken_away(tiny_bridge, tmp_path):
    (tmp_path / ".settings.json.4711.unfinished").write_text("{")
    screen(tiny_bridge, rows(4), pair_of_vectors(tiny_bridge), output_dir=tmp_path, base="proxy", **QUIET)
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_an_answer_that_finds_no_room_is_told_and_the_others_stay(tmp_path):
    cache = CallCache(tmp_path / "calls.sqlite")
    cache.put("first", ChatCompletion("one", "stop", "m"))
    with full_disk(20_000), pytest.raises(OSError, match=r"as a cache of calls \(.*\): free disk space"):
        cache.put("second", ChatCompletion("x" * 50_000, "stop", "m"))
    assert cache.get("first").text == "one"
    cache.put("last", ChatCompletion("two", "stop", "m"))
    assert CallCache(tmp_path / "calls.sqlite").get("last").text == "two"


# A folder that cannot be written to


@pytest.fixture
def read_only(tmp_path):
    """A folder on a file system that is mounted read-only, which binds root too."""
    with mounted(tmp_path / "read-only", "ro,size=1m"):
        yield tmp_path / "read-only"


def test_a_read_only_folder_is_refused_in_one_sentence(tiny_bridge, read_only):
    with pytest.raises(OSError, match=r"^Cannot write .*read-only.*: .* is not a folder that can be written to\.$"):
        screen(tiny_bridge, rows(4), pair_of_vectors(tiny_bridge), output_dir=read_only / "run", base="proxy", **QUIET)
    with pytest.raises(OSError, match=r"^Cannot write .*rows.jsonl \(Read-only file system\)"):
        JsonLines(read_only / "rows.jsonl").append([{}])


# Damaged files


@pytest.mark.parametrize("read", [read_rollouts, lambda path: read_scores(path, [make_rollout("Why?", 0)])])
def test_a_corrupt_line_in_the_middle_is_refused_with_file_and_line(tmp_path, read):
    path = tmp_path / "rows.jsonl"
    JsonLines(path).append([{"key": 1}])
    path.write_bytes(path.read_bytes() + b'{"key": 2, "tr\n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: expected a JSON object, got b'\{\"key\": 2"):
        read(path)


def test_json_that_is_nested_too_deeply_is_a_line_like_any_other_that_is_damaged(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: expected a JSON object"):
        JsonLines(path).read()
    with pytest.raises(ValueError, match=r"rows.jsonl is not JSON that can be read"):
        read_json(path)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_vectors_that_were_cut_short_are_refused_with_the_file(tmp_path, left):
    make_vectors().save(tmp_path / "vectors.safetensors")
    whole = (tmp_path / "vectors.safetensors").read_bytes()
    (tmp_path / "vectors.safetensors").write_bytes(whole[:left])
    with pytest.raises(ValueError, match=r"vectors.safetensors is not a whole safetensors file"):
        PersonaVectors.load(tmp_path / "vectors.safetensors")


def test_means_whose_making_was_killed_are_not_there_at_all(tiny_bridge, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        CapturedMeans(tmp_path / "means.npy", tiny_bridge, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_with_a_damaged_answer_is_refused_with_its_file(tmp_path):
    cache = CallCache(tmp_path / "calls.sqlite")
    cache._one("INSERT INTO answers VALUES (?, ?)", "key", '{"text": 1')
    with pytest.raises(ValueError, match=r"calls.sqlite has a damaged answer at key: move it away"):
        cache.get("key")


# Clocks


def test_a_clock_that_runs_backwards_changes_no_result(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 4)
    vectors = pair_of_vectors(tiny_bridge)
    screen(tiny_bridge, rows(20), vectors, output_dir=tmp_path / "plain", base="proxy", **QUIET)
    now = [time.time()]

    def earlier():
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    screen(tiny_bridge, rows(20), vectors, output_dir=tmp_path / "run", base="proxy", **QUIET)
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (earlier(), earlier()))
    screen(tiny_bridge, rows(20), vectors, output_dir=tmp_path / "run", base="proxy", **QUIET)
    assert_same_files(tmp_path / "run", tmp_path / "plain")


# Ctrl-C

# A command whose work is to write a row and wait; "slow" also takes its time to stop.
WAITS = """
import sys, time
import persona_lens.cli, persona_lens.storage.files, persona_lens.traits.trait

output, how = sys.argv[1:]

def work(_):
    persona_lens.storage.files.JsonLines(output).append([{"row": 1}])
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        if how == "slow":
            print("stopping", flush=True)
            time.sleep(60)

persona_lens.traits.trait.load_trait = work
sys.argv = ["persona-lens", "traits", "evil"]
persona_lens.cli.main()
"""


@pytest.fixture
def interrupted(tmp_path):
    """Start the command and press Ctrl-C once or twice; gives its exit code, standard error and file."""

    def press(how):
        command = [sys.executable, "-c", WAITS, str(tmp_path / "rows.jsonl"), how]
        with child_process(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            for line in ["ready", "stopping"] if how == "slow" else ["ready"]:
                assert process.stdout.readline() == f"{line}\n"
                process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        return process.returncode, told, JsonLines(tmp_path / "rows.jsonl").read()

    return press


def test_an_interrupt_ends_a_command_with_130_and_one_line_and_what_is_written_stays(interrupted):
    told = "persona-lens: interrupted. What was written is kept, and the same command goes on from it.\n"
    assert interrupted("once") == (130, told, [{"row": 1}])


def test_a_second_interrupt_ends_it_at_once(interrupted):
    assert interrupted("slow") == (130, "persona-lens: interrupted twice, and stopped at once.\n", [{"row": 1}])


@pytest.fixture
def in_the_background():
    """This process ignores SIGINT, as one that a shell has started in the background does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_background")
def test_a_child_is_interrupted_although_its_tests_run_in_the_background(interrupted):
    code, _, rows = interrupted("once")
    assert (code, rows) == (130, [{"row": 1}])
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_child_does_not_outlive_the_test_that_started_it():
    with pytest.raises(AssertionError), child_process([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        raise AssertionError
    assert child.returncode == -signal.SIGKILL


IGNORES = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import sys
import persona_lens.cli, persona_lens.traits.trait

def work(_):
    print("ready", flush=True)
    sys.stdin.readline()
    raise ValueError("the work was done")

persona_lens.traits.trait.load_trait = work
sys.argv = ["persona-lens", "traits", "evil"]
persona_lens.cli.main()
"""


def test_a_command_whose_parent_ignores_interrupts_goes_on_as_nohup_means_it_to():
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with child_process([sys.executable, "-c", IGNORES], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate("go on\n", timeout=30)
    assert (process.returncode, told) == (1, "persona-lens: the work was done\n")


def test_an_interrupt_in_the_middle_of_a_line_leaves_no_half_of_it(tmp_path, monkeypatch):
    file = JsonLines(tmp_path / "rows.jsonl")
    file.append([{"row": 1}])

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        file.append([{"row": 2}])
    assert file.read() == [{"row": 1}]
