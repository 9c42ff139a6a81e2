"""`persona-lens monitor` from the command line, on tiny models."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from persona_lens.extraction.pipeline import best_layer
from persona_lens.monitoring.projection import monitor
from persona_lens.monitoring.result import Monitoring
from persona_lens.monitoring.transcripts import Transcript
from tests.chat_cases import CHATS, chat
from tests.intervention_cases import some_vectors
from tests.vector_cases import make_statistics

QUIET = ("--threads", 1)


@pytest.fixture
def model(tiny_model, monkeypatch):
    """The tiny model, which stands for any that a command would load."""
    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: tiny_model)
    return tiny_model


@pytest.fixture
def vectors(model, tmp_path):
    """A run's folder with made-up vectors."""
    (tmp_path / "run").mkdir()
    some_vectors(model).save(tmp_path / "run" / "vectors.safetensors")
    return tmp_path / "run"


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"id": f"chat-{number}", "messages": each} for number, each in enumerate(CHATS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def expected(model, **options):
    given = [Transcript(each, f"chat-{number}") for number, each in enumerate(CHATS)]
    return monitor(model, given, some_vectors(model).at(1), progress=False, **options)


def one_sentence(text):
    """The last line of standard error, which is the message."""
    line = text.strip().splitlines()[-1]
    assert line.startswith("persona-lens: ")
    return line


def test_the_command_has_help_with_an_example_and_stands_after_steer(cli):
    code, out, _ = cli("monitor", "--help")
    assert code == 0
    assert "Example: persona-lens monitor chats.jsonl --vectors" in " ".join(out.split())
    _, everything, _ = cli("--help")
    assert everything.index("  steer ") < everything.index("  monitor ")


def test_a_row_is_printed_for_each_turn(cli, model, vectors, chats):
    code, out, err = cli("monitor", chats, "--vectors", vectors, "--layer", 1, *QUIET)
    assert code == 0
    head, *lines = out.strip().splitlines()
    assert head.split() == ["chat", "turn", "evil@1", "prompt", "evil@1", "response"]
    found = expected(model)
    rows = [(chat.name, number, turn) for chat in found.chats for number, turn in enumerate(chat.turns, start=1)]
    assert [line.split() for line in lines] == [
        [name, str(number), f"{turn.prompt[0]:.3f}", "-" if turn.response is None else f"{turn.response[0]:.3f}"]
        for name, number, turn in rows
    ]
    assert "Loading" in err


def test_json_holds_every_number_and_with_tokens_every_token(cli, model, vectors, chats):
    code, out, _ = cli("monitor", chats, "--vectors", vectors, "--layer", 1, "--tokens", "--json", *QUIET)
    assert code == 0
    assert json.loads(out) == expected(model, tokens=True).to_dict()
    assert json.loads(out)["turns"][0]["pieces"][0] == "<|im_start|>"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_output_is_what_the_library_gives(cli, model, vectors, chats, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"projections.{suffix}"
    options = ("--window", 200, "--after", "e", "--tokens", "--output", path)
    code, out, _ = cli("monitor", chats, "--vectors", vectors, "--layer", 1, *options, *QUIET)
    assert code == 0
    assert Monitoring.load(path) == expected(model, window=200, after="e", tokens=True)
    assert "responses never say 'e', and so have no response projection." in out


def test_messages_that_a_window_dropped_are_said(cli, model, vectors, tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"messages": chat(*["one two three four?"] * 10)}), encoding="utf-8")
    code, out, _ = cli("monitor", path, "--vectors", vectors, "--layer", 1, "--window", 120, *QUIET)
    assert code == 0
    assert "turns were read without their oldest messages, up to" in out


def test_several_vectors_stand_side_by_side(cli, model, vectors, chats, tmp_path):
    kind = some_vectors(model, "kind", seed=5)
    kind.save(tmp_path / "kind.safetensors")
    both = ("--vectors", vectors, "--vectors", tmp_path / "kind.safetensors")
    code, out, _ = cli("monitor", chats, *both, "--layer", 2, "--json", *QUIET)
    assert code == 0
    table = pd.DataFrame(json.loads(out)["turns"])
    alone = monitor(model, CHATS, kind.at(2), progress=False).table()
    assert table["kind@2 prompt"].tolist() == pytest.approx(alone["kind@2 prompt"].tolist(), abs=1e-5)
    assert None not in table["evil@2 prompt"].tolist()


def test_the_layer_is_the_selected_one_and_asked_for_where_none_was_selected(cli, model, chats, tmp_path):
    given = replace(some_vectors(model), statistics=make_statistics(n_layers=4))
    given.save(tmp_path / "vectors.safetensors")
    code, out, _ = cli("monitor", chats, "--vectors", tmp_path, "--json", *QUIET)
    assert (code, json.loads(out)["vectors"][0]["layer"]) == (0, best_layer(given))
    some_vectors(model).save(tmp_path / "plain.safetensors")
    code, _, err = cli("monitor", chats, "--vectors", tmp_path / "plain.safetensors", *QUIET)
    assert code == 1
    assert "pass --layer" in one_sentence(err)


def test_a_projection_above_the_threshold_exits_with_3_and_names_the_first_turn(cli, model, vectors, chats):
    found = expected(model)
    values = [
        (value, f"{each.name}, turn {number}: the {when} projection on evil@1 is {value:.3f}")
        for each in found.chats
        for number, turn in enumerate(each.turns, start=1)
        for when, values in (("prompt", turn.prompt), ("response", turn.response or ()))
        for value in values
    ]
    ordered = sorted(value for value, _ in values)
    asked = ("monitor", chats, "--vectors", vectors, "--layer", 1, *QUIET)
    for threshold in (ordered[-1] - 1e-3, ordered[len(ordered) // 2], ordered[0] - 1):
        first = next(words for value, words in values if value > threshold)
        code, out, err = cli(*asked, "--fail-above", threshold)
        assert code == 3
        assert first in one_sentence(err)
        assert out.startswith("chat")
    code, _, _ = cli(*asked, "--fail-above", ordered[-1] + 1e-3)
    assert code == 0


def test_what_is_wrong_is_said_in_one_sentence_before_the_model_is_loaded(cli, vectors, chats, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "tool", "content": "42"}]}\n', encoding="utf-8")
    for arguments, words in (
        ((bad, "--vectors", vectors), "bad.jsonl, row 1: messages[0] is a tool message"),
        ((tmp_path / "absent.jsonl", "--vectors", vectors), "No file"),
        ((chats, "--vectors", vectors, "--output", "a.csv"), ".jsonl or .parquet"),
    ):
        code, _, err = cli("monitor", *arguments, "--layer", 1, *QUIET)
        assert code == 1
        assert words in one_sentence(err)
        assert "Loading" not in err


def test_rows_that_are_no_chats_are_said_and_the_others_are_monitored(cli, vectors, chats, tmp_path):
    path = tmp_path / "mixed.jsonl"
    whole = chats.read_text(encoding="utf-8")
    path.write_text(f"{whole}not json\n\n", encoding="utf-8")
    expected, found = (
        cli("monitor", each, "--vectors", vectors, "--layer", 1, *QUIET, "--json") for each in (chats, path)
    )
    assert (expected[0], found[0]) == (0, 0)
    number = len(whole.splitlines()) + 1
    assert f"1 of {number} rows could not be read, the first of them row {number}: not JSON" in found[2]
    one, other = json.loads(expected[1]), json.loads(found[1])
    assert [each["row"] for each in other["rejected"]] == [number]
    assert len(one["turns"]) == len(other["turns"])


def test_tokens_without_a_place_to_go_are_bad_usage(cli, vectors, chats):
    code, _, err = cli("monitor", chats, "--vectors", vectors, "--tokens", *QUIET)
    assert code == 2
    assert "--tokens" in err


def test_benign_chats_give_a_threshold_beside_the_vectors(cli, model, vectors, tmp_path):
    from persona_lens.monitoring.thresholds import load_thresholds

    many = [{"id": f"c{number}", "messages": chat(f"Hello {number}?", f"Well, {number}.")} for number in range(24)]
    (tmp_path / "benign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    code, _, err = cli(
        "monitor", tmp_path / "benign.jsonl", "--vectors", vectors, "--layer", 1, "--calibrate", 95, *QUIET
    )

    [threshold] = load_thresholds(vectors, some_vectors(model).at(1))
    assert code == 0, err
    assert (threshold.n, threshold.percentile, threshold.source) == (24, 95.0, "benign.jsonl")
    assert f"threshold {threshold.value:.3f} in" in err


@pytest.mark.parametrize(("options", "holds"), [([], "plotly"), (["--tokens"], "Content-Security-Policy")])
def test_turns_and_tokens_are_drawn(cli, model, vectors, chats, tmp_path, options, holds):
    page = tmp_path / "page.html"
    code, _, err = cli("monitor", chats, "--vectors", vectors, "--layer", 1, "--picture", page, *options, *QUIET)

    assert code == 0, err
    assert holds in page.read_text()


@pytest.mark.parametrize("arguments", [[], ["chats.jsonl", "--experiment", "many-shot"]])
def test_either_chats_or_an_experiment_are_given(cli, vectors, arguments):
    code, _, err = cli("monitor", *arguments, "--vectors", vectors)

    assert code == 2
    assert "give a file of chats, or an --experiment" in " ".join(err.split())


def test_an_experiment_samples_judges_and_draws(cli, model, vectors, tmp_path, monkeypatch):
    from persona_lens.extraction import pipeline
    from persona_lens.monitoring.experiment import MonitoringExperiment
    from tests.evaluation_cases import TRAIT
    from tests.monitoring_cases import LengthJudge

    monkeypatch.setattr(pipeline, "calibrated_judge", lambda *_, **__: LengthJudge())
    eight = tuple(f"Be kind, {number}." for number in range(8))
    replace(TRAIT, monitoring_prompts=eight).save(vectors / "trait.json")
    (vectors / "summary.json").write_text(json.dumps({"plan": {"max_new_tokens": 6}}))
    few = ["--experiment", "system-prompts", "--layer", 1, "--n-questions", 2, "--per-question", 1]
    code, out, err = cli("monitor", "--vectors", vectors, *few, *QUIET)

    folder = vectors / "monitoring-system-prompts"
    found = MonitoringExperiment.load(folder / "experiment.json")
    assert code == 0, err
    assert len(found.points) == 8 * min(2, len(TRAIT.evaluation_questions))
    assert str(found) in " ".join(out.split())
    assert {"experiment.html", "layers.html"} <= {path.name for path in folder.iterdir()}
