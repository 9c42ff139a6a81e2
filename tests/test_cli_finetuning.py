"""`finetune` and `shift` from the command line, on tiny models."""

import json

import pytest
import torch

from persona_lens.cli import finetuning as commands
from persona_lens.finetuning.finetune import finetune
from persona_lens.finetuning.result import Finetuning
from persona_lens.finetuning.shift import FinetuningShift, finetuning_shift
from persona_lens.finetuning.trainer import ProjectionPenalty, Trainer
from persona_lens.interventions.values import Ablate, Steer
from persona_lens.models.adapters import Adapter
from persona_lens.traits.trait import load_trait
from tests.evaluation_cases import TRAIT
from tests.finetuning_cli_cases import CHATS, QUIET, make_adapter, usage_error, write_rows
from tests.intervention_cases import some_vectors
from tests.test_cli_steering import make_run, one_sentence

pytest.importorskip("peft")
# PEFT asks transformers for a name that 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FAST = ("--rank", 2, "--learning-rate", 1e-2, "--accumulation", 1)
SAME = {"rank": 2, "learning_rate": 1e-2, "accumulation": 1, "progress": False}


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
def data(tmp_path):
    return write_rows(tmp_path / "chats.jsonl", [{"messages": each} for each in CHATS])


@pytest.fixture
def adapter(model, tmp_path):
    return make_adapter(model, tmp_path / "adapter")


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
    assert f"{found.rows['cut']} rows were cut to the length limit; 0 were dropped" in shown
    assert found.rows["cut"] > 0
    losses = [f"{row['eval_loss']:.2f}" for row in found.losses if "eval_loss" in row]
    assert f"Evaluation loss after each epoch: {', '.join(losses)}." in shown
    assert len(losses) == 2
    assert f"persona-lens shift {tmp_path / 'ft'} --vectors {run}" in one_line(err)


def test_a_learning_rate_that_never_reached_its_peak_is_said(cli, model, data, tmp_path):
    _, _, err = cli(*trained(data, tmp_path))
    assert "of 5 warm-up steps there were 2, the first of them at 0" in err
    _, _, err = cli("finetune", data, "--output", tmp_path / "other", "--warmup-steps", 1, *FAST, *QUIET)
    assert "warm-up" not in err


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

    monkeypatch.setattr("persona_lens.finetuning.finetune.finetune", catch)
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
    options += ("--warmup-steps", 1)
    cli(*trained(data, tmp_path, *options))
    names = ("preventative_prompts", "system_prompt", "targets", "max_length", "checkpoint_every", "seed")
    names += ("warmup_steps",)
    expected = [load_trait("evil"), "Be brief.", ["q_proj", "v_proj"], 64, 3, 5, 1]
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
        (("--steer", "run", "--ablate", "run"), "give one of --steer, --ablate and --penalty"),
        (("--steer", "run", "--penalty", "run", "--weight", 1), "give one of --steer, --ablate and --penalty"),
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
