"""Runs on a server's rollouts: what they would cost, the commands, and vectors that say who sampled."""

import json
from dataclasses import replace

import pytest

from persona_lens.rollouts.collection import plan_rollouts, unanswered
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.rollouts.server import ServerEngine
from persona_lens.storage.files import JsonLines
from tests.fault_server import FaultServer
from tests.server_cases import GRUMPY, PROMPTS, PolarityJudge, collect, engine_at, says


@pytest.fixture
def server():
    with FaultServer(says) as server:
        yield server


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("persona_lens.models.loading.load_model", refuse)


# What it would cost


def test_the_estimate_counts_calls_and_asks_nothing(server, tmp_path):
    engine = engine_at(server, cache=tmp_path / "calls.sqlite")
    collect(engine, prompts=PROMPTS[:5])
    asked = len(server.seen)
    found = engine.estimate(PROMPTS, seed=0)
    assert (found.calls, found.cached, found.completion_tokens) == (len(PROMPTS), 5, 20 * (len(PROMPTS) - 5))
    assert engine.estimate(PROMPTS, seed=1).cached == 0
    assert len(server.seen) == asked


def test_what_is_unanswered_is_found_without_touching_the_file(server, tmp_path):
    output, engine = tmp_path / "rollouts.jsonl", engine_at(server)
    collect(engine, output, prompts=PROMPTS[:5])
    output.write_bytes(output.read_bytes()[:-10])  # ends within the fifth row
    before = output.read_bytes()
    left = unanswered(engine, PROMPTS, output_file=output)
    assert len(left) == len(PROMPTS) - 4
    assert set(left) > set(PROMPTS[5:])
    assert output.read_bytes() == before


def rollouts_command(server, folder, *more):
    GRUMPY.save(folder / "grumpy.json")
    plan = ["--trait", folder / "grumpy.json", "--per-question", 3, "--max-new-tokens", 20]
    return ["rollouts", *plan, "--server", server.url, "--model", "studied", "--output", folder / "r.jsonl", *more]


def test_a_dry_run_prints_the_estimate_and_neither_asks_nor_writes(cli, server, tmp_path):
    code, out, _ = cli(*rollouts_command(server, tmp_path, "--dry-run"))
    assert code == 0
    assert "0 of 24 rollouts are in" in out
    assert "24 calls, 0 of them in the cache" in out
    assert "receive at most 480" in out
    assert server.seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["grumpy.json"]


def test_a_dry_run_counts_what_is_there(cli, server, tmp_path):
    from persona_lens.cli.options import ServerOptions

    output = tmp_path / "r.jsonl"
    engine = ServerEngine(ServerOptions(2, 9.0).connect(server.url, "studied", tmp_path), 20)
    collect(engine, output, prompts=PROMPTS[:10])
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:4]))
    before, asked = output.read_bytes(), len(server.seen)
    code, out, _ = cli(*rollouts_command(server, tmp_path, "--dry-run"))
    assert code == 0
    assert "4 of 24 rollouts are in" in out
    assert "20 calls, 6 of them in the cache" in out
    assert (output.read_bytes(), len(server.seen)) == (before, asked)


def test_a_dry_run_without_a_server_is_bad_usage(cli, tmp_path):
    code, _, err = cli("rollouts", "--trait", "evil", "--output", tmp_path / "r.jsonl", "--dry-run")
    assert code == 2
    assert "--dry-run is for the calls to a --server" in err


def test_the_command_samples_from_the_server_and_pays_for_no_row_twice(cli, server, tmp_path):
    server.delay = 0.05
    code, _, err = cli(*rollouts_command(server, tmp_path, "--concurrency", 3))
    assert code == 0
    assert server.most_in_flight == 3
    assert "24 rollouts in" in err
    assert "24 calls (0 more from the cache" in err
    rows = {row.key: row.response for row in read_rollouts(tmp_path / "r.jsonl")}
    assert rows == {row.key: row.response for row in collect(engine_at(server))}
    (tmp_path / "r.jsonl").unlink()
    asked = len(server.seen)
    code, _, err = cli(*rollouts_command(server, tmp_path))
    assert code == 0
    assert "0 calls (24 more from the cache" in err
    assert len(server.seen) == asked


def test_a_server_that_is_not_there_is_one_sentence(cli, tmp_path, monkeypatch):
    with FaultServer(says) as gone:
        pass
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.0)
    code, _, err = cli(*rollouts_command(gone, tmp_path))
    assert code == 1
    assert err.strip().splitlines()[-1].startswith(f"persona-lens: {gone.url} could not be reached in 7 tries")


# What is made of it


def extract(model, engine, **choices):
    from persona_lens import extract_persona_vectors

    settings = {"judge": PolarityJudge(), "per_question": 2, "min_pairs": 1, "progress": False, **choices}
    return extract_persona_vectors(model, GRUMPY, engine=engine, **settings)


def test_vectors_from_a_servers_rollouts_are_those_of_the_same_texts(server, tiny_model, tmp_path):
    import torch

    from persona_lens.chat.batches import Conversation
    from persona_lens.extraction.extract import extract_from_responses

    vectors = extract(tiny_model, engine_at(server), output_dir=tmp_path)
    rows = read_rollouts(tmp_path / "rollouts.jsonl")
    rows.sort(key=lambda row: plan_rollouts(GRUMPY, per_question=2).index(row.prompt))
    sides = {"positive": [], "negative": []}
    for row in rows:
        turns = [("system", row.system_prompt), ("user", row.question), ("assistant", row.response)]
        chat = Conversation.from_messages([{"role": role, "content": text} for role, text in turns])
        sides[row.polarity].append(chat)
    given = extract_from_responses(tiny_model, *sides.values(), trait="grumpy", progress=False)
    assert vectors.counts["positive"] == 8
    assert torch.equal(vectors.directions, given.directions)
    assert torch.equal(vectors.embedding, given.embedding)
    assert float(vectors.norms.min()) > 0


def test_judged_rollouts_from_files_tell_the_vectors_who_sampled_them(server, tmp_path):
    from persona_lens.cli.inputs import KeepSettings, ResponseFiles
    from persona_lens.judges.scores import score_rollouts

    engine = engine_at(server)
    rows = collect(engine, tmp_path / "r.jsonl")
    score_rollouts(rows, GRUMPY, judge=PolarityJudge(), output_file=tmp_path / "s.jsonl", progress=False)
    files = ResponseFiles(None, None, tmp_path / "r.jsonl", tmp_path / "s.jsonl")
    sides = files.read("grumpy", KeepSettings(50.0, 50.0, 1), None, tmp_path / "v.safetensors")
    assert sides.sampled_by == engine.name
    assert len(sides.positive) == len(sides.negative) == 12


def test_the_likelihood_judge_is_calibrated_on_what_the_server_says(server, tiny_model, tmp_path, monkeypatch):
    from persona_lens.extraction import pipeline
    from persona_lens.judges.likelihood_ratio import Calibration, CoherenceScale, LikelihoodRatioJudge

    seen = []

    def calibrate(self, trait, rollouts, **_):
        seen.extend(rollouts)
        scale = CoherenceScale(centre=20.0, width=5.0, distinct_floor=0.9)  # finds everything coherent
        questions = tuple(dict.fromkeys(row.question for row in rollouts))
        self.calibrations[trait.name] = Calibration(trait.name, 3.0, 0.0, scale, questions, {})
        return self.calibrations[trait.name]

    monkeypatch.setattr(LikelihoodRatioJudge, "calibrate", calibrate)
    engine, judge = engine_at(server), LikelihoodRatioJudge(tiny_model)
    pipeline.calibrate(judge, GRUMPY, engine, folder=tmp_path, progress=False)
    assert {row.engine for row in seen} == {engine.name}
    assert {row.polarity for row in seen} == {"positive", "negative", "neutral"}
    assert json.loads((tmp_path / "calibration.json").read_text())["made_with"]["engine"] == engine.name
    scored = judge.score(GRUMPY, collect(engine))
    assert all(score.trait_score is not None for score in scored)


def test_text_without_token_ids_is_measured_by_the_tokenizer_that_will_read_it(server, tiny_tokenizer):
    from persona_lens.chat.batches import encode
    from persona_lens.rollouts.rows import longest_response

    rows = collect(engine_at(server))
    counted = [len(encode(tiny_tokenizer, row.response)) for row in rows]
    assert [row.count_tokens(tiny_tokenizer) for row in rows] == counted
    assert longest_response(rows, tiny_tokenizer) == max(counted) > 20
    assert longest_response([replace(rows[0], response_tokens=(5, 6, 7))], tiny_tokenizer) == 3
    assert longest_response([replace(rows[0], response="")], tiny_tokenizer) == 1
    assert longest_response([], tiny_tokenizer) == 1


def test_the_judge_command_calibrates_on_answers_as_long_as_the_servers(
    cli, server, make_tiny_model, tmp_path, monkeypatch
):
    from persona_lens.extraction import pipeline
    from persona_lens.rollouts.rows import longest_response

    model = make_tiny_model("TransformerBridge")
    rows = collect(engine_at(server), tmp_path / "r.jsonl")
    limits = []

    def calibrate(judge, trait, engine, **_):
        limits.append(engine.max_new_tokens)
        raise ValueError("that was all")

    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: model)
    monkeypatch.setattr(pipeline, "calibrate", calibrate)
    GRUMPY.save(tmp_path / "grumpy.json")
    files = ["--rollouts", tmp_path / "r.jsonl", "--output", tmp_path / "s.jsonl"]
    code, _, err = cli("judge", "--trait", tmp_path / "grumpy.json", *files)
    assert (code, err.strip().splitlines()[-1]) == (1, "persona-lens: that was all")
    assert limits == [longest_response(rows, model.tokenizer)]


@pytest.mark.parametrize(("named", "asked"), [([], "nobody/tiny"), (["--server-model", "studied"], "studied")])
def test_extract_samples_on_the_server_and_reads_activations_here(
    cli, server, make_tiny_model, tmp_path, monkeypatch, named, asked
):
    from persona_lens import PersonaVectors
    from persona_lens.extraction import pipeline

    model = make_tiny_model("TransformerBridge")
    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: model)
    monkeypatch.setattr("persona_lens.judges.likelihood_ratio.LikelihoodRatioJudge", lambda _model: PolarityJudge())
    monkeypatch.setattr(pipeline, "summarize", lambda *_: {})
    GRUMPY.save(tmp_path / "grumpy.json")
    run = tmp_path / "run"
    plan = ["--trait", tmp_path / "grumpy.json", "--per-question", 1, "--max-new-tokens", 20, "--min-pairs", 1]
    code, _, err = cli("extract", *plan, "--model", "nobody/tiny", "--output", run, "--server", server.url, *named)
    assert code == 0, err
    assert {body["model"] for body in server.bodies} == {asked}
    sampled_by = PersonaVectors.load(run / "vectors.safetensors").provenance.settings["sampled_by"]
    assert sampled_by == f"{asked} on the server {server.url}, temperature 1, top_p 1, at most 20 tokens"
    assert (run / "calls.sqlite").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--server", "http://localhost:1/v1"], "omit both where files have them"),
        (["--server-model", "studied"], "--server-model is a name on a --server, and none is given"),
    ],
)
def test_a_server_that_would_not_be_asked_is_bad_usage(cli, tmp_path, options, words):
    rows = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}]
    JsonLines(tmp_path / "rows.jsonl").append(rows)
    given = ["--positive", tmp_path / "rows.jsonl", "--negative", tmp_path / "rows.jsonl"]
    output = ["--output", tmp_path / "v.safetensors"]
    code, _, err = cli("extract", "--trait", "evil", *given, *output, *options)
    assert code == 2
    assert words in " ".join(err.replace("│", " ").split())
