"""Whole sweeps: every cell is the evaluation under its steering alone, runs resume, and the planted layer is found."""

import json

import pandas
import pytest
import torch

from persona_lens.evaluation.evaluate import evaluate
from persona_lens.evaluation.layer_selection import LayerSweep, select_layer
from persona_lens.interventions.values import Steer
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.traits.trait import load_trait
from tests import naive
from tests.evaluation_cases import (
    SHORT,
    TRAIT,
    FittedLetterJudge,
    LetterJudge,
    cut,
    judged,
    planted_vectors,
    strict_json,
)
from tests.intervention_cases import some_vectors

SWEEP = {"layers": [2, 0], "coefficients": (2.0, -1.0), "batch_size": 6, **SHORT}


@pytest.fixture
def sweep(tiny_model):
    """Runs a small sweep; what changes from call to call is given."""

    def run(*, judge=None, model=tiny_model, vectors=None, **changes):
        vectors = some_vectors(tiny_model) if vectors is None else vectors
        judge = LetterJudge(model=model, batch_size=6) if judge is None else judge
        return select_layer(model, vectors, TRAIT, judge=judge, **SWEEP | changes)

    return run


@pytest.fixture
def asked(monkeypatch):
    """The keys of the rows that engines were asked for, a list for each batch."""
    batches, answer = [], ModelEngine.answer

    def count(self, prompts, **settings):
        batches.append([prompt.key for prompt in prompts])
        return answer(self, prompts, **settings)

    monkeypatch.setattr(ModelEngine, "answer", count)
    return batches


def contents(folder):
    """The files of a folder, without the lines that were cut short, which lie beside them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if ".jsonl.damaged" not in path.name}


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_every_cell_is_the_evaluation_under_its_steering_alone(tiny_model, sweep, temperature):
    vectors = some_vectors(tiny_model)
    found = sweep(temperature=temperature, per_question=2)
    settings = {"questions": TRAIT.extraction_questions, "per_question": 2, "temperature": temperature, **SHORT}
    assert list(found.evaluations) == [(0, 2.0), (0, -1.0), (2, 2.0), (2, -1.0)]
    for (layer, amount), cell in found.evaluations.items():
        done = [Steer(vectors.at(layer), amount)]
        assert judged(cell) == judged(evaluate(tiny_model, TRAIT, judge=LetterJudge(), interventions=done, **settings))
    assert judged(found.baseline) == judged(evaluate(tiny_model, TRAIT, judge=LetterJudge(), **settings))


def test_the_unsteered_answers_are_sampled_once_and_every_row_once(sweep, asked):
    judge = LetterJudge()
    sweep(judge=judge)
    rows = [key for batch in asked for key in batch]
    assert len(rows) == len(set(rows)) == 2 * (4 + 1)
    assert sorted(judge.judged) == sorted(rows)


def test_doses_are_relative_to_the_stored_residual_norm(tiny_model, sweep):
    vectors = some_vectors(tiny_model, residual_norm=torch.tensor([2.0, 4.0, float("nan"), 8.0]))
    found = sweep(vectors=vectors)
    assert found.doses[0, -1.0] == pytest.approx(-float(vectors.norms[0]) / 2)
    assert found.doses[2, 2.0] is None
    assert found.proxies["relative_norm"] == (pytest.approx(float(vectors.norms[0]) / 2), None)


def test_the_layer_whose_direction_makes_the_model_say_a_letter_is_chosen(tiny_model, tiny_hf_model, sweep):
    vectors = planted_vectors(tiny_model, tiny_hf_model)
    found = sweep(
        judge=LetterJudge("z", model=tiny_model), vectors=vectors, layers=None, coefficients=[-1.0, 1.0], per_question=3
    )
    assert (found.best().layer, found.best().coefficient) == (3, 1.0)
    assert "layer 3 at 1 has the highest grumpy score" in found.best().reason


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_sweep_that_was_cut_goes_on_to_the_same_sweep_and_a_finished_one_does_nothing(sweep, asked, tmp_path, share):
    whole = sweep(output_dir=tmp_path)
    files = contents(tmp_path)
    assert set(files) == {"sweep_rollouts.jsonl", "sweep_scores.jsonl", "layer_sweep.json"}
    (tmp_path / "layer_sweep.json").unlink()
    cut(tmp_path / "sweep_rollouts.jsonl", (1 + share) / 2)
    cut(tmp_path / "sweep_scores.jsonl", share)
    assert sweep(output_dir=tmp_path) == whole == sweep()
    assert contents(tmp_path) == files
    asked.clear()
    judge = LetterJudge()
    assert sweep(output_dir=tmp_path, judge=judge) == whole
    assert (asked, judge.judged) == ([], [])


def test_batches_that_were_finished_are_not_sampled_again(sweep, tmp_path, asked):
    sweep(output_dir=tmp_path)
    batches, rows = list(asked), tmp_path / "sweep_rollouts.jsonl"
    assert len(batches) == 2
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[: len(batches[0]) + 1]) + lines[-1][:40])
    asked.clear()
    sweep(output_dir=tmp_path)
    assert asked == batches[1:]  # an interrupted batch is answered again whole


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [0, 4]}, r"evil: layer 4 is outside 0 to 3; layers count from 0"),
        ({"layers": [-1]}, r"evil: layer -1 is outside 0 to 3"),
        ({"layers": []}, r"A sweep needs layers, and distinct coefficients .* got \[\] and"),
        ({"coefficients": [1.0, 0.0]}, r"distinct coefficients other than 0 .* \[1\.0, 0\.0\]"),
        ({"coefficients": [1.0, 2.0, 1.0]}, r"distinct coefficients other than 0 .* \[1\.0, 2\.0, 1\.0\]"),
        ({"coefficients": []}, r"distinct coefficients other than 0"),
        ({"judge": FittedLetterJudge(TRAIT.extraction_questions)}, "the judge was calibrated on all 2 questions"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_any_sampling(sweep, asked, tiny_gpt2, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        sweep(output_dir=tmp_path, **changes)
    with pytest.raises(ValueError, match=r"the vectors expect d_model 24, and .* has 32"):
        sweep(vectors=some_vectors(tiny_gpt2))
    assert (asked, contents(tmp_path)) == ([], {})


def test_a_wider_sweep_reuses_rows_and_the_folder_gives_back_the_last_one_that_ended(sweep, asked, tmp_path):
    class Interrupted(LetterJudge):
        def score(self, trait, rollouts, *, progress=False):
            raise KeyboardInterrupt

    first = sweep(output_dir=tmp_path, questions=[*TRAIT.extraction_questions, "Why?"], batch_size=1)
    sampled = {key for batch in asked for key in batch}
    before = contents(tmp_path)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        sweep(output_dir=tmp_path, coefficients=(2.0, 0.5, -1.0), layers=None, judge=Interrupted(), batch_size=1)
    assert LayerSweep.load(tmp_path) == first
    wider = sweep(output_dir=tmp_path, coefficients=(2.0, 0.5, -1.0), layers=None, batch_size=1)
    assert not sampled & {key for batch in asked for key in batch}
    assert all(contents(tmp_path)[name].startswith(before[name]) for name in before if name.endswith(".jsonl"))
    assert wider.layers == (0, 1, 2, 3)
    assert wider.baseline.questions == list(TRAIT.extraction_questions)
    assert LayerSweep.load(tmp_path) == wider == sweep(coefficients=(2.0, 0.5, -1.0), layers=None, batch_size=1)
    record = strict_json(tmp_path / "layer_sweep.json")
    assert record["baseline"] == json.loads(json.dumps(wider.baseline.summary()))
    fewer = sweep(output_dir=tmp_path, layers=[1, 2], coefficients=(0.5,), batch_size=1)
    loaded = LayerSweep.load(tmp_path)
    pandas.testing.assert_frame_equal(loaded.table(), fewer.table())
    assert loaded.best() == fewer.best()


@pytest.mark.parametrize("place", ["file/run", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_any_sampling(sweep, asked, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "layer_sweep.json").mkdir(parents=True)
    with pytest.raises(OSError, match="Cannot write"):
        sweep(output_dir=tmp_path / place)
    assert asked == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, r"rollouts made with another seed \(0, now 1\)"),
        ({"at": "all"}, "rollouts made with another engine"),
        ({"max_new_tokens": 7}, "rollouts made with another engine"),
        ({"judge": LetterJudge("a")}, r"scored by another judge \('share of e', now 'share of a'\)"),
    ],
    ids=["seed", "positions", "length", "judge"],
)
def test_the_folder_of_a_sweep_made_otherwise_is_refused_and_left_alone(
    sweep, tmp_path, fresh_tiny_model, changes, words
):
    sweep(output_dir=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words):
        sweep(output_dir=tmp_path, **changes)
    if changes == {"seed": 1}:
        with torch.no_grad():
            next(w for name, w in fresh_tiny_model.named_parameters() if "embed" not in name.lower()).mul_(1.01)
        with pytest.raises(ValueError, match="rollouts made with another engine"):
            sweep(output_dir=tmp_path, model=fresh_tiny_model)
    assert contents(tmp_path) == before


def reference_gap(hf_model, row, tokenizer, done, place):
    """How sure the reference was of the token at a place."""
    ids = row.prompt.tokenize(tokenizer).prompt
    additions = {} if done is None else {done.each[0].layer: done.coefficient * done.each[0].direction}
    with naive.added_at(hf_model, additions, slice(len(ids) - 1, None)):
        return naive.top_two_gaps(hf_model, ids, row.response_tokens[: place + 1])[place]


@pytest.mark.slow
def test_greedy_rows_of_the_real_model_are_those_of_one_evaluation_a_cell(embedded_bridge, embedded_hf_model):
    trait, vectors = load_trait("evil"), 0.1 * some_vectors(embedded_bridge)
    settings = {"questions": trait.extraction_questions[:2], "temperature": 0.0, "max_new_tokens": 12}
    settings |= {"progress": False}
    found = select_layer(
        embedded_bridge, vectors, trait, judge=LetterJudge(), layers=[9, 20], coefficients=[5.0], **settings
    )
    rows, diverging = 0, 0
    for place, cell in {None: found.baseline, **found.evaluations}.items():
        done = None if place is None else Steer(vectors.at(place[0]), place[1])
        alone = evaluate(embedded_bridge, trait, judge=LetterJudge(), interventions=[done] if done else [], **settings)
        for one, other in zip(cell.scored, alone.scored, strict=True):
            rows += 1
            ours, reference = one.rollout.response_tokens, other.rollout.response_tokens
            if ours != reference:
                diverging += 1
                first = next(i for i, pair in enumerate(zip(ours, reference, strict=False)) if len(set(pair)) > 1)
                gap = reference_gap(embedded_hf_model, other.rollout, embedded_bridge.tokenizer, done, first)
                assert gap < 1e-3
    assert len({str(judged(cell)) for cell in found.evaluations.values()}) > 1
    assert diverging <= 0.02 * rows
