"""Long runs: killed, out of disk, asked for again."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from persona_lens.finetuning.result import Finetuning
from persona_lens.interventions.values import Steer
from persona_lens.models.adapters import Adapter
from tests.chat_cases import CLOCKED, set_clock
from tests.finetuning_cases import HELD_OUT, STEPS, Interrupted, assert_same_weights, dataset, losses, state_of, train
from tests.intervention_cases import some_vectors

ROOT = Path(__file__).parent.parent
EXACT = {"rtol": 0, "atol": 1e-8}


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


@pytest.fixture(scope="module")
def settings(bridge):
    """With everything that draws at random."""
    during = [Steer(some_vectors(bridge), 0.3)]
    return {"during": during, "dropout": 0.2, "evaluation": dataset(HELD_OUT), "preventative_prompts": ["a", "b"]}


@pytest.fixture(scope="module")
def whole(bridge, settings):
    return train(bridge, **settings)


def interrupt(bridge, at, **changed):
    with pytest.raises(KeyboardInterrupt), Interrupted(bridge, at):
        train(bridge, **changed)


def checkpoints(folder):
    return sorted(each.name for each in (folder / "checkpoints").iterdir())


def test_a_folder_changes_nothing(bridge, settings, whole, tmp_path):
    assert_same_weights(train(bridge, output=tmp_path, **settings), whole)


@pytest.mark.parametrize(("every", "at"), [(None, 5), (1, 2), (2, 6), (4, 3)])
def test_an_interrupted_run_goes_on_to_the_same_result(bridge, settings, whole, tmp_path, every, at):
    interrupt(bridge, at, output=tmp_path, checkpoint_every=every, **settings)
    found = train(bridge, output=tmp_path, checkpoint_every=every, **settings)
    assert losses(found) == pytest.approx(losses(whole), abs=1e-8)
    assert losses(found, "eval_loss") == pytest.approx(losses(whole, "eval_loss"), abs=1e-8)
    assert_same_weights(found, whole, **EXACT)


def test_a_finetuning_goes_on_only_with_the_number_of_threads_it_began_with(bridge, tmp_path):
    interrupt(bridge, 3, output=tmp_path, checkpoint_every=1)
    settings = tmp_path / "settings.json"
    kept = json.loads(settings.read_text())
    assert kept["threads"] == 1
    settings.write_text(json.dumps({**kept, "threads": 2}))
    with pytest.raises(ValueError, match=r"was made with 2 CPU threads, now 1.* Go on with --threads 2 \(in Python"):
        train(bridge, output=tmp_path, checkpoint_every=1)
    del kept["threads"]  # a version that recorded none
    settings.write_text(json.dumps(kept))
    assert len(losses(train(bridge, output=tmp_path, checkpoint_every=1))) == STEPS


def test_a_finetuning_that_goes_on_the_next_day_trains_on_the_prompts_of_the_day_before(bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(bridge.tokenizer, "chat_template", CLOCKED)
    set_clock(monkeypatch, "2026-11-30")
    whole = train(bridge, output=tmp_path / "whole", checkpoint_every=1)
    interrupt(bridge, 3, output=tmp_path / "run", checkpoint_every=1)
    set_clock(monkeypatch, "2026-12-01")
    found = train(bridge, output=tmp_path / "run", checkpoint_every=1)
    assert_same_weights(found, whole, **EXACT)
    assert found.settings["template_date"] == "2026-11-30"
    assert train(bridge, output=tmp_path / "whole", checkpoint_every=1).settings["template_date"] == "2026-11-30"


def test_a_run_interrupted_twice_goes_on_too(bridge, settings, whole, tmp_path):
    interrupt(bridge, 3, output=tmp_path, checkpoint_every=1, **settings)
    interrupt(bridge, 3, output=tmp_path, checkpoint_every=1, **settings)
    assert_same_weights(train(bridge, output=tmp_path, checkpoint_every=1, **settings), whole, **EXACT)


def test_going_on_trains_the_steps_that_are_left_alone(bridge, settings, tmp_path):
    interrupt(bridge, 6, output=tmp_path, checkpoint_every=1, **settings)
    with pytest.raises(KeyboardInterrupt), Interrupted(bridge, 1):
        train(bridge, output=tmp_path, checkpoint_every=1, **settings)
    with Interrupted(bridge, 2):
        assert len(losses(train(bridge, output=tmp_path, checkpoint_every=1, **settings))) == STEPS


@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_checkpoint_that_was_half_written_is_ignored(bridge, settings, whole, tmp_path, damage):
    interrupt(bridge, 6, output=tmp_path, checkpoint_every=2, **settings)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    state = tmp_path / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    text = state.read_text()
    state.write_text(text[: len(text) // 2] if damage == "half" else "")
    if damage == "missing":
        state.unlink()
    (state.parent / "adapter_model.safetensors").write_bytes(b"")
    assert_same_weights(train(bridge, output=tmp_path, checkpoint_every=2, **settings), whole, **EXACT)


def test_a_finished_folder_is_read_and_not_trained_again(bridge, settings, whole, tmp_path):
    train(bridge, output=tmp_path, **settings)
    with Interrupted(bridge, 1):
        found = train(bridge, output=tmp_path, **settings)
    assert_same_weights(found, whole)
    assert (found.losses, found.rows, found.seconds) == (whole.losses, whole.rows, 0.0)
    assert found.settings == json.loads(json.dumps(whole.settings))


def test_a_finished_folder_holds_adapter_and_record_alone(bridge, tmp_path):
    train(bridge, output=tmp_path)
    names = {"adapter_config.json", "adapter_model.safetensors", "finetuning.json", "settings.json"}
    assert {each.name for each in tmp_path.iterdir()} == names
    assert torch.equal(
        *(next(iter(each.weights.values())) for each in (Adapter.load(tmp_path), Finetuning.load(tmp_path).adapter))
    )


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"learning_rate": 2e-2}, r"training\.learning_rate \(0\.01, now 0\.02\)"),
        ({"rank": 8}, r"adapter\.r \(4, now 8\)"),
        ({"seed": 1}, r"training\.(data_)?seed \(0, now 1\)"),
        ({"during": []}, "during"),
        ({"max_length": 45}, "rows"),
    ],
)
def test_other_settings_are_refused_by_name(bridge, settings, tmp_path, changed, name, finished):
    if finished:
        train(bridge, output=tmp_path, **settings)
    else:
        interrupt(bridge, 3, output=tmp_path, checkpoint_every=1, **settings)
    with pytest.raises(ValueError, match=rf"holds a finetuning with another {name}.*: choose another output folder"):
        train(bridge, output=tmp_path, **(settings | changed))


def test_a_folder_where_nothing_was_reached_yet_takes_other_settings(bridge, settings, tmp_path):
    interrupt(bridge, 1, output=tmp_path, **settings)
    found = train(bridge, output=tmp_path, **settings | {"learning_rate": 1e-3})
    assert json.loads((tmp_path / "settings.json").read_text())["training"]["learning_rate"] == 1e-3
    assert len(losses(found)) == STEPS


def test_a_damaged_record_is_refused_with_a_sentence(bridge, tmp_path):
    train(bridge, output=tmp_path)
    (tmp_path / "finetuning.json").write_text("{}")
    with pytest.raises(ValueError, match=r"finetuning.json is not a record of finetuning \('format_version'\): run it"):
        Finetuning.load(tmp_path)


def test_damaged_settings_are_refused_with_a_sentence(bridge, tmp_path):
    train(bridge, output=tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is damaged .*: choose another output folder"):
        train(bridge, output=tmp_path)


def test_a_finished_folder_without_settings_is_read_for_the_same_run_and_refused_for_another(bridge, tmp_path):
    done = train(bridge, output=tmp_path)
    (tmp_path / "settings.json").unlink()
    assert_same_weights(train(bridge, output=tmp_path), done)
    with pytest.raises(
        ValueError, match=r"holds a finetuning with another training\.learning_rate \(0\.01, now 0\.02\)"
    ):
        train(bridge, output=tmp_path, learning_rate=2e-2)


def test_a_record_whose_settings_are_none_is_refused_with_a_sentence(bridge, tmp_path):
    train(bridge, output=tmp_path)
    record = json.loads((tmp_path / "finetuning.json").read_text())
    (tmp_path / "finetuning.json").write_text(json.dumps(record | {"settings": []}))
    with pytest.raises(ValueError, match=r"finetuning.json is not a record of finetuning \(expected dict"):
        train(bridge, output=tmp_path)


def test_checkpoints_without_settings_are_refused_and_left_as_they_were(bridge, settings, tmp_path):
    interrupt(bridge, 3, output=tmp_path, checkpoint_every=1, **settings)
    (tmp_path / "settings.json").unlink()
    before = checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoints holds checkpoints, and there is no .*settings.json that says"):
        train(bridge, output=tmp_path, checkpoint_every=1, **(settings | {"learning_rate": 2e-2}))
    assert checkpoints(tmp_path) == before


@pytest.mark.parametrize("name", ["settings.json", "checkpoints/checkpoint-7/mine.txt"])
def test_a_folder_that_holds_files_of_the_users_by_these_names_is_left_as_it_was(bridge, tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="choose another output"):
        train(bridge, output=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_of_the_users_is_left_as_it_was(bridge, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is of an adapter.*choose another output"):
        train(bridge, output=tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


@pytest.mark.parametrize("changed", [{}, {"learning_rate": 2e-2}])
def test_a_run_that_another_process_ends_while_this_one_takes_the_lock_is_read_or_refused(
    bridge, tmp_path, monkeypatch, changed
):
    import persona_lens.finetuning.training as training

    writes_folder = training.writes_folder

    @contextmanager
    def taken_late(folder):
        monkeypatch.undo()
        done = train(bridge, output=tmp_path)
        monkeypatch.setattr(training, "_train", None)
        assert done.loss
        with writes_folder(folder):
            yield

    monkeypatch.setattr(training, "writes_folder", taken_late)
    if changed:
        with pytest.raises(ValueError, match="holds a finetuning with another training"):
            train(bridge, output=tmp_path, **changed)
    else:
        assert train(bridge, output=tmp_path).seconds == 0.0


def test_a_folder_without_a_finetuning_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no finished finetuning: expected finetuning.json"):
        Finetuning.load(tmp_path)


def test_an_output_that_is_no_folder_is_refused_before_training(bridge, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="Cannot write"), Interrupted(bridge, 1):
        train(bridge, output=tmp_path / "taken")


SCRIPT = """
import os, resource, signal, sys
import torch
from pathlib import Path
from transformers import AutoTokenizer
from persona_lens.models.loading import bridge_from_transformers
from tests import tiny
from tests.finetuning_cases import Interrupted, train
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
bridge = bridge_from_transformers(tiny.llama(tokenizer), tokenizer)
class At(Interrupted):
    def __call__(self, module, inputs, output):
        self.left -= module.training
        if self.left == 0:
            {happens}
with At(bridge, 4):
    train(bridge, output=sys.argv[2], checkpoint_every=1)
"""


def run_in_a_process(happens, tokenizer, output):
    arguments = [sys.executable, "-W", "error", "-c", SCRIPT.format(happens=happens), tokenizer.name_or_path, output]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(bridge, tiny_tokenizer, tmp_path):
    killed = run_in_a_process("os.kill(os.getpid(), signal.SIGKILL)", tiny_tokenizer, tmp_path)
    assert killed.returncode == -9, killed.stderr
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    with Interrupted(bridge, 4):
        found = train(bridge, output=tmp_path, checkpoint_every=1)
    assert_same_weights(found, train(bridge), **EXACT)


@pytest.mark.slow
def test_a_full_disk_stops_it_in_a_sentence_and_it_goes_on_later(bridge, tiny_tokenizer, tmp_path):
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    stopped = run_in_a_process(full, tiny_tokenizer, tmp_path)
    assert stopped.returncode == 1
    last = stopped.stderr.strip().splitlines()[-1]
    assert "CheckpointNotWritten: Cannot write a checkpoint to" in last
    assert last.endswith("free disk space and run again, which goes on from the last checkpoint.")
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    with Interrupted(bridge, 4):
        found = train(bridge, output=tmp_path, checkpoint_every=1)
    assert_same_weights(found, train(bridge), **EXACT)


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_disk(bridge, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"Cannot write a checkpoint to .*unexpected pos 64 vs 0\): free disk space and run"
    ):
        train(bridge, output=tmp_path)
    assert checkpoints(tmp_path) == []


def test_checkpoints_hold_no_more_than_two(bridge, tmp_path):
    interrupt(bridge, 6, output=tmp_path, checkpoint_every=1)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.soak
def test_the_embedded_model_goes_on_where_it_stopped(embedded_bridge, tmp_path):
    settings = {"epochs": 1, "rank": 2, "batch_size": 1, "checkpoint_every": 1, "dropout": 0.1}
    interrupt(embedded_bridge, 3, output=tmp_path, **settings)
    found = train(embedded_bridge, output=tmp_path, **settings)
    assert_same_weights(found, train(embedded_bridge, **settings), rtol=1e-4, atol=1e-6)


# --- damaged and hostile checkpoints ---------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.fixture
def stopped(bridge, tmp_path):
    """A run that stopped after a checkpoint; gives its folder and the checkpoint's."""
    interrupt(bridge, 3, output=tmp_path, checkpoint_every=1)
    return tmp_path, max((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["cut", "empty", "pickle", "saved pickle", "absent"])
def test_a_damaged_checkpoint_is_one_sentence_and_runs_nothing(bridge, stopped, name, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, checkpoint = stopped
    path = checkpoint / name
    whole = path.read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "empty": b"", "pickle": pickle.dumps(Bomb())}
    match how:
        case "absent":
            path.unlink()
        case "saved pickle":
            torch.save(Bomb(), path)
        case _:
            path.write_bytes(contents[how])
    before = state_of(bridge)
    words = rf"^The checkpoint {checkpoint} cannot be resumed from \(.*: delete that folder, and the run goes on"
    with pytest.raises(ValueError, match=words) as refused:
        train(bridge, output=folder, checkpoint_every=1)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "owned").exists()
    assert state_of(bridge) == before
    shutil.rmtree(checkpoint)
    assert len(losses(train(bridge, output=folder, checkpoint_every=1))) == STEPS


def test_a_checkpoint_with_weights_of_the_model_itself_is_refused_and_changes_none(bridge, stopped):
    """The Trainer would load them into the user's model."""
    import safetensors.torch

    folder, checkpoint = stopped
    weights = {name: torch.zeros_like(each) for name, each in bridge.original_model.named_parameters()}
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors")
    before = state_of(bridge)
    with pytest.raises(ValueError, match=r"it holds 'model\.safetensors', which the Trainer does not write"):
        train(bridge, output=folder, checkpoint_every=1)
    assert state_of(bridge) == before


@pytest.mark.parametrize("changed", [{"epoch": "x"}, {"unknown": 1}, {"log_history": [1]}, {"max_steps": [3]}], ids=str)
def test_a_state_of_a_checkpoint_that_is_none_is_one_sentence(bridge, stopped, changed):
    folder, checkpoint = stopped
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ValueError, match=rf"^The checkpoint {checkpoint} cannot be resumed from \("):
        train(bridge, output=folder, checkpoint_every=1)
