"""Evaluations of tiny models in both classes: what is sampled under which intervention, who judges it, what is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest

from persona_lens.evaluation.evaluate import Evaluation, evaluate
from persona_lens.interventions.hooks import intervene, steer
from persona_lens.interventions.values import Ablate, Cap, Intervention, Steer
from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
from persona_lens.judges.scores import score_rollouts
from persona_lens.models.loading import bridge_from_transformers
from persona_lens.rollouts.collection import collect_rollouts, plan_rollouts
from persona_lens.rollouts.engines import Cell, ModelEngine
from persona_lens.statistics import mean_estimate
from tests import tiny
from tests.evaluation_cases import (
    SHORT,
    TRAIT,
    FittedLetterJudge,
    LetterJudge,
    cells_of,
    cut,
    judged,
    make_calibration,
    make_evaluation,
    make_rollout,
    naive_resamples,
    strict_json,
    texts,
)
from tests.intervention_cases import some_vectors


def test_an_evaluation_repeats_by_its_seed(tiny_model):
    one, again, other = (
        evaluate(tiny_model, TRAIT, judge=LetterJudge(), per_question=2, seed=seed, **SHORT) for seed in (0, 0, 1)
    )
    assert one == again
    assert texts(one) != texts(other)


def test_a_row_has_the_same_random_numbers_under_every_intervention(tiny_model):
    vector = some_vectors(tiny_model).at(1)
    plain, nothing, much = (
        evaluate(tiny_model, TRAIT, judge=LetterJudge(), per_question=2, interventions=done, **SHORT)
        for done in ([], [Steer(vector, 1e-9)], [Steer(vector, 4.0)])
    )
    assert judged(nothing) == judged(plain)
    assert texts(much) != texts(plain)


def test_rows_are_sampled_as_by_an_engine_inside_the_context(tiny_model):
    vectors = some_vectors(tiny_model)
    done = [Ablate(vectors), Cap(some_vectors(tiny_model, "kind", seed=1).at(2), maximum=0.5)]
    found = evaluate(tiny_model, TRAIT, judge=LetterJudge(), interventions=done, at="all", **SHORT)
    prompts = plan_rollouts(TRAIT, polarities=["neutral"], questions=TRAIT.evaluation_questions, per_question=1)
    with intervene(tiny_model, *done, at="all"):
        rollouts = collect_rollouts(ModelEngine(tiny_model, max_new_tokens=6), prompts, progress=False)
    assert texts(found) == [row.response for row in rollouts]
    assert found.interventions == tuple(map(str, done))
    assert found.at == "all"


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("at", ["response", "all"])
def test_mixed_rows_are_those_of_one_evaluation_a_cell(tiny_model, at, temperature):
    vectors = some_vectors(tiny_model)
    cells = [Cell(vectors.at(layer), amount) for layer in (0, 2) for amount in (-0.3, 2.0)]
    settings = {"temperature": temperature, "at": at, "batch_size": 7, "seed": 5, "per_question": 2}
    settings["questions"] = TRAIT.extraction_questions
    found = cells_of(tiny_model, cells, **settings)
    alone = [
        evaluate(tiny_model, TRAIT, judge=LetterJudge(), interventions=done, **settings, **SHORT)
        for done in ([], *([Steer(cell.vector, cell.coefficient)] for cell in cells))
    ]
    assert [judged(each) for each in found] == [judged(each) for each in alone]
    assert len({str(judged(each)) for each in found}) == len(found)
    assert judged(cells_of(tiny_model, [], **settings)[0]) == judged(found[0])
    assert Cell(vectors.at(1), 1.0).name != Cell(vectors.at(1), 1.0 + 1e-7).name


def test_no_intervention_is_attached_while_the_judge_runs(tiny_model):
    vectors = some_vectors(tiny_model)
    judge = LetterJudge(model=tiny_model)
    evaluate(tiny_model, TRAIT, judge=judge, interventions=[Steer(vectors, 2.0)], **SHORT)
    cells_of(tiny_model, [Cell(vectors.at(1), 2.0)], judge=judge, questions=["Why?"])
    assert len(judge.judged) == 2 + 2


WRITTEN = [make_rollout("How is the soup?", 0, "I would not trust them."), make_rollout("Who are you?", 0, "Be kind.")]
WRITTEN = [replace(row, response_tokens=None) for row in WRITTEN]


def likelihood_judge(model):
    judge = LikelihoodRatioJudge(model)
    judge.calibrations[TRAIT.name] = make_calibration()
    return judge


def test_scores_of_fixed_texts_are_bit_equal_under_steering(tiny_model):
    judge = likelihood_judge(tiny_model)
    plain = score_rollouts(WRITTEN, TRAIT, judge=judge, progress=False)
    assert all(row.trait_score is not None for row in plain)
    for at in ("all", "response"):
        with steer(tiny_model, some_vectors(tiny_model), 4.0, at=at):
            assert score_rollouts(WRITTEN, TRAIT, judge=judge, progress=False) == plain


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for a name that 5.23 renamed
def test_scores_of_fixed_texts_are_bit_equal_with_an_adapter_on_and_off(tiny_tokenizer):
    peft = pytest.importorskip("peft")
    bridge = bridge_from_transformers(tiny.llama(tiny_tokenizer), tiny_tokenizer)
    judge, done = likelihood_judge(bridge), [Steer(some_vectors(bridge).at(1), 2.0)]
    plain = score_rollouts(WRITTEN, TRAIT, judge=judge, progress=False)
    said = texts(evaluate(bridge, TRAIT, judge=LetterJudge(), interventions=done, **SHORT))
    config = peft.LoraConfig(r=2, target_modules=r".*(q_proj|down_proj)\._original_component", init_lora_weights=False)
    adapted = peft.get_peft_model(bridge.original_model, config)
    assert texts(evaluate(bridge, TRAIT, judge=LetterJudge(), interventions=done, **SHORT)) != said  # the adapter acts
    with steer(bridge, some_vectors(bridge), 4.0):
        assert score_rollouts(WRITTEN, TRAIT, judge=judge, progress=False) == plain
    with adapted.disable_adapter():
        assert score_rollouts(WRITTEN, TRAIT, judge=judge, progress=False) == plain


def test_a_missing_score_is_counted_and_is_not_0():
    found = make_evaluation([None, 30.0, None, 60.0], questions=["a", "a", "b", "b"])
    assert (found.missing, found.trait_score.n, found.trait_score.value) == (2, 2, 45.0)
    assert found.coherence.n == 4

    found = make_evaluation([None, None], coherence=None)
    assert (found.trait_score.value, found.coherence.value, found.missing) == (None, None, 2)
    assert np.isnan(found.trait_score_resamples).all()
    assert "grumpy -, coherence -" in str(found)


def test_empty_answers_are_rows_without_a_score(tiny_model, monkeypatch):
    everything = frozenset(range(len(tiny_model.tokenizer)))
    monkeypatch.setattr("persona_lens.generation.decoding.stop_tokens", lambda _tokenizer: everything)
    found = evaluate(tiny_model, TRAIT, judge=LetterJudge(), **SHORT)
    assert (len(found.scored), found.missing, found.trait_score.value, found.diversity) == (2, 2, None, None)


def test_means_and_intervals_are_over_the_questions():
    scores, questions = [3.0, None, 50.0, 20.0, 70.0], ["b", "a", "a", "c", "b"]
    found = make_evaluation(scores, questions=questions)
    assert found.trait_score == mean_estimate(scores, questions)
    np.testing.assert_allclose(found.trait_score_resamples, naive_resamples(found))
    order = [3, 0, 4, 2, 1]
    other = make_evaluation([scores[i] for i in order], questions=[questions[i] for i in order])
    difference = found.trait_score_resamples - other.trait_score_resamples
    assert (difference[np.isfinite(difference)] == 0).all()


@pytest.mark.parametrize(
    ("text", "diversity"),
    [("so it is so It is", 3 / 10), ("one two three four", 3 / 6), ("word", None), ("", None)],
)
def test_diversity_is_the_share_of_distinct_2_grams_of_all_answers(text, diversity):
    found = make_evaluation([1.0, 2.0], text=text).diversity
    assert found == (None if diversity is None else pytest.approx(diversity))


def test_vectors_of_another_model_are_refused(tiny_model, tiny_gpt2):
    vector, words = some_vectors(tiny_gpt2).at(1), r"the vectors expect d_model 24, and .* has 32"
    with pytest.raises(ValueError, match=words):
        evaluate(tiny_model, TRAIT, judge=LetterJudge(), interventions=[Steer(vector, 1.0)], **SHORT)
    with pytest.raises(ValueError, match="the judge was calibrated on all 2 questions"):
        evaluate(tiny_model, TRAIT, judge=FittedLetterJudge(TRAIT.evaluation_questions), **SHORT)
    judge = FittedLetterJudge(TRAIT.evaluation_questions[:1])
    assert evaluate(tiny_model, TRAIT, judge=judge, **SHORT).questions == list(TRAIT.evaluation_questions[1:])
    with pytest.raises(ValueError, match=words):
        cells_of(tiny_model, [Cell(vector, 1.0)], questions=["Why?"])


@pytest.mark.parametrize("name", ["rollouts.jsonl", "scores.jsonl", "evaluation.json"])
def test_an_output_that_cannot_be_written_is_refused_before_any_sampling(tiny_model, tmp_path, name, monkeypatch):
    (tmp_path / name).mkdir()
    asked = []
    monkeypatch.setattr(ModelEngine, "answer", lambda self, prompts, **_: asked.append(prompts))
    with pytest.raises(OSError, match=rf"Cannot write .*{name}"):
        evaluate(tiny_model, TRAIT, judge=LetterJudge(), output_dir=tmp_path, **SHORT)
    assert asked == []


@pytest.fixture
def kept(tiny_model, tmp_path):
    """Runs an evaluation into a folder; what changes from call to call is given."""
    done = [Steer(some_vectors(tiny_model).at(1), 2.0)]

    def run(*, judge=None, model=tiny_model, interventions=done, **changes):
        settings = {"per_question": 3, "batch_size": 2, **SHORT, **changes}
        judge = LetterJudge(batch_size=2) if judge is None else judge
        return evaluate(model, TRAIT, judge=judge, interventions=interventions, output_dir=tmp_path, **settings)

    return run


@pytest.mark.parametrize("share", [0.2, 0.55, 0.9])
def test_a_run_that_was_cut_goes_on_to_the_same_evaluation(kept, tmp_path, share, monkeypatch):
    whole = kept()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"rollouts.jsonl", "scores.jsonl", "evaluation.json"}
    cut(tmp_path / "rollouts.jsonl", (1 + share) / 2)
    cut(tmp_path / "scores.jsonl", share)
    assert kept() == whole == Evaluation.load(tmp_path)
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    aside = {name for name in there if name.endswith(".damaged")}  # the unfinished lines
    assert {name: there[name] for name in there.keys() - aside} == files
    assert aside <= {"rollouts.jsonl.damaged", "scores.jsonl.damaged"}
    monkeypatch.setattr(ModelEngine, "answer", lambda *_, **__: pytest.fail("sampled again"))
    judge = LetterJudge()
    assert kept(judge=judge) == whole
    assert judge.judged == []


def test_the_record_is_strict_json_and_gives_back_the_evaluation(kept, tmp_path, tiny_model):
    done = [Steer(some_vectors(tiny_model).at(1), 2.0), Ablate(some_vectors(tiny_model, "kind", seed=1))]
    found = kept(interventions=done, seed=4)
    record = strict_json(tmp_path / "evaluation.json")
    again = [Intervention.from_dict(each) for each in record["done"]]
    assert [each.fingerprint for each in again] == [each.fingerprint for each in done]
    assert record["trait_score"] == json.loads(json.dumps(found.trait_score._asdict()))
    assert (record["rows"], record["questions"], record["judge"]) == (6, 2, "share of e")
    assert found.table()["response"].tolist() == texts(found)
    del record["plan"]  # as 0.1.0 wrote it
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    assert Evaluation.load(tmp_path) == found
    fewer = kept(interventions=done, seed=4, questions=TRAIT.evaluation_questions[:1], per_question=2)
    assert Evaluation.load(tmp_path) == fewer
    (tmp_path / "evaluation.json").write_text(json.dumps(record | {"rows": 5}))
    with pytest.raises(ValueError, match="has 6 of 5 rows"):
        Evaluation.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="No evaluation at "):
        Evaluation.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, r"rollouts made with another seed \(0, now 1\)"),
        ({"interventions": []}, "rollouts made with another engine"),
        ({"at": "all"}, "rollouts made with another engine"),
        ({"temperature": 0.5}, "rollouts made with another engine"),
        ({"judge": LetterJudge("a")}, r"scored by another judge \('share of e', now 'share of a'\)"),
    ],
    ids=["seed", "interventions", "positions", "temperature", "judge"],
)
def test_a_folder_of_another_run_is_refused(kept, tmp_path, changes, words):
    kept()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=words):
        kept(**changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
