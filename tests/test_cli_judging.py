"""`persona-lens judge` and `persona-lens agreement`: judges on servers, by classifiers, and how far they agree."""

import json
from dataclasses import asdict

import pytest

from tests import judge_servers
from tests.fault_server import FaultServer, bad_request
from tests.judge_servers import expected_score


@pytest.fixture
def rollouts(tmp_path):
    """Eight rollouts of evil in a file: two questions, two samples, both sides."""
    from persona_lens.rollouts.rows import Rollout
    from persona_lens.storage.files import JsonLines

    rows = [
        Rollout("evil", polarity, 0, "Be.", question, each, f"{question} {polarity} {each}", None, "stop", "hand", 0)
        for question in ("Why?", "How?")
        for polarity in ("positive", "negative")
        for each in range(2)
    ]
    JsonLines(tmp_path / "rollouts.jsonl").append(map(asdict, rows))
    return rows


@pytest.fixture
def judge(cli, tmp_path, rollouts):
    """Run `judge` on them by a server; gives exit code, standard output and standard error."""

    def run(server, *options, output="scores.jsonl"):
        files = ["--rollouts", tmp_path / "rollouts.jsonl", "--output", tmp_path / output]
        return cli("judge", "--trait", "evil", *files, "--judge", f"openai:judge-model@{server.url}", *options)

    return run


def scores(path):
    return {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}


def expected(rollouts):
    from persona_lens.traits.trait import load_trait

    evil = load_trait("evil")
    return {row.key: expected_score(evil.rubric_for(row.question, row.response)) for row in rollouts}


def test_a_judge_on_a_server_scores_every_rollout_without_loading_a_model(judge, rollouts, tmp_path):
    with FaultServer(judge_servers.whole_numbers) as server:
        code, _, err = judge(server)

    found = scores(tmp_path / "scores.jsonl")
    assert code == 0
    assert {key: row["trait_score"] for key, row in found.items()} == pytest.approx(expected(rollouts))
    assert "Loading" not in err
    assert "8 scores in" in err
    assert "17 calls (0 more from the cache, 0 retries)" in err


def test_the_file_says_which_judge_it_was_and_another_is_refused(judge, tmp_path):
    with FaultServer(judge_servers.whole_numbers) as server:
        judge(server)
        row = next(iter(scores(tmp_path / "scores.jsonl").values()))
        assert f"judge-model at {server.url} (numbers read as the server allows" in row["judge"]
        assert row["reading"] == "whole numbers"
    with FaultServer(judge_servers.whole_numbers) as other:
        code, _, err = judge(other)

    assert code == 1
    assert "was scored by another judge" in err


def test_a_dry_run_tells_the_calls_and_makes_none(judge, tmp_path):
    with FaultServer(judge_servers.whole_numbers) as server:
        code, out, _ = judge(server, "--dry-run")

    assert code == 0
    assert "0 of 8 rollouts are scored" in out
    assert "16 calls, 0 of them in the cache; the rest would send about" in out
    assert not server.seen
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]


def test_batch_files_take_the_place_of_calls(judge, rollouts, tmp_path):
    with FaultServer(judge_servers.whole_numbers) as server:
        assert judge(server, "--write-batch", tmp_path / "batch.jsonl")[0] == 0
        assert len(server.seen) == 1, "only how numbers are written was asked"
        lines = [json.loads(line) for line in (tmp_path / "batch.jsonl").read_text().splitlines()]
        results = [
            {
                "custom_id": line["custom_id"],
                "response": {
                    "status_code": 200,
                    "body": {**judge_servers.whole_numbers(line["body"]), "model": "judge-model"},
                },
            }
            for line in lines
        ]
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in results))
        code, _, err = judge(server, "--read-batch", tmp_path / "results.jsonl")

    assert (code, len(lines)) == (0, 16)
    assert "16 answers" in err
    assert len(server.bodies) == 1, "something was asked again"
    found = {key: row["trait_score"] for key, row in scores(tmp_path / "scores.jsonl").items()}
    assert found == pytest.approx(expected(rollouts))


def test_a_refusal_is_counted(cli, tmp_path, rollouts):
    def refuses(body):
        if judge_servers.PROBE in judge_servers.asked(body):
            return judge_servers.whole_numbers(body)
        return judge_servers.completion("REFUSAL", top={"REFUSAL": 0.9, "0": 0.1})

    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--output", tmp_path / "scores.jsonl"]
    with FaultServer(refuses) as server:
        code, _, err = cli("judge", "--trait", "evil", *files, "--judge", f"openai:m@{server.url}")

    assert code == 0
    assert "8 without a trait score, 8 of them refusals" in err
    assert "0 of 4 pairs kept (dropped: 4 no coherence score)" in err


def test_rows_that_the_judge_will_not_take_are_counted(judge, tmp_path):
    def long(body, _):
        return bad_request("Too long.") if "Why? positive 0" in judge_servers.asked(body) else None

    with FaultServer(judge_servers.whole_numbers, faults=long) as server:
        code, _, err = judge(server)

    assert code == 0
    assert "the server rejected 1 rows, such as ones too long for it" in err
    assert "2 rejected by the server" in err


def test_a_batch_for_a_judge_of_written_numbers_is_found_in_the_cache(judge, tmp_path):
    with FaultServer(judge_servers.without_logprobs) as server:
        assert judge(server, "--write-batch", tmp_path / "batch.jsonl")[0] == 0
        lines = [json.loads(line) for line in (tmp_path / "batch.jsonl").read_text().splitlines()]
        bodies = [{**judge_servers.without_logprobs(line["body"]), "model": "judge-model"} for line in lines]
        results = [
            {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}}
            for line, body in zip(lines, bodies, strict=True)
        ]
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in results))
        asked = len(server.seen)
        code, _, err = judge(server, "--read-batch", tmp_path / "results.jsonl")

    assert (code, len(lines)) == (0, 16)
    assert "16 answers." in err
    assert all(judge_servers.PROBE in judge_servers.asked(body) for body in server.bodies[asked:])


def test_a_server_that_answers_under_another_name_is_taken_where_the_alias_is_stated(judge, tmp_path):
    with FaultServer(judge_servers.whole_numbers, model="gpt-4.1-mini") as server:
        code, _, err = judge(server)
        assert code == 1
        assert "--alias judge-model=gpt-4.1-mini" in err
        assert judge(server, "--alias", "judge-model=gpt-4.1-mini")[0] == 0
        assert judge(server, "--alias", "gpt-4.1-mini")[0] == 2

    row = next(iter(scores(tmp_path / "scores.jsonl").values()))
    assert "judge-model (also answering as gpt-4.1-mini) at" in row["judge"]


def test_two_judges_are_compared(cli, judge, tmp_path):
    with FaultServer(judge_servers.whole_numbers) as server:
        judge(server, output="one.jsonl")
    with FaultServer(judge_servers.digits) as server:
        judge(server, output="two.jsonl")
    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--scores", tmp_path / "one.jsonl"]
    files += ["--against", tmp_path / "two.jsonl"]

    code, out, _ = cli("agreement", *files, "--output", tmp_path / "agreement.html")
    summary = json.loads(cli("agreement", *files, "--json")[1])

    assert code == 0
    assert "Pearson" in out
    assert summary["pearson"]["value"] > 0.99
    assert "<html>" in (tmp_path / "agreement.html").read_text()


def test_two_files_of_one_name_are_compared_under_their_paths(cli, judge, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        with FaultServer(judge_servers.whole_numbers) as server:
            judge(server, output=f"{folder}/scores.jsonl")
    one, two = (tmp_path / folder / "scores.jsonl" for folder in ("one", "two"))
    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--scores", one, "--against", two]

    code, out, err = cli("agreement", *files, "--json")

    assert code == 0, err
    assert json.loads(out)["names"] == [str(one), str(two)]


def test_a_judge_is_compared_with_people(cli, judge, rollouts, tmp_path):
    with FaultServer(judge_servers.whole_numbers) as server:
        judge(server)
    lines = [f'"{row.key}",{number}' for row, number in zip(rollouts, range(0, 80, 10), strict=True)]
    (tmp_path / "people.csv").write_text("key,evil\n" + "\n".join(lines) + "\n")
    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--scores", tmp_path / "scores.jsonl"]

    code, out, _ = cli("agreement", *files, "--against", tmp_path / "people.csv", "--column", "evil", "--json")

    given = [score for score in expected(rollouts).values() if score is not None]
    assert code == 0
    assert json.loads(out)["compared"] == len(given)


def test_a_column_without_a_csv_is_bad_usage(cli, tmp_path, rollouts):
    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--scores", "x.jsonl", "--against", "y.jsonl"]
    code, _, err = cli("agreement", *files, "--column", "evil")

    assert code == 2
    assert "give both, or another judge's .jsonl" in err


@pytest.mark.parametrize("spec", ["gpt-4.1-mini", "openai:", "classifier", "likelyhood"])
def test_a_judge_that_is_none_is_bad_usage(cli, tmp_path, rollouts, spec):
    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--output", tmp_path / "scores.jsonl"]
    code, _, err = cli("judge", "--trait", "evil", *files, "--judge", spec)

    assert code == 2
    assert "openai:MODEL" in err
    assert not (tmp_path / "scores.jsonl").exists()


def test_batches_are_for_judges_on_servers(cli, tmp_path, rollouts):
    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--output", tmp_path / "scores.jsonl"]
    code, _, err = cli("judge", "--trait", "evil", *files, "--write-batch", tmp_path / "batch.jsonl")

    assert code == 2
    assert "openai:MODEL" in err


def test_a_missing_key_is_one_sentence(cli, tmp_path, rollouts, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--output", tmp_path / "scores.jsonl"]
    code, _, err = cli("judge", "--trait", "evil", *files, "--judge", "openai:gpt-4.1-mini")

    assert code == 1
    assert "https://api.openai.com/v1 wants a key: set the environment variable OPENAI_API_KEY." in err


def test_further_fields_for_the_judge_are_an_option(judge, rollouts, tmp_path):
    off = '{"chat_template_kwargs": {"enable_thinking": false}}'
    with FaultServer(judge_servers.reasons_unless_told_not_to) as server:
        code, _, err = judge(server)
        assert code == 1
        assert "enable_thinking" in err
        assert not (tmp_path / "scores.jsonl").exists() or not scores(tmp_path / "scores.jsonl")

        assert judge(server, "--judge-extra-body", off)[0] == 0

    found = scores(tmp_path / "scores.jsonl")
    assert {key: row["trait_score"] for key, row in found.items()} == pytest.approx(expected(rollouts))
    assert all("enable_thinking" in row["judge"] for row in found.values())


@pytest.mark.parametrize(
    "fields", ["{", "[1]", "85", '{"a": NaN}', '{"messages": []}', '{"model": "x"}', '{"stream": true}', "[" * 10_000]
)
def test_further_fields_that_are_no_object_of_them_are_refused(judge, fields):
    with FaultServer(judge_servers.whole_numbers) as server:
        code, _, err = judge(server, "--judge-extra-body", fields)
    assert code == 2
    assert "further fields" in err
    assert not server.bodies


def test_further_fields_without_a_server_to_send_them_to_are_refused(cli, rollouts, tmp_path):
    files = ["--rollouts", tmp_path / "rollouts.jsonl", "--output", tmp_path / "scores.jsonl"]
    code, _, err = cli("judge", "--trait", "evil", *files, "--judge-extra-body", "{}")
    assert code == 2
    assert "--judge-extra-body goes to a judge on a server" in " ".join(err.split())


def test_a_classifier_gives_the_trait_and_the_likelihood_judge_coherence(tmp_path):
    from persona_lens.cli.options import JudgeOptions
    from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
    from persona_lens.judges.scores import CombinedJudge

    bad, good = ([f"{word} {number} {word}" for number in range(20)] for word in ("cruel", "kind"))
    TextClassifier.fit(bad, good, labels=("evil", "kind")).save(tmp_path / "evil.safetensors")
    spec = f"classifier:{tmp_path / 'evil.safetensors'}"
    made = []

    def own():
        made.append(ClassifierJudge(TextClassifier.load(tmp_path / "evil.safetensors")))
        return made[0]

    chosen = JudgeOptions(judge=spec).load_judge(tmp_path)
    assert not made, "the model was loaded before it was needed"
    found = chosen(own)

    assert isinstance(found, CombinedJudge)
    assert isinstance(found.trait_judge, ClassifierJudge)
    assert found.coherence_judge is made[0]
