"""`screen` from the command line, on a tiny model."""

import json

import pandas
import pytest
import torch

from persona_lens.judges.classifier import TextClassifier
from persona_lens.monitoring.thresholds import load_thresholds
from persona_lens.screening.result import Screening
from persona_lens.screening.run import screen
from tests.evaluation_cases import TRAIT
from tests.finetuning_cli_cases import QUIET, usage_error
from tests.intervention_cases import some_vectors
from tests.screening_cases import chat, rows, write_rows
from tests.test_cli_steering import make_run, one_sentence


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
    return write_rows(tmp_path / "chats.jsonl", [*rows(12), "no json"])


@pytest.fixture
def screened(data, run, tmp_path):
    return ("screen", data, "--vectors", run, "--layer", 1, "--base", "proxy", "--output", tmp_path / "out", *QUIET)


def test_help_has_an_example_and_lists_it_last(cli):
    code, out, _ = cli("screen", "--help")
    assert code == 0
    assert "Example: persona-lens screen" in " ".join(out.split())
    _, out, _ = cli("--help")
    assert out.index("  evaluate ") < out.index("  screen ")


def test_the_numbers_are_those_of_the_library(cli, model, vectors, data, screened, tmp_path):
    code, out, err = cli(*screened, "--json")
    assert code == 0, err
    told = json.loads(out)
    found = screen(model, data, vectors.at(1), output_dir=tmp_path / "same", base="proxy", progress=False)
    assert told["sets"][0]["score"] == pytest.approx(found.dataset_score("chats").value)
    assert told["sets"][0]["n"] == 12
    assert told["counts"]["rejected"] == {"malformed": 1}
    assert told["by"] == "proxy"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "chats" in page


def test_the_table_says_what_was_screened_and_where_the_rest_is_listed(cli, screened, tmp_path):
    code, out, err = cli(*screened)
    assert code == 0, err
    assert "Of 13 rows 12 were screened" in out
    assert "1 malformed" in " ".join(out.split())
    assert str(tmp_path / "out" / "rejects.jsonl") in " ".join(out.split())


def test_base_responses_are_generated_by_default(cli, data, run, tmp_path):
    code, out, err = cli(
        *(
            "screen",
            data,
            "--vectors",
            run,
            "--layer",
            1,
            "--max-new-tokens",
            3,
            "--output",
            tmp_path / "out",
            "--json",
        ),
        *QUIET,
    )
    assert code == 0, err
    assert json.loads(out)["by"] == "difference"
    assert max(Screening.load(tmp_path / "out").rows["base_tokens"].tolist()) <= 3


def test_benign_chats_give_the_threshold_which_is_kept_and_counted(cli, screened, tmp_path, vectors):
    benign = write_rows(tmp_path / "plain.jsonl", [{"messages": chat(f"Why {n}?", f"It is {n}.")} for n in range(30)])
    code, out, err = cli(*screened, "--benign", benign, "--percentile", 90, "--json")
    assert code == 0, err
    sets = {row["dataset"]: row for row in json.loads(out)["sets"]}
    assert sets["plain"]["above"] <= 0.1
    assert 0 <= sets["chats"]["above"] <= 1
    (threshold,) = load_thresholds(tmp_path / "out", vectors.at(1))
    assert (threshold.of, threshold.percentile, threshold.source) == ("proxy", 90.0, "plain")


def test_a_score_above_the_limit_exits_with_3_and_one_below_with_0(cli, screened):
    code, _, err = cli(*screened, "--fail-above", -1e6)
    assert code == 3
    assert "above the threshold of -1e+06" in one_sentence(err.splitlines()[-1])
    assert cli(*screened, "--fail-above", 1e6)[0] == 0


def test_shards_say_what_is_missing_and_merge_finishes(cli, screened, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 4)
    code, out, err = cli(*screened, "--shard", "0/2")
    assert code == 0, err
    assert "run the other shards" in err
    code, _, err = cli("screen", "--merge", "--output", tmp_path / "out")
    assert code == 1
    assert "units are not scored yet" in one_sentence(err)
    assert cli(*screened, "--shard", "1/2")[0] == 0
    (tmp_path / "out" / "summary.json").unlink()
    code, out, err = cli("screen", "--merge", "--output", tmp_path / "out")
    assert code == 0, err
    assert "12 were screened" in out


def test_a_split_is_written_beside_the_scores(cli, screened, tmp_path):
    code, _, err = cli(*screened, "--split", 2)
    assert code == 0, err
    lines = (tmp_path / "out" / "split" / "high.jsonl").read_text().splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2


def test_a_judge_stands_beside_the_projection(cli, screened, tmp_path):
    texts = ["bad bad thing", "a bad one"] * 10, ["good good thing", "a good one"] * 10
    TextClassifier.fit(*texts, groups=[str(n % 10) for n in range(40)], labels=("bad", "good")).save(
        tmp_path / "judge.safetensors"
    )
    benign = write_rows(tmp_path / "plain.jsonl", [{"messages": chat(f"Why {n}?", f"It is {n}.")} for n in range(30)])
    judge = ("--judge", f"classifier:{tmp_path / 'judge.safetensors'}", "--trait", "evil", "--judge-top", 3)
    code, out, err = cli(*screened, "--benign", benign, *judge, "--json")
    assert code == 0, err
    flagged = {row["dataset"]: row for row in json.loads(out)["flagged"]}
    assert flagged["chats"]["union"] >= flagged["chats"]["projection"]
    assert set(flagged["plain"]) == {"dataset", "n", "unscored", "projection", "judge", "union", "both"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shard", "4/4"), "counted from 0"),
        (("--base", "nonsense"), "--base is generate"),
        (("--judge", "likelihood", "--benign", "plain.jsonl"), "--judge and --trait go together"),
        (("--judge", "likelihood", "--trait", "evil"), "--judge goes with --benign"),
    ],
)
def test_bad_usage_is_said_before_anything_is_loaded(cli, screened, arguments, words):
    code, _, err = cli(*screened, *arguments)
    assert code == 2
    assert words in usage_error(err)
    assert "Loading" not in err


def test_neither_data_nor_merge_is_bad_usage(cli, tmp_path):
    code, _, err = cli("screen", "--output", tmp_path / "out")
    assert code == 2
    assert "give DATA and --vectors" in usage_error(err)


def test_another_run_in_the_folder_is_one_sentence(cli, screened):
    assert cli(*screened)[0] == 0
    code, _, err = cli(*screened, "--first-turn")
    assert code == 1
    assert "another first_turn" in one_sentence(err.splitlines()[-1])


def test_two_files_of_one_stem_are_told_apart(cli, screened, data, tmp_path):
    (tmp_path / "other").mkdir()
    pandas.DataFrame(rows(3)).to_parquet(tmp_path / "other" / "chats.parquet")
    code, out, err = cli(screened[0], tmp_path / "other" / "chats.parquet", *screened[1:], "--json")
    assert code == 0, err
    assert [row["dataset"] for row in json.loads(out)["sets"]] == [str(tmp_path / "other" / "chats.parquet"), str(data)]


def plain(tmp_path, n=30):
    return write_rows(tmp_path / "plain.jsonl", [{"messages": chat(f"Why {k}?", f"It is {k}.")} for k in range(n)])


@pytest.mark.parametrize("limit", [-5, 5])
def test_a_set_without_a_score_does_not_pass_a_limit(cli, data, run, tmp_path, limit):
    options = ("--layer", 1, "--base-fraction", 0.0001, "--max-new-tokens", 2, "--fail-above", limit)
    code, _, err = cli("screen", data, "--vectors", run, *options, "--output", tmp_path / "out", *QUIET)
    assert code == 1
    assert "chats: no sample has a score on" in one_sentence(err)


def test_benign_chats_may_be_one_of_the_sets_by_its_name_or_its_file(cli, screened, tmp_path):
    benign = plain(tmp_path)
    for number, named in enumerate(["plain", benign]):
        folder = ("--output", tmp_path / f"out {number}")
        code, out, err = cli(screened[0], benign, *screened[1:], *folder, "--benign", named, "--json")
        assert code == 0, err
        assert [row["dataset"] for row in json.loads(out)["sets"]] == ["plain", "chats"]


def test_benign_chats_are_no_candidates_of_a_split(cli, screened, tmp_path):
    code, _, err = cli(*screened, "--benign", plain(tmp_path), "--split", 3)
    assert code == 0, err
    lines = [line for path in (tmp_path / "out" / "split").iterdir() for line in path.read_text().splitlines()]
    assert {json.loads(line)["dataset"] for line in lines} == {"chats"}


def test_a_split_that_is_too_large_leaves_the_page(cli, screened, tmp_path):
    pytest.importorskip("plotly")
    code, _, err = cli(*screened, "--split", 500)
    assert code == 1
    assert "A split of 500 needs 1000" in one_sentence(err)
    assert (tmp_path / "out" / "report.html").exists()


def test_without_plotly_there_are_the_splits_of_every_vector(cli, screened, model, tmp_path, monkeypatch):
    def absent():
        raise ImportError("plotly is not installed")

    monkeypatch.setattr("persona_lens.plots.style.graph_objects", absent)
    some_vectors(model, "kind", seed=5).save(tmp_path / "kind.safetensors")
    code, _, err = cli(*screened, "--vectors", tmp_path / "kind.safetensors", "--split", 3)
    assert code == 0
    assert "No page: plotly is not installed" in err
    assert len(list((tmp_path / "out").glob("split-*"))) == 2
