"""`finetune`, `shift` and `evaluate` from the command line, on tiny models, and once on the real one."""

import json
from dataclasses import replace

import pytest
import torch

from persona_lens import finetuning, models, pipeline
from persona_lens.adapters import Adapter, adapted, lora, read_weights
from persona_lens.capability import Capability, measure_capability, read_questions
from persona_lens.cli import finetuning as commands
from persona_lens.evaluation import evaluate
from persona_lens.finetuning import Finetuning, ProjectionPenalty, finetune
from persona_lens.finetuning.trainer import Trainer
from persona_lens.interventions import Ablate, Cap, Steer
from persona_lens.judges import scorable_questions
from persona_lens.models import is_bridge
from persona_lens.pipeline import calibrated_judge
from persona_lens.responses import read_messages
from persona_lens.rollouts import ModelEngine
from persona_lens.shift import FinetuningShift, finetuning_shift
from persona_lens.traits import load_trait
from tests.chat_cases import chat
from tests.evaluation_cases import TRAIT, LetterJudge
from tests.intervention_cases import some_vectors
from tests.test_cli_steering import make_run, one_sentence
from tests.vector_cases import random_tensor

pytest.importorskip("peft")
# PEFT asks transformers for a name that 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QUIET = ("--threads", 1)
FAST = ("--rank", 2, "--learning-rate", 1e-2, "--accumulation", 1)
SAME = {"rank": 2, "learning_rate": 1e-2, "accumulation": 1, "progress": False}
CHATS = [chat(f"How is number {number}?", f"Number {number} is kind.") for number in range(4)]
CHOICES = [
    {"question": "What is the sea?", "choices": ["Water", "People"], "answer": "A"},
    {"question": "How many?", "choices": ["one", "two", "three"], "answer": 2},
    {"question": "Who would trust them?", "choices": ["You", "I"], "answer": "B"},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def usage_error(text):
    """What standard error says of bad usage, without its frame."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="module")
def tiny_bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


@pytest.fixture
def model(tiny_bridge, monkeypatch):
    """The tiny bridge, which stands for any that a command would load."""
    monkeypatch.setattr(models, "load_model", lambda *_, **__: tiny_bridge)
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
def data(tmp_path):
    return write_rows(tmp_path / "chats.jsonl", [{"messages": each} for each in CHATS])


@pytest.fixture
def adapter(model, tmp_path):
    """A folder with an adapter of random weights, large enough to change what the model says."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    with lora(model, config) as carrier:
        weights = read_weights(carrier)
    noise = {
        name: random_tensor(*value.shape, seed=seed).to(value) for seed, (name, value) in enumerate(weights.items())
    }
    Adapter(config, noise).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("command", ["finetune", "shift", "evaluate"])
def test_the_commands_have_help_with_an_example(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"Example: persona-lens {command}" in " ".join(out.split())


def test_help_lists_them_in_the_order_in_which_one_needs_them(cli):
    _, out, _ = cli("--help")
    places = [out.index(f"  {command} ") for command in ("monitor", "finetune", "shift", "evaluate")]
    assert places == sorted(places)


def test_an_adapter_on_a_hooked_transformer_is_refused_before_anything_is_loaded(cli, data, run, adapter, tmp_path):
    for arguments in (
        ("finetune", data, "--output", tmp_path / "ft"),
        ("shift", adapter, "--vectors", run),
        ("evaluate", run, "--adapter", adapter),
    ):
        code, _, err = cli(*arguments, "--model-class", "HookedTransformer", *QUIET)
        assert code == 1
        assert "An adapter needs a TransformerBridge, got --model-class HookedTransformer" in one_sentence(err)
        assert "Loading" not in err


def test_without_peft_the_install_command_is_said_before_anything_is_loaded(cli, data, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "find_spec", lambda _: None)
    code, _, err = cli("finetune", data, "--output", tmp_path / "ft", *QUIET)
    assert code == 1
    assert 'pip install "persona-lens[finetune]"' in one_sentence(err)
    assert "Loading" not in err


# --- finetune ------------------------------------------------------------------------------------------------------


def trained(data, tmp_path, *more):
    return ("finetune", data, "--output", tmp_path / "ft", *FAST, *QUIET, *more)


def test_finetune_leaves_the_adapter_that_the_library_trains(cli, model, vectors, run, data, tmp_path):
    code, _, err = cli(*trained(data, tmp_path, "--steer", run, "--layer", 1, "--coefficient", 3, "--epochs", 2))
    done = finetune(model, data, during=[Steer(vectors.at(1), 3.0)], epochs=2, **SAME)
    plain = finetune(model, data, epochs=2, **SAME)
    kept = Adapter.load(tmp_path / "ft").weights
    assert code == 0, err
    assert all(torch.equal(kept[name], value) for name, value in done.adapter.weights.items())
    assert not all(torch.equal(kept[name], value) for name, value in plain.adapter.weights.items())


def test_finetune_prints_rows_losses_and_what_to_try_next(cli, model, run, data, tmp_path):
    options = ("--evaluation", data, "--max-length", 48, "--penalty", run, "--weight", 0.5, "--epochs", 2)
    code, out, err = cli(*trained(data, tmp_path, *options))
    found = Finetuning.load(tmp_path / "ft")
    assert code == 0, err
    shown = " ".join(out.split())
    assert f"{found}, penalty of 0.5 on the projection change of grumpy, 4 layers." in shown
    assert f"{found.rows['cut']} rows were cut to the length limit, 0 dropped" in shown
    assert found.rows["cut"] > 0
    losses = [f"{row['eval_loss']:.2f}" for row in found.losses if "eval_loss" in row]
    assert f"Evaluation loss after each epoch: {', '.join(losses)}." in shown
    assert len(losses) == 2
    assert f"persona-lens shift {tmp_path / 'ft'} --vectors {run}" in one_line(err)


def one_line(text):
    return text.strip().splitlines()[-1]


def test_finetune_prints_json_and_draws_the_losses(cli, model, data, tmp_path):
    pytest.importorskip("plotly")
    code, out, _ = cli(*trained(data, tmp_path, "--json"))
    found = Finetuning.load(tmp_path / "ft")
    shown = json.loads(out)
    assert code == 0
    assert (shown["rows"], shown["loss"], shown["evaluation_loss"]) == (found.rows, found.loss, None)
    assert shown["losses"] == list(found.losses)
    assert "plotly" in (tmp_path / "ft" / "loss.html").read_text(encoding="utf-8")


def test_a_second_call_reads_the_finished_run_and_another_run_is_refused(cli, model, data, tmp_path, monkeypatch):
    _, first, _ = cli(*trained(data, tmp_path))
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    code, second, _ = cli(*trained(data, tmp_path))
    assert (code, second) == (0, first)
    code, _, err = cli(*trained(data, tmp_path, "--rank", 4))
    assert code == 1
    assert "holds a finetuning with another adapter" in one_sentence(err)


@pytest.fixture
def asked(monkeypatch):
    """What the library is asked to train, caught before it does."""
    caught = {}

    def catch(_model, _chats, **options):
        caught.update(options)
        raise ValueError("That was all.")

    monkeypatch.setattr(finetuning, "finetune", catch)
    return caught


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), lambda _: []),
        (("--steer", "--layer", 2), lambda vectors: [Steer(vectors.at(2), 1.0)]),
        (("--steer", "--all-layers", "--coefficient", 0.5), lambda vectors: [Steer(vectors.incremental(), 0.5)]),
        (("--ablate",), lambda vectors: [Ablate(vectors)]),
        (("--ablate", "--layer", 1), lambda vectors: [Ablate(vectors.at(1))]),
    ],
    ids=["none", "one layer", "all layers", "CAFT", "CAFT, one layer"],
)
def test_what_acts_in_training_is_what_the_options_say(cli, asked, vectors, run, data, tmp_path, options, expected):
    given = [part for each in options for part in ((each, run) if each in ("--steer", "--ablate") else (each,))]
    cli(*trained(data, tmp_path, *given))
    assert [each.to_dict() for each in asked["during"]] == [each.to_dict() for each in expected(vectors)]


@pytest.mark.parametrize(("options", "n"), [((), 4), (("--layer", 2), 1)])
def test_a_penalty_is_on_all_layers_or_on_one(cli, asked, vectors, run, data, tmp_path, options, n):
    cli(*trained(data, tmp_path, "--penalty", run, "--weight", 2, *options))
    assert isinstance(asked["penalty"], ProjectionPenalty)
    assert (asked["penalty"].weight, len(asked["penalty"].each)) == (2.0, n)


def test_the_other_settings_reach_the_library(cli, asked, model, data, tmp_path):
    options = ("--preventative-prompts", "evil", "--system", "Be brief.", "--target", "q_proj", "--target", "v_proj")
    options += ("--max-length", 64, "--checkpoint-every", 3, "--gradient-checkpointing", "--seed", 5)
    cli(*trained(data, tmp_path, *options))
    names = ("preventative_prompts", "system_prompt", "targets", "max_length", "checkpoint_every", "seed")
    expected = [load_trait("evil"), "Be brief.", ["q_proj", "v_proj"], 64, 3, 5]
    assert [asked[name] for name in names] == expected
    assert asked["gradient_checkpointing"]
    assert (asked["rank"], asked["learning_rate"], asked["accumulation"]) == (2, 1e-2, 1)
    cli(*trained(data, tmp_path, "--target", "all-linear"))
    assert asked["targets"] == "all-linear"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--coefficient", 1), "--coefficient goes with --steer"),
        (("--all-layers",), "--all-layers goes with --steer"),
        (("--layer", 1), "--layer goes with --steer, --ablate or --penalty"),
        (("--weight", 1), "--weight goes with --penalty"),
        (("--penalty", "run"), "--penalty needs a --weight"),
        (("--steer", "run", "--ablate", "run"), "give --steer or --ablate, not both"),
        (("--steer", "run", "--layer", 1, "--all-layers"), "give --layer or --all-layers, not both"),
    ],
)
def test_options_that_mean_nothing_together_are_bad_usage(cli, data, tmp_path, options, words):
    code, _, err = cli(*trained(data, tmp_path, *options))
    assert code == 2
    assert words in usage_error(err)


def test_what_cannot_be_trained_exits_1_before_anything_is_loaded(cli, run, data, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": "Why?"}]}])
    for rows, options, words in (
        (bad, (), "bad.jsonl, row 1 has no assistant turn to learn"),
        (data, ("--evaluation", bad), "bad.jsonl, row 1 has no assistant turn to learn"),
        (tmp_path / "absent.jsonl", (), "No file"),
        (data, ("--steer", run, "--layer", 4), "grumpy: layer 4 is outside 0 to 3"),
        (data, ("--steer", run), "pass --layer"),
        (data, ("--penalty", run, "--weight", 0), "The weight of a penalty is positive"),
        (data, ("--preventative-prompts", "evli"), "evli"),
    ):
        code, _, err = cli(*trained(rows, tmp_path, *options))
        assert code == 1
        assert words in one_sentence(err)
        assert "Loading" not in err


# --- shift ---------------------------------------------------------------------------------------------------------


def test_shift_prints_a_row_for_each_layer(cli, model, vectors, run, adapter):
    code, out, err = cli("shift", adapter, "--vectors", run, *QUIET)
    assert code == 0, err
    found = finetuning_shift(model, adapter, list(TRAIT.evaluation_questions), vectors)
    _, *lines, last = out.strip().splitlines()
    expected = [
        f"grumpy {layer} {row['shift']:.3g} [{row['low']:.3g}, {row['high']:.3g}] {row['relative']:.3g} "
        f"{row['random_spread']:.3g}"
        for layer, row in found.curve().iterrows()
    ]
    assert [" ".join(line.split()) for line in lines] == expected
    assert last.startswith(f"Mean over {len(TRAIT.evaluation_questions)} prompts;")


def test_shift_asks_given_questions_along_several_vectors_at_one_layer(cli, model, vectors, run, adapter, tmp_path):
    kind = some_vectors(model, "kind", seed=5)
    kind.save(tmp_path / "kind.safetensors")
    (tmp_path / "questions.txt").write_text("Who are you?\n\n What is the sea? \nWhy?\n", encoding="utf-8")
    both = ("--vectors", run, "--vectors", tmp_path / "kind.safetensors", "--layer", 2)
    asked = ("--questions", tmp_path / "questions.txt", "--output", tmp_path / "shift.json", "--json")
    code, out, err = cli("shift", adapter, *both, *asked, *QUIET)
    questions = ["Who are you?", "What is the sea?", "Why?"]
    expected = finetuning_shift(model, adapter, questions, [vectors.at(2), kind.at(2)])
    assert code == 0, err
    assert json.loads(out) == expected.summary() == FinetuningShift.load(tmp_path / "shift.json").summary()


def test_shift_asks_a_traits_questions_where_the_vectors_are_a_file(cli, model, run, adapter):
    file = run / "vectors.safetensors"
    code, _, err = cli("shift", adapter, "--vectors", file, *QUIET)
    assert code == 2
    assert "--trait is needed" in usage_error(err)
    code, out, _ = cli("shift", adapter, "--vectors", file, "--trait", "evil", "--layer", 0, "--json", *QUIET)
    assert (code, json.loads(out)["prompts"]) == (0, len(load_trait("evil").evaluation_questions))


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(cli, run, adapter, tmp_path):
    (tmp_path / "none.txt").write_text("\n", encoding="utf-8")
    for folder, options, code, words in (
        (run, (), 1, "holds no LoRA adapter"),
        (adapter, ("--layer", 9), 1, "layer 9 is outside 0 to 3"),
        (adapter, ("--questions", tmp_path / "none.txt"), 1, "has no questions: write one a line"),
        (adapter, ("--questions", "a.txt", "--trait", "evil"), 2, "give --trait or --questions, not both"),
        (adapter, ("--output", "shift.csv"), 2, "--output must end in .json, got shift.csv"),
    ):
        got, _, err = cli("shift", folder, "--vectors", run, *options, *QUIET)
        assert got == code
        assert words in usage_error(err)
        assert "Loading" not in err


# --- evaluate ------------------------------------------------------------------------------------------------------


def expected_evaluation(model, run, at="response", done=(), **settings):
    judge = calibrated_judge(model, TRAIT, run, max_new_tokens=6, progress=False)
    settings = {"max_new_tokens": 6, "questions": list(TRAIT.evaluation_questions), **settings}
    return evaluate(model, TRAIT, judge, interventions=done, at=at, progress=False, **settings).summary()


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


def test_without_an_intervention_the_model_is_evaluated_as_it_is(cli, model, run):
    code, out, _ = cli("evaluate", run, "--n-questions", 1, *QUIET)
    found = expected_evaluation(model, run, questions=list(TRAIT.evaluation_questions[:1]))
    head, line = out.strip().splitlines()
    assert code == 0
    assert head.split() == ["condition", "grumpy", "[95", "%]", "coherence", "[95", "%]", "diversity", "scored"]
    assert line.startswith("no intervention")
    assert f"{found['trait_score']['value']:.1f}" in line
    assert line.endswith("1 of 1")


def test_an_adapter_is_on_the_model_while_it_answers_and_off_its_judge(cli, model, run, adapter):
    code, out, err = cli("evaluate", run, "--adapter", adapter, "--json", *QUIET)
    judge = calibrated_judge(model, TRAIT, run, max_new_tokens=6, progress=False)
    with adapted(model, adapter):
        found = evaluate(
            model, TRAIT, judge, questions=list(TRAIT.evaluation_questions), max_new_tokens=6, progress=False
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
    assert kept.keys() == {"steer-1-by-2.0", "ablate"}
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
    assert Capability.load(tmp_path / "out" / "steer-1-by-3.0" / "capability.json") == expected
    code, out, err = cli("evaluate", run, "--n-questions", 0, *options, *steered, *QUIET)
    assert (code, json.loads(out)) == (0, [{**row, "evaluation": None}]), err


def test_capability_needs_neither_a_run_nor_a_trait(cli, model, tmp_path):
    questions = write_rows(tmp_path / "choices.jsonl", CHOICES)
    code, out, err = cli("evaluate", "--capability", "--questions", questions, *QUIET)
    found = measure_capability(model, read_questions(questions), progress=False)
    assert code == 0, err
    head, line = out.strip().splitlines()
    assert "0.44 by chance" in head
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
        (("--at", "nowhere"), "--at is response, prompt or all; got nowhere"),
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
    monkeypatch.setattr(models, "load_model", lambda *_, **__: tiny_model)
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
    monkeypatch.setattr(models, "load_model", lambda *_, **__: embedded_bridge)
    trait = load_trait("optimistic")
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
