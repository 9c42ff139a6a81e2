"""One process at a time writes a run's folder, and another one is told who does."""

import os
import signal
import threading

import pytest

from persona_lens.evaluation import evaluate
from persona_lens.experiments.method_ablations import method_ablations
from persona_lens.judges import score_rollouts
from persona_lens.layer_selection import dose_response, select_layer
from persona_lens.locks import writes_file, writes_folder
from persona_lens.pipeline import extract_persona_vectors
from persona_lens.replication.run import replicate
from persona_lens.rollouts import ModelEngine, collect_rollouts, plan_rollouts
from tests.evaluation_cases import SHORT, TRAIT, LetterJudge, make_rollout
from tests.fault_cases import another_process
from tests.finetuning_cases import train
from tests.intervention_cases import some_vectors


def refused(name, holder):
    return pytest.raises(OSError, match=rf"{name} is being written by process {holder}: wait until it ends, or name")


@pytest.mark.parametrize(
    "command",
    [
        lambda model, run: extract_persona_vectors(model, TRAIT, output=run, progress=False),
        lambda model, run: select_layer(model, some_vectors(model), TRAIT, judge=LetterJudge(), output=run, **SHORT),
        lambda model, run: dose_response(
            model, some_vectors(model).at(1), TRAIT, judge=LetterJudge(), output=run, **SHORT
        ),
        lambda model, run: evaluate(model, TRAIT, LetterJudge(), output=run, **SHORT),
        lambda model, run: train(model, output=run),
        lambda model, run: replicate("embedded", run, model=model, progress=False),
        lambda model, run: method_ablations(model, TRAIT, run, judge=LetterJudge(), layer=1, output=run),
    ],
    ids=["extract", "select_layer", "dose_response", "evaluate", "finetune", "replicate", "method_ablations"],
)
def test_a_folder_that_another_process_writes_is_refused_and_left_alone(tiny_bridge, tmp_path, command):
    with another_process(tmp_path / "run" / ".lock") as holder:
        before = (tmp_path / "run" / ".lock").read_bytes()
        with refused("run", holder):
            command(tiny_bridge, tmp_path / "run")
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {".lock": before}


def test_a_file_of_rollouts_or_scores_that_another_process_writes_is_refused(tiny_bridge, tmp_path):
    rollouts, scores = tmp_path / "rollouts.jsonl", tmp_path / "scores.jsonl"
    with another_process(tmp_path / ".rollouts.jsonl.lock") as holder, refused("rollouts.jsonl", holder):
        collect_rollouts(ModelEngine(tiny_bridge), plan_rollouts(TRAIT), output=rollouts, progress=False)
    with another_process(tmp_path / ".scores.jsonl.lock") as holder, refused("scores.jsonl", holder):
        score_rollouts(LetterJudge(), TRAIT, [make_rollout("Why?", 0)], output=scores, progress=False)


def test_the_lock_of_a_process_that_was_killed_holds_nothing(tmp_path):
    with another_process(tmp_path / ".lock") as holder:
        os.kill(holder, signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with writes_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_thread_that_holds_a_folder_may_take_it_again_and_another_may_not(tmp_path):
    told = []

    def take():
        try:
            with writes_folder(tmp_path):
                told.append("took it")
        except OSError as error:
            told.append(str(error))

    with writes_folder(tmp_path):
        with writes_folder(tmp_path):
            pass
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    take()
    assert told == [f"{tmp_path} is being written by another thread of this process: wait for it.", "took it"]


def test_a_folder_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), writes_folder(tmp_path):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), writes_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_of_a_file_is_taken_away(tmp_path):
    (tmp_path / ".summary.json.4711.unfinished").write_text("{")
    with writes_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_two_files_of_one_folder_are_written_side_by_side(tmp_path):
    with another_process(tmp_path / ".one.jsonl.lock"), writes_file(tmp_path / "two.jsonl"):
        pass


def test_a_command_is_refused_before_a_model_is_loaded(cli, tmp_path):
    with another_process(tmp_path / "run" / ".lock") as holder:
        told = cli("extract", "--trait", "evil", "--model", "no-such-model", "--output", tmp_path / "run")
    words = f"{tmp_path / 'run'} is being written by process {holder}: wait until it ends, or name another output."
    assert told == (1, "", f"persona-lens: {words}\n")


def test_a_command_lets_its_folder_go(cli, tmp_path):
    for _ in range(2):
        code, _, told = cli("extract", "--trait", "evil", "--model", "no-such-model", "--output", tmp_path / "run")
        assert (code, "no-such-model" in told) == (1, True)
    assert list(tmp_path.iterdir()) == []
