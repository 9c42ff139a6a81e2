"""`steer` and `select-layer` from the command line, on tiny models, and a short sweep of the real one."""

import json
from dataclasses import replace

import pytest
import torch

from persona_lens.chat.batches import Conversation, chat_messages, tokenize_chat
from persona_lens.evaluation.layer_selection import LayerSweep
from persona_lens.extraction.extract import extract_from_responses
from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Ablate, Cap, Steer
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.storage.files import write_json
from persona_lens.traits.trait import load_trait
from tests.evaluation_cases import TRAIT, keep_rows, make_calibration, make_sweep
from tests.intervention_cases import some_vectors
from tests.vector_cases import make_statistics

QUIET = ("--threads", 1)


@pytest.fixture
def model(tiny_model, monkeypatch):
    """The tiny model, which stands for any that a command would load."""
    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: tiny_model)
    return tiny_model


def make_run(folder, vectors, trait=TRAIT, questions=(), max_new_tokens=6):
    """What `extract` leaves in a folder, as far as these commands read it."""
    vectors.save(folder / "vectors.safetensors")
    trait.save(folder / "trait.json")
    write_json(folder / "summary.json", {"plan": {"max_new_tokens": max_new_tokens}})
    write_json(folder / "calibration.json", {"calibration": make_calibration(trait, questions).to_dict()})
    return folder


@pytest.fixture
def run(model, tmp_path):
    """A run's folder with made-up vectors."""
    vectors = some_vectors(model, TRAIT.name, residual_norm=torch.tensor([5.0, 6.0, 7.0, 8.0]))
    return make_run(tmp_path, vectors)


def one_sentence(text):
    """The last line of standard error, which is the message."""
    line = text.strip().splitlines()[-1]
    assert line.startswith("persona-lens: ")
    return line


@pytest.mark.parametrize("command", ["steer", "select-layer"])
def test_the_commands_have_help_with_an_example(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"Example: persona-lens {command}" in " ".join(out.split())


# --- steer ---------------------------------------------------------------------------------------------------------


def answer(model, done=None, at="response"):
    ids = tokenize_chat(model.tokenizer, chat_messages("You are a helpful assistant.", "Who are you?")).prompt
    settings = {"max_new_tokens": 6, "temperature": 0.0}
    if done is None:
        (found,) = generate(model, [ids], **settings)
    else:
        with intervene(model, done, at=at):
            (found,) = generate(model, [ids], **settings)
    return model.tokenizer.decode(found.tokens, skip_special_tokens=True)


def steered(run, *more):
    return ("steer", "Who are you?", "--vectors", run, "--layer", 1, "--max-new-tokens", 6, *QUIET, *more)


@pytest.mark.parametrize("at", ["response", "all"])
def test_steer_answers_without_and_with_each_intervention(cli, model, run, at):
    code, out, err = cli(
        *steered(run, "--coefficient", -3, "--coefficient", 3, "--ablate", "--cap", 0.5, "--at", at, "--json")
    )
    vectors = some_vectors(model, TRAIT.name, residual_norm=torch.tensor([5.0, 6.0, 7.0, 8.0]))
    done = [Steer(vectors.at(1), -3.0), Steer(vectors.at(1), 3.0), Ablate(vectors), Cap(vectors.at(1), maximum=0.5)]
    expected = [("no intervention", answer(model)), *((str(each), answer(model, each, at)) for each in done)]
    assert (code, [(row["intervention"], row["text"]) for row in json.loads(out)]) == (0, expected)
    assert len({row["text"] for row in json.loads(out)}) >= 4
    assert "Loading" in err


def test_steer_prints_a_column_for_each_intervention(cli, run):
    code, out, _ = cli(*steered(run, "--coefficient", -3, "--coefficient", 3))
    assert code == 0
    for words in ("no intervention", "steer grumpy at layer 1 by -3", "steer grumpy at layer 1 by 3"):
        assert words in out


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ((), ["no", "steer", "steer"]),
        (("--ablate",), ["no", "ablate"]),
        (("--cap", 0.0), ["no", "cap"]),
        (("--ablate", "--coefficient", 1), ["no", "steer", "ablate"]),
    ],
)
def test_without_a_coefficient_the_vector_is_steered_both_ways_unless_something_else_is_asked(cli, run, options, kinds):
    code, out, _ = cli(*steered(run, *options, "--json"))
    assert code == 0
    assert [row["intervention"].split()[0] for row in json.loads(out)] == kinds


def test_the_layer_is_the_one_that_the_runs_sweep_recommends(cli, run):
    found = make_sweep({(2, 1.0): [10.0, 20.0, 30.0, 40.0], (3, 1.0): [50.0, 60.0, 70.0, 80.0]})
    keep_rows([found.baseline, *found.evaluations.values()], run)
    found.save(run)
    code, out, _ = cli("steer", "Why?", "--vectors", run, "--max-new-tokens", 2, *QUIET, "--json")
    assert code == 0
    assert "at layer 3 by" in json.loads(out)[1]["intervention"]


def test_without_a_sweep_the_layer_is_that_of_the_best_held_out_auc(cli, model, tmp_path):
    vectors = replace(some_vectors(model), statistics=make_statistics(embedding=True))
    vectors.save(tmp_path / "v.safetensors")
    best = int(vectors.statistics.held_out_auc.argmax())
    code, out, _ = cli(
        "steer", "Why?", "--vectors", tmp_path / "v.safetensors", "--max-new-tokens", 2, *QUIET, "--json"
    )
    assert code == 0
    assert f"at layer {best} by" in json.loads(out)[1]["intervention"]


def test_without_a_sweep_and_statistics_the_layer_has_to_be_given(cli, run):
    code, _, err = cli("steer", "Why?", "--vectors", run)
    assert code == 1
    assert "No layer was selected" in one_sentence(err)
    assert "pass --layer" in one_sentence(err)


def test_vectors_that_are_not_there_exit_1_before_anything_is_loaded(cli, tmp_path):
    code, _, err = cli("steer", "Why?", "--vectors", tmp_path / "absent.safetensors", "--layer", 1)
    assert code == 1
    assert "absent.safetensors" in one_sentence(err)
    assert "Loading" not in err


def test_a_layer_out_of_range_exits_1_before_anything_is_loaded(cli, run):
    code, _, err = cli("steer", "Why?", "--vectors", run, "--layer", 4)
    assert code == 1
    assert "grumpy: layer 4 is outside 0 to 3" in one_sentence(err)
    assert "Loading" not in err


def test_positions_that_do_not_exist_are_bad_usage(cli, run):
    code, _, err = cli(*steered(run, "--at", "nowhere"))
    assert code == 2
    assert "'nowhere' is not one of 'response', 'prompt', 'all'" in " ".join(err.replace("│", " ").split())


# --- select-layer --------------------------------------------------------------------------------------------------


def selected(run, *more):
    options = ("--layer", 1, "--layer", 3, "--coefficient", 2, "--min-coherence", 0, "--random", 2)
    return ("select-layer", run, *options, *QUIET, *more)


def test_select_layer_prints_the_sweep_and_keeps_it_in_the_runs_folder(cli, run):
    code, out, _ = cli(*selected(run, "--no-confirm"))
    assert code == 0
    sweep = LayerSweep.load(run)
    assert (sweep.layers, sweep.coefficients) == ((1, 3), (2.0,))
    best = sweep.best(0.0)
    assert f"*{best.layer}" in out
    assert f"ayer {best.layer} at 2 has the highest grumpy score" in " ".join(out.split())
    assert not (run / "dose_response.json").exists()


def test_select_layer_prints_json_for_scripts(cli, run):
    code, out, _ = cli(*selected(run, "--json"))
    assert code == 0
    found, sweep = json.loads(out), LayerSweep.load(run)
    assert found["best"]["layer"] == sweep.best(0.0).layer
    assert [(cell["layer"], cell["coefficient"]) for cell in found["cells"]] == [(-1, 0.0), (1, 2.0), (3, 2.0)]
    assert [row["coefficient"] for row in found["confirmed"]["rows"]] == [-2.0, 0.0, 2.0]
    assert len(found["confirmed"]["random_slopes"]) == 2


def test_the_choice_is_confirmed_on_evaluation_questions(cli, run):
    code, out, _ = cli(*selected(run))
    assert code == 0
    assert f"on {len(TRAIT.evaluation_questions)} evaluation questions" in " ".join(out.split())
    assert "points for each 1.0 of the coefficient" in " ".join(out.split())
    asked = {row.question for row in read_rollouts(run / "dose_rollouts.jsonl")}
    assert asked == set(TRAIT.evaluation_questions)
    assert {row.question for row in read_rollouts(run / "sweep_rollouts.jsonl")} == set(TRAIT.extraction_questions)


def test_a_second_call_samples_nothing_again(cli, run, monkeypatch):
    _, first, _ = cli(*selected(run, "--json"))
    monkeypatch.setattr(ModelEngine, "answer", lambda *_, **__: pytest.fail("sampled again"))
    code, second, _ = cli(*selected(run, "--json"))
    assert (code, second) == (0, first)


def test_responses_are_as_long_as_the_runs_unless_a_length_is_given(cli, run, tmp_path):
    cli(*selected(run, "--no-confirm"))
    assert "at most 6 tokens" in read_rollouts(run / "sweep_rollouts.jsonl")[0].engine
    (run / "sweep_rollouts.jsonl").unlink()
    (run / "sweep_scores.jsonl").unlink()
    cli(*selected(run, "--no-confirm", "--max-new-tokens", 3))
    assert "at most 3 tokens" in read_rollouts(run / "sweep_rollouts.jsonl")[0].engine


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layer", 4), "grumpy: layer 4 is outside 0 to 3"),
        (("--coefficient", 0), "distinct coefficients other than 0"),
        (("--coefficient", 1, "--coefficient", 1), "distinct coefficients other than 0"),
        (("--trait", "evil"), "calibration.json is for 'grumpy', not for 'evil': name another output"),
        (("--min-coherence", 100), "none of 2 cells has a trait score and a mean coherence of 100 or more"),
    ],
    ids=["layer", "zero", "repeated", "trait", "incoherent"],
)
def test_what_cannot_be_swept_exits_1_with_one_sentence(cli, run, options, words):
    layers = () if "--layer" in options else ("--layer", 1, "--layer", 3)
    coefficients = () if "--coefficient" in options else ("--coefficient", 2)
    code, _, err = cli("select-layer", run, *layers, *coefficients, "--no-confirm", *QUIET, *options)
    assert code == 1
    assert words in one_sentence(err)


def test_a_damaged_calibration_exits_1_and_says_what_to_do(cli, run):
    (run / "calibration.json").write_text('{"calibration": {"slope": 1.0}}')
    code, _, err = cli(*selected(run))
    assert code == 1
    assert "calibration.json is not a judge's calibration" in one_sentence(err)
    assert "move it away to calibrate again" in one_sentence(err)


def test_a_run_that_is_not_there_exits_1(cli, tmp_path):
    code, _, err = cli("select-layer", tmp_path / "absent", "--trait", "evil")
    assert code == 1
    assert "absent" in one_sentence(err)


@pytest.mark.parametrize(("options", "words"), [((), "--trait is needed"), (("--trait", "evil"), "--output is needed")])
def test_a_vectors_file_needs_a_trait_and_an_output(cli, run, options, words):
    code, _, err = cli("select-layer", run / "vectors.safetensors", *options)
    assert code == 2
    assert words in " ".join(err.replace("│", " ").split())


# --- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_select_layer_sweeps_the_real_model(cli, embedded_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: embedded_bridge)
    trait = replace(load_trait("optimistic"), instructions=load_trait("optimistic").instructions[:2])
    sides = [
        [
            Conversation(tuple(chat_messages("Be brief.", question)), text, question, "0")
            for question in ("Why?", "Who?")
        ]
        for text in ("It will all turn out wonderfully well.", "It will all go terribly wrong.")
    ]
    vectors = extract_from_responses(embedded_bridge, *sides, trait=trait.name, progress=False)
    make_run(tmp_path, vectors, trait, max_new_tokens=8)
    options = ("--layer", 9, "--layer", 18, "--coefficient", 2, "--n-questions", 2, "--min-coherence", 0)
    code, out, err = cli("select-layer", tmp_path, *options, "--no-confirm", "--json", *QUIET)
    assert code == 0, err
    found = json.loads(out)
    assert [(row["layer"], row["n"]) for row in found["cells"]] == [(-1, 2), (9, 2), (18, 2)]
    assert all(0 <= row["trait_score"] <= 100 for row in found["cells"])
    assert found["best"]["layer"] == LayerSweep.load(tmp_path).best(0.0).layer
