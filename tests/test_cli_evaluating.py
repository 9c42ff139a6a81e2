"""`evaluate` from the command line, on tiny models; and once finetuned, measured and evaluated on the real one."""

import json
from dataclasses import replace

import pytest
import torch

from persona_lens.evaluation.capability import measure_capability
from persona_lens.evaluation.capability_result import Capability, read_questions
from persona_lens.evaluation.evaluate import evaluate
from persona_lens.extraction import pipeline
from persona_lens.extraction.pipeline import calibrated_judge
from persona_lens.interop.responses import read_messages
from persona_lens.interventions.values import Ablate, Cap, Steer
from persona_lens.judges.scores import scorable_questions
from persona_lens.models.adapters import adapted
from persona_lens.models.structure import is_bridge
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.traits.trait import load_trait
from tests.chat_cases import chat
from tests.evaluation_cases import TRAIT, LetterJudge
from tests.finetuning_cli_cases import CHATS, CHOICES, QUIET, make_adapter, usage_error, write_rows
from tests.intervention_cases import some_vectors
from tests.test_cli_steering import make_run, one_sentence

pytest.importorskip("peft")
# PEFT asks transformers for a name that 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def tiny_bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


@pytest.fixture
def model(tiny_bridge, monkeypatch):
    """The tiny bridge, which stands for any that a command would load."""
    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: tiny_bridge)
    return tiny_bridge


@pytest.fixture
def vectors(model):
    return some_vectors(model, TRAIT.name, residual_norm=torch.tensor([5.0, 6.0, 7.0, 8.0]))


@pytest.fixture
def run(vectors, tmp_path):
    """A run's folder with made-up vectors."""
    (tmp_path / "run").mkdir()
    return make_run(tmp_path / "run", vectors)


@pytest.fixture
def adapter(model, tmp_path):
    return make_adapter(model, tmp_path / "adapter")


def expected_evaluation(model, run, at="response", done=(), **settings):
    judge = calibrated_judge(model, TRAIT, run, max_new_tokens=6, progress=False)
    settings = {"max_new_tokens": 6, "questions": list(TRAIT.evaluation_questions), **settings}
    return evaluate(model, TRAIT, judge=judge, interventions=done, at=at, progress=False, **settings).summary()


def test_a_row_stands_for_each_intervention(cli, model, vectors, run):
    options = ("--layer", 1, "--coefficient", 0, "--coefficient", -3, "--ablate", "--cap", 0.5, "--at", "all")
    code, out, err = cli("evaluate", run, *options, "--per-question", 2, "--json", *QUIET)
    done = [Steer(vectors.at(1), 0.0), Steer(vectors.at(1), -3.0), Ablate(vectors), Cap(vectors.at(1), maximum=0.5)]
    rows = json.loads(out)
    assert code == 0, err
    assert [row["condition"] for row in rows] == [str(each) for each in done]
    assert [row["evaluation"] for row in rows] == [
        expected_evaluation(model, run, "all", [each], per_question=2) for each in done
    ]
    assert len({row["evaluation"]["trait_score"]["value"] for row in rows}) == 4


def test_the_table_has_the_dose_beside_the_coefficient(cli, vectors, run):
    code, out, _ = cli("evaluate", run, "--layer", 1, "--coefficient", -3, "--cap", 1.5, *QUIET)
    _, steered, capped = out.strip().splitlines()
    (dose,) = Steer(vectors.at(1), -3.0).doses
    assert code == 0
    assert steered.split()[:5] == ["layer", "1", "by", "-3", f"{dose:+.2f}"]
    assert capped.split()[:5] == ["layer", "1", "capped", "at", "1.5"]


def test_without_an_intervention_the_model_is_evaluated_as_it_is(cli, model, run):
    code, out, _ = cli("evaluate", run, "--n-questions", 1, *QUIET)
    found = expected_evaluation(model, run, questions=list(TRAIT.evaluation_questions[:1]))
    head, line = out.strip().splitlines()
    assert code == 0
    assert head.split() == ["condition", "dose", "grumpy", "[95", "%]", "coherence", "[95", "%]", "diversity", "scored"]
    assert line.startswith("no intervention")
    assert f"{found['trait_score']['value']:.1f}" in line
    assert line.endswith("1 of 1")


def test_an_adapter_is_on_the_model_while_it_answers_and_off_its_judge(cli, model, run, adapter):
    code, out, err = cli("evaluate", run, "--adapter", adapter, "--json", *QUIET)
    judge = calibrated_judge(model, TRAIT, run, max_new_tokens=6, progress=False)
    with adapted(model, adapter):
        found = evaluate(
            model, TRAIT, judge=judge, questions=list(TRAIT.evaluation_questions), max_new_tokens=6, progress=False
        )
    [row] = json.loads(out)
    assert code == 0, err
    assert (row["adapter"], row["evaluation"]) == (str(adapter), found.summary())
    assert row["evaluation"] != expected_evaluation(model, run)


def test_the_judge_is_calibrated_on_the_model_without_the_adapter(cli, model, run, adapter, monkeypatch):
    def calibrated(given, *_, **__):
        assert not any(hasattr(module, "active_adapter") for module in given.modules())
        return LetterJudge()

    monkeypatch.setattr(pipeline, "calibrated_judge", calibrated)
    code, _, err = cli("evaluate", run, "--adapter", adapter, *QUIET)
    assert code == 0, err


def test_a_row_is_kept_in_a_folder_of_its_own_and_a_second_call_samples_nothing(cli, run, tmp_path, monkeypatch):
    write_rows(tmp_path / "choices.jsonl", CHOICES)
    options = ("--layer", 1, "--coefficient", 2, "--ablate", "--output", tmp_path / "out", "--json")
    options += ("--capability", "--questions", tmp_path / "choices.jsonl")
    _, first, _ = cli("evaluate", run, *options, *QUIET)
    kept = {path.name: {each.name for each in path.iterdir()} for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(ModelEngine, "answer", lambda *_, **__: pytest.fail("sampled again"))
    code, second, err = cli("evaluate", run, *options, *QUIET)
    assert kept.keys() == {"layer-1-by-2", "ablated"}
    assert all({"evaluation.json", "rollouts.jsonl", "capability.json"} <= files for files in kept.values())
    assert (code, second) == (0, first), err


def test_capability_is_measured_beside_it_and_alone(cli, model, vectors, run, adapter, tmp_path):
    questions = write_rows(tmp_path / "choices.jsonl", CHOICES)
    texts = write_rows(tmp_path / "texts.jsonl", [{"messages": each} for each in CHATS])
    options = ("--capability", "--questions", questions, "--texts", texts, "--adapter", adapter)
    steered = ("--layer", 1, "--coefficient", 3, "--json")
    code, out, err = cli("evaluate", run, *options, *steered, "--output", tmp_path / "out", *QUIET)
    expected = measure_capability(
        model,
        read_questions(questions),
        texts=read_messages(texts),
        interventions=[Steer(vectors.at(1), 3.0)],
        adapter=adapter,
        progress=False,
    )
    [row] = json.loads(out)
    assert code == 0, err
    assert row["evaluation"]["rows"] == len(TRAIT.evaluation_questions)
    assert row["capability"] == expected.summary()
    assert Capability.load(tmp_path / "out" / "layer-1-by-3" / "capability.json") == expected
    code, out, err = cli("evaluate", run, "--n-questions", 0, *options, *steered, *QUIET)
    assert (code, json.loads(out)) == (0, [{**row, "evaluation": None}]), err


def test_capability_needs_neither_a_run_nor_a_trait(cli, model, tmp_path):
    questions = write_rows(tmp_path / "choices.jsonl", CHOICES)
    code, out, err = cli("evaluate", "--capability", "--questions", questions, *QUIET)
    found = measure_capability(model, read_questions(questions), progress=False)
    assert code == 0, err
    head, line = out.strip().splitlines()
    assert "(chance 0.44)" in head
    for each in (found.accuracy, found.margin, found.letter_mass):
        assert f"{each.value:.2f} [{each.low:.2f}, {each.high:.2f}]" in line
    assert line.endswith(" -")


def test_a_mean_trait_score_above_the_threshold_exits_with_3_and_names_the_row(cli, run):
    asked = ("evaluate", run, "--layer", 1, "--coefficient", 0, "--coefficient", 3, *QUIET)
    _, out, _ = cli(*asked, "--json")
    scores = {row["condition"]: row["evaluation"]["trait_score"]["value"] for row in json.loads(out)}
    highest = max(scores, key=lambda name: scores[name])
    assert min(scores.values()) < scores[highest]
    code, out, err = cli(*asked, "--fail-above", (min(scores.values()) + scores[highest]) / 2)
    assert code == 3
    assert f"{highest}: the mean grumpy score is {scores[highest]:.1f}, above the threshold" in one_sentence(err)
    assert out.startswith("condition")
    assert cli(*asked, "--fail-above", scores[highest] + 0.1)[0] == 0


def test_no_trait_score_is_no_proof_of_a_low_one(cli, run, monkeypatch):
    class Silent(LetterJudge):
        def _score(self, text):
            return replace(super()._score(text), trait_score=None)

    monkeypatch.setattr(pipeline, "calibrated_judge", lambda *_, **__: Silent())
    code, out, err = cli("evaluate", run, "--fail-above", 50, *QUIET)
    assert code == 1
    assert "none of 2 answers has a trait score" in one_sentence(err)
    assert "0 of 2" in out


def test_a_trait_without_a_run_is_judged_by_what_the_output_keeps(cli, model, tmp_path, monkeypatch):
    seen = {}

    def calibrated(_model, trait, folder, **settings):
        seen.update(settings, trait=trait.name, folder=folder)
        return LetterJudge()

    monkeypatch.setattr(pipeline, "calibrated_judge", calibrated)
    options = ("--trait", "evil", "--n-questions", 2, "--max-new-tokens", 4, "--output", tmp_path / "out")
    code, out, err = cli("evaluate", *options, "--json", *QUIET)
    judged = scorable_questions(LetterJudge(), load_trait("evil"), load_trait("evil").evaluation_questions)[:2]
    assert code == 0, err
    assert (seen["trait"], seen["folder"], seen["max_new_tokens"]) == ("evil", tmp_path / "out", 4)
    assert json.loads(out)[0]["evaluation"]["questions"] == len(judged)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give a RUN or a --trait to score, or --capability"),
        (("--trait", "evil"), "--output is needed where no run's folder is given"),
        (("--trait", "evil", "--output", "out", "--ablate"), "need the vectors of a RUN"),
        (("--trait", "evil", "--output", "out", "--layer", 1), "--layer goes with --coefficient or --cap"),
        (("--trait", "evil", "--texts", "a.jsonl"), "--questions and --texts go with --capability"),
        (("--capability", "--questions", "CHOICES", "--fail-above", 1), "--fail-above is about the trait score"),
        (("--at", "nowhere"), "'nowhere' is not one of 'response', 'prompt', 'all'"),
    ],
)
def test_what_means_nothing_to_evaluate_is_bad_usage(cli, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "CHOICES", CHOICES)
    code, _, err = cli("evaluate", *options, *QUIET)
    assert code == 2
    assert words in usage_error(err)
    assert "Loading" not in err


def test_what_cannot_be_evaluated_exits_1_before_anything_is_loaded(cli, run, tmp_path):
    for options, words in (
        (("--adapter", tmp_path), "holds no LoRA adapter"),
        (("--layer", 7, "--coefficient", 1), "layer 7 is outside 0 to 3"),
        (("--coefficient", 1), "pass --layer"),
        (("--capability", "--questions", tmp_path / "absent.jsonl"), "absent.jsonl"),
        (("--judge", "classifier:absent.json"), "absent.json"),
    ):
        code, _, err = cli("evaluate", run, *options, *QUIET)
        assert code == 1
        assert words in one_sentence(err)
        assert "Loading" not in err


def test_without_an_adapter_both_classes_are_evaluated(cli, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: tiny_model)
    make_run(tmp_path, some_vectors(tiny_model, TRAIT.name))
    kind = "TransformerBridge" if is_bridge(tiny_model) else "HookedTransformer"
    code, out, err = cli(
        "evaluate", tmp_path, "--layer", 2, "--coefficient", 3, "--json", "--model-class", kind, *QUIET
    )
    assert code == 0, err
    done = [Steer(some_vectors(tiny_model, TRAIT.name).at(2), 3.0)]
    assert json.loads(out)[0]["evaluation"] == expected_evaluation(tiny_model, tmp_path, done=done)


# --- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_model_is_finetuned_measured_and_evaluated(cli, embedded_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: embedded_bridge)
    whole = load_trait("optimistic")
    trait = replace(whole, instructions=whole.instructions[:2], evaluation_questions=whole.evaluation_questions[:4])
    (tmp_path / "run").mkdir()
    run = make_run(tmp_path / "run", some_vectors(embedded_bridge, trait.name), trait, max_new_tokens=8)
    rows = [
        chat(question, "It will all turn out wonderfully, and you will love it!")
        for question in trait.extraction_questions
    ]
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": each} for each in rows[:8]])
    folder = tmp_path / "ft"
    options = ("--rank", 4, "--learning-rate", 5e-3, "--accumulation", 2, "--epochs", 1, "--json")
    code, out, err = cli("finetune", data, "--output", folder, *options, *QUIET)
    assert code == 0, err
    losses = [row["loss"] for row in json.loads(out)["losses"] if "loss" in row]
    assert len(losses) == 2
    assert losses[1] < losses[0]

    code, out, err = cli("shift", folder, "--vectors", run, "--layer", 20, "--json", *QUIET)
    assert code == 0, err
    [row] = json.loads(out)["traits"][trait.name]
    assert row["norm"] > 0.1

    measured = []
    for worn in ((), ("--adapter", folder)):
        options = ("--n-questions", 2, "--capability", "--questions", write_rows(tmp_path / "q.jsonl", CHOICES))
        code, out, err = cli("evaluate", run, *worn, *options, "--texts", data, "--json", *QUIET)
        assert code == 0, err
        [found] = json.loads(out)
        assert found["evaluation"]["rows"] == 2
        assert 0 < found["capability"]["letter_mass"]["value"] < 1
        measured.append(found["capability"]["nll"]["value"])
    assert measured[1] < measured[0] - 0.2  # what it was trained on has become likelier


@pytest.mark.parametrize("name", ["evaluation.json", "capability.json"])
def test_a_result_of_something_else_is_refused_before_a_model_is_loaded(cli, tmp_path, name):
    folder = tmp_path / "no-intervention"
    folder.mkdir()
    (folder / name).write_text('{"mine": 1}')
    code, _, told = cli("evaluate", "--trait", "evil", "--capability", "--model", "no-such", "--output", tmp_path)
    assert (code, f"{name} holds something else" in told) == (1, True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: '{"mine": 1}'}
    assert list(tmp_path.iterdir()) == [folder]
