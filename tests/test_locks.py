"""One process at a time writes a run's folder, and another one is told who does."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest

from persona_lens.evaluation.dose_response import dose_response
from persona_lens.evaluation.evaluate import evaluate
from persona_lens.evaluation.layer_selection import select_layer
from persona_lens.extraction.pipeline import extract_persona_vectors
from persona_lens.judges.scores import score_rollouts
from persona_lens.replication.run import replicate
from persona_lens.rollouts.collection import collect_rollouts, plan_rollouts
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.screening.run import screen
from persona_lens.storage.files import write_whole
from persona_lens.storage.locks import alone, sweep_up, taken, writes_file, writes_folder
from tests.evaluation_cases import SHORT, TRAIT, LetterJudge, make_rollout
from tests.fault_cases import another_process
from tests.finetuning_cases import train
from tests.intervention_cases import some_vectors
from tests.screening_cases import QUIET, pair_of_vectors, rows


def refused(name, holder):
    return pytest.raises(OSError, match=rf"{name} is being written by process {holder}: wait until it ends, or name")


@pytest.mark.parametrize(
    "command",
    [
        lambda model, run: extract_persona_vectors(model, TRAIT, output_dir=run, progress=False),
        lambda model, run: select_layer(
            model, some_vectors(model), TRAIT, judge=LetterJudge(), output_dir=run, **SHORT
        ),
        lambda model, run: dose_response(
            model, some_vectors(model).at(1), TRAIT, judge=LetterJudge(), output_dir=run, **SHORT
        ),
        lambda model, run: evaluate(model, TRAIT, judge=LetterJudge(), output_dir=run, **SHORT),
        lambda model, run: train(model, output=run),
        lambda model, run: replicate("embedded", run, model=model, progress=False),
    ],
    ids=["extract", "select_layer", "dose_response", "evaluate", "finetune", "replicate"],
)
def test_a_folder_that_another_process_writes_is_refused_and_left_alone(tiny_bridge, tmp_path, command):
    with another_process(tmp_path / "run" / ".lock") as holder:
        before = (tmp_path / "run" / ".lock").read_bytes()
        with refused("run", holder):
            command(tiny_bridge, tmp_path / "run")
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {".lock": before}


def test_a_file_of_rollouts_or_scores_that_another_process_writes_is_refused_and_another_is_not(tiny_bridge, tmp_path):
    rollouts, scores = tmp_path / "rollouts.jsonl", tmp_path / "scores.jsonl"
    with (
        another_process(tmp_path / ".rollouts.jsonl.lock") as holder,
        writes_file(scores),
        refused("rollouts.jsonl", holder),
    ):
        collect_rollouts(ModelEngine(tiny_bridge), plan_rollouts(TRAIT), output_file=rollouts, progress=False)
    with another_process(tmp_path / ".scores.jsonl.lock") as holder, refused("scores.jsonl", holder):
        score_rollouts([make_rollout("Why?", 0)], TRAIT, judge=LetterJudge(), output_file=scores, progress=False)


def test_the_lock_of_a_process_that_was_killed_holds_nothing(tmp_path):
    with another_process(tmp_path / ".lock") as holder:
        os.kill(holder, signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with writes_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def in_thread(work):
    """What a new thread's work gives, or the words of its OSError."""
    answers = []

    def run():
        try:
            answers.append(work())
        except OSError as error:
            answers.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return answers[0]


def take(context):
    with context:
        return "took it"


BY_A_THREAD = "is being written by another thread of this process: wait until it ends, or name another output."


def test_the_thread_that_holds_a_folder_may_take_it_again_and_another_may_not(tmp_path):
    with writes_folder(tmp_path):
        assert take(writes_folder(tmp_path)) == "took it"
        assert in_thread(lambda: take(writes_folder(tmp_path))) == f"{tmp_path} {BY_A_THREAD}"
    assert in_thread(lambda: take(writes_folder(tmp_path))) == "took it"


def test_after_an_error_a_folder_is_free_again_and_gone_if_it_was_new(tmp_path):
    for folder in (tmp_path, tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(ZeroDivisionError), writes_folder(folder):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".summary.json.4711.unfinished", ".summary.json.0123456789abcdef.unfinished"])
def test_what_a_killed_process_left_of_a_file_is_taken_away_and_no_file_of_the_users(tmp_path, name):
    mine = [".notes.old.unfinished", ".thesis.unfinished", "a.json.4711.unfinished"]
    for path in (name, f"{name}.lock", *mine):
        (tmp_path / path).write_text("")
    with writes_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *mine]


@pytest.mark.parametrize("who", ["this process", "another process"])
def test_an_unfinished_file_that_is_still_written_stays(tmp_path, monkeypatch, who):
    replace = os.replace

    def sweep_and_replace(*paths):
        monkeypatch.undo()
        if who == "this process":
            sweep_up(tmp_path)
        else:
            subprocess.run([sys.executable, "-c", SWEEP, tmp_path], check=True)
        replace(*paths)

    monkeypatch.setattr(os, "replace", sweep_and_replace)
    write_whole(tmp_path / "summary.json", b"{}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"summary.json": "{}"}


SWEEP = """
import sys, pathlib
from persona_lens.storage.locks import writes_folder
with writes_folder(pathlib.Path(sys.argv[1])): pass
"""


def test_an_unfinished_file_stays_where_nobody_can_tell_whether_it_is_written(tmp_path, no_locks):
    unfinished = tmp_path / ".summary.json.0123456789abcdef.unfinished"
    unfinished.write_text("{}")
    sweep_up(tmp_path)
    assert list(tmp_path.iterdir()) == [unfinished]


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, as some network file systems are."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_file_system_without_locks_is_said_in_one_warning_and_the_work_goes_on(tmp_path, no_locks):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with (
            writes_folder(tmp_path / "run"),
            writes_file(tmp_path / "run" / "rows.jsonl"),
            alone(tmp_path / "run" / "a"),
        ):
            pass
        with taken(tmp_path / "run" / "b") as mine:
            assert mine
    assert [str(each.message) for each in said] == [
        f"{tmp_path / 'run'} is on a file system without locks: let nothing else write there meanwhile."
    ]


def test_a_screening_goes_on_where_the_file_system_has_no_locks(tiny_bridge, tmp_path, no_locks):
    vectors = pair_of_vectors(tiny_bridge)
    with pytest.warns(UserWarning, match="without locks"):
        found = screen(tiny_bridge, rows(4), vectors, output_dir=tmp_path / "run", base="proxy", **QUIET)
    assert found.counts["planned"] == 4


LOCKED = {
    ".lock": lambda path: writes_folder(path.parent),
    ".rows.jsonl.lock": lambda path: writes_file(path.parent / "rows.jsonl"),
    "materials.lock": alone,
    "shard.lock": taken,
}


@pytest.mark.parametrize("name", LOCKED)
@pytest.mark.parametrize(
    ("there", "words"),
    [("link", "a symbolic link"), ("link to nothing", "a symbolic link"), ("notes", "a file with other contents")],
)
def test_what_is_no_lock_in_a_locks_place_is_refused_and_left_as_it_was(tmp_path, name, there, words):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    lock = run / name
    mine = lock if there == "notes" else victim
    if there != "link to nothing":
        mine.write_text("my notes")
    if there != "notes":
        lock.symlink_to(victim)
    with pytest.raises(OSError, match=rf"expected a lock of persona_lens at .*, got {words}: see"), LOCKED[name](lock):
        pass
    assert mine.read_text() == "my notes" if there != "link to nothing" else not victim.exists()
    assert lock.is_symlink() == (there != "notes")


def test_a_forked_child_does_not_hold_what_its_parent_holds_and_leaves_it_alone(tmp_path):
    with writes_folder(tmp_path):
        if (child := os.fork()) == 0:
            try:
                with writes_folder(tmp_path):
                    os._exit(1)
            except OSError as error:
                os._exit(0 if f"process {os.getppid()}" in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_holder_is_told_after_another_one_was_refused(tmp_path):
    with writes_folder(tmp_path):
        for _ in range(2):
            told = subprocess.run([sys.executable, "-c", SWEEP, tmp_path], capture_output=True, text=True)
            assert f"{tmp_path} is being written by process {os.getpid()}: wait until it ends" in told.stderr


def test_who_waits_for_a_file_gets_it_when_the_thread_that_holds_it_is_done(tmp_path):
    order = []

    def second():
        with writes_file(tmp_path / "a", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with writes_file(tmp_path / "a", wait=True):
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_refused_before_a_model_is_loaded_and_lets_its_folder_go(cli, tmp_path):
    command = ("extract", "--trait", "evil", "--model", "no-such-model", "--output", tmp_path / "run")
    for _ in range(2):
        code, _, words = cli(*command)
        assert (code, "no-such-model" in words) == (1, True)
    assert list(tmp_path.iterdir()) == []
    with another_process(tmp_path / "run" / ".lock") as holder:
        code, _, words = cli(*command)
    assert (code, f"{tmp_path / 'run'} is being written by process {holder}: wait" in words) == (1, True)


def test_a_file_is_locked_under_every_name_that_leads_to_it(tmp_path):
    file, link, other = tmp_path / "rows.jsonl", tmp_path / "link.jsonl", tmp_path / "other" / "rows.jsonl"
    file.write_text("{}\n")
    other.parent.mkdir()
    link.symlink_to(file)
    other.symlink_to(link)
    with writes_file(file):
        for path in (link, other):
            assert in_thread(lambda path=path: take(writes_file(path))) == f"{path} {BY_A_THREAD}"
    assert sorted(tmp_path.rglob("*.lock")) == []


def test_a_link_to_no_file_makes_nothing_where_it_leads(tiny_bridge, tmp_path):
    link = tmp_path / "rollouts.jsonl"
    link.symlink_to(tmp_path / "elsewhere" / "rows.jsonl")
    engine = ModelEngine(tiny_bridge, max_new_tokens=2)
    with pytest.raises(OSError, match="got a link to no file"):
        collect_rollouts(engine, plan_rollouts(TRAIT, per_question=1)[:1], output_file=link, progress=False)
    assert list(tmp_path.iterdir()) == [link]


def test_a_thread_that_ended_with_a_lock_does_not_share_it_with_the_next_one(tmp_path):
    context = writes_folder(tmp_path)
    in_thread(context.__enter__)
    for _ in range(10):  # the numbers of threads are used again
        assert in_thread(lambda: take(writes_folder(tmp_path))) == f"{tmp_path} {BY_A_THREAD}"
    context.__exit__(None, None, None)
    assert take(writes_folder(tmp_path)) == "took it"
