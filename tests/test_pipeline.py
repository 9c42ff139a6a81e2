"""The whole pipeline on the embedded model, in miniature, and what it refuses."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from persona_lens.evaluation.dose_response import dose_response
from persona_lens.evaluation.evaluate import evaluate
from persona_lens.evaluation.layer_selection import select_layer
from persona_lens.extraction.pipeline import extract_persona_vectors, read_examples
from persona_lens.finetuning.shift import finetuning_shift
from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
from persona_lens.judges.scores import ScoredRollout
from persona_lens.monitoring.experiment import monitoring_experiment
from persona_lens.monitoring.result import Monitoring
from persona_lens.pages.run_report import write_report
from persona_lens.replication.run import replicate
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.traits.trait import load_trait
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.evaluation_cases import SHORT, TRAIT, LetterJudge, make_rollout
from tests.intervention_cases import some_vectors

pytestmark = pytest.mark.end_to_end

FILES = {
    "calibration.json",
    "calibration_rollouts.jsonl",
    "example_tokens.jsonl",
    "response_means.npy",
    "rollouts.jsonl",
    "row_means.npy",
    "scores.jsonl",
    "summary.json",
    "trait.json",
    "vectors.safetensors",
}


@pytest.fixture(scope="module")
def run_pipeline():
    """Extract `evil`, of two pairs, from four questions in twelve-token responses, batches of eight, into a folder.

    The judge's time grows with the square of the pairs, and two are the fewest of which it can leave one out.
    """

    trait = replace(load_trait("evil"), instructions=load_trait("evil").instructions[:2])

    def run(model, folder, **choices):
        judge = LikelihoodRatioJudge(model, calibration_questions=2, neutral_samples=3, batch_size=8)
        engine = ModelEngine(model, max_new_tokens=12, batch_size=8)
        settings = {"questions": trait.extraction_questions[:4], "per_question": 1, "min_pairs": 2, **choices}
        return extract_persona_vectors(
            model, trait, judge=judge, engine=engine, output_dir=folder, progress=False, **settings
        )

    return run


@pytest.fixture(scope="module")
def finished(embedded_model, run_pipeline, tmp_path_factory):
    """A run's folder and its vectors."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_pipeline(embedded_model, folder)


def lines(path):
    return sorted(path.read_text().splitlines())


def test_a_run_leaves_every_file_that_it_promises_with_the_numbers_of_its_result(
    embedded_model, finished, run_pipeline, tmp_path
):
    folder, vectors = finished
    assert {path.name for path in folder.iterdir()} == FILES
    assert torch.equal(PersonaVectors.load(folder / "vectors.safetensors").directions, vectors.directions)
    pairs = json.loads((folder / "summary.json").read_text())["pairs"]
    assert pairs["pairs"] == 4 * 2
    assert pairs["kept"] + sum(pairs["dropped"].values()) == pairs["pairs"]
    assert vectors.counts["positive"] == vectors.counts["negative"] == pairs["kept"]
    statistics = vectors.statistics
    best = int(statistics.held_out_auc.argmax())
    assert statistics.held_out_auc[best] > 0.6
    assert statistics.held_out_auc_low[best] <= statistics.held_out_auc[best]
    page = write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{pairs['kept']} of {pairs['pairs']}" in page
    assert vectors.provenance.model.weights_hash in page
    assert page.count("<b class=kept>") == min(3, pairs["kept"])
    with pytest.raises(ValueError, match="another seed"):
        run_pipeline(embedded_model, folder, seed=1)
    with pytest.raises(ValueError, match=r"pairs kept .*; at least 9 needed\. Sample more rollouts"):
        run_pipeline(embedded_model, folder, min_pairs=9)


def test_vectors_of_one_class_belong_to_the_other(both_classes, finished, load_embedded_model):
    for model_class in ("TransformerBridge", "HookedTransformer"):
        assert finished[1].check(load_embedded_model(model_class)) == "same"


def test_a_run_that_was_killed_goes_on_to_the_same_rows_scores_and_vectors(
    embedded_model, finished, run_pipeline, tmp_path
):
    folder, vectors = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("summary.json", "vectors.safetensors", "row_means.npy"):
        (tmp_path / name).unlink()
    for name in ("rollouts.jsonl", "scores.jsonl"):
        whole = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 5])  # ends within a line of the second batch

    again = run_pipeline(embedded_model, tmp_path)

    assert lines(tmp_path / "rollouts.jsonl") == lines(folder / "rollouts.jsonl")
    assert lines(tmp_path / "scores.jsonl") == lines(folder / "scores.jsonl")
    assert torch.equal(again.directions, vectors.directions)


def test_a_folder_with_another_trait_is_refused_and_left_alone(tiny_model, tmp_path):

    load_trait("humorous").save(tmp_path / "trait.json")
    before = (tmp_path / "trait.json").read_bytes()
    with pytest.raises(ValueError, match=r"trait\.json is another trait than this run's 'evil': choose another output"):
        extract_persona_vectors(tiny_model, "evil", output_dir=tmp_path, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"trait.json": before}


def test_a_response_beyond_the_context_is_left_out_of_the_examples(tiny_model, tmp_path):

    words = "yes " * 2 * tiny_model.cfg.n_ctx
    short, long = make_rollout("Why?", 0), replace(make_rollout("Why?", 1), response=words, response_tokens=None)
    pairs = [(ScoredRollout(short, 90.0, 90.0), ScoredRollout(long, 10.0, 90.0))]
    read_examples(tiny_model, some_vectors(tiny_model), pairs, tmp_path / "example_tokens.jsonl")
    assert [chat.name for chat in Monitoring.load(tmp_path / "example_tokens.jsonl").chats] == [short.key]
    read_examples(tiny_model, some_vectors(tiny_model), [(pairs[0][1], pairs[0][1])], tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    "name", ["summary.json", "vectors.safetensors", "example_tokens.jsonl", "row_means.npy", "evaluation.json"]
)
def test_a_file_of_the_users_by_the_name_of_a_result_is_left_as_it_was(tiny_bridge, tmp_path, name):

    file = tmp_path / name
    if name.endswith(".npy"):
        np.save(file, np.zeros((3, 2)))
    elif name.endswith(".safetensors"):
        save_file({"mine": torch.zeros(2)}, file)
    else:
        file.write_text('{"mine": 1}\n')
    before = file.read_bytes()

    def run():
        if name == "evaluation.json":
            evaluate(tiny_bridge, TRAIT, judge=LetterJudge(), output_dir=tmp_path, **SHORT)
        else:
            extract_persona_vectors(tiny_bridge, TRAIT, output_dir=tmp_path, progress=False)

    with pytest.raises(ValueError, match=f"{name} holds something else"):
        run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: before}


@pytest.mark.parametrize(
    "name", ["layer_sweep.json", "dose_response.json", "experiment.json", "shift.json", "preset.json"]
)
def test_an_experiment_replaces_no_result_of_something_else(tiny_bridge, tmp_path, name):

    vectors, judge = some_vectors(tiny_bridge), LetterJudge()
    (tmp_path / name).write_text('{"mine": 1}')
    runs = {
        "layer_sweep.json": lambda: select_layer(
            tiny_bridge, vectors, TRAIT, judge=judge, output_dir=tmp_path, **SHORT
        ),
        "dose_response.json": lambda: dose_response(
            tiny_bridge, vectors.at(1), TRAIT, judge=judge, output_dir=tmp_path, **SHORT
        ),
        "experiment.json": lambda: monitoring_experiment(
            tiny_bridge, vectors, TRAIT, [], judge=judge, layer=1, output_dir=tmp_path
        ),
        "shift.json": lambda: finetuning_shift(tiny_bridge, tiny_bridge, ["Why?"], vectors, output=tmp_path / name),
        "preset.json": lambda: replicate("embedded", tmp_path, model=tiny_bridge, progress=False),
    }
    with pytest.raises(ValueError, match=f"{name} holds something else"):
        runs[name]()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: '{"mine": 1}'}
