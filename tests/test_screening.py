"""Screening against the obvious way: every row by itself on the plain Hugging Face model, with its greedy answer."""

import json
from dataclasses import replace

import pytest
import torch

from persona_lens.interventions.hooks import steer
from persona_lens.screening.plan import read_plan
from persona_lens.screening.run import ShardsMissing, finish, screen
from persona_lens.screening.scoring import ModelScorer, Scorer
from tests.chat_cases import CLOCKED, set_clock
from tests.fault_cases import another_process
from tests.intervention_cases import some_vectors
from tests.screening_cases import (
    QUIET,
    StubScorer,
    chat,
    greedy_base,
    pair_of_vectors,
    projection,
    rows,
    slow_difference,
    tokens,
    write_rows,
)

CLOSE = 5e-5  # projections are float32 on a HookedTransformer
STEPS = 6


@pytest.fixture
def vectors(tiny_model):
    return pair_of_vectors(tiny_model)


def assert_scores(found, expected, vectors, by=None):
    for vector in vectors:
        scores = found.score(f"{vector.trait}@{vector.layer}", by)
        wanted = [expected(row, vector) for row in range(len(scores))]
        assert scores.tolist() == pytest.approx(wanted, abs=CLOSE)


def test_the_difference_is_the_formula_of_one_row_with_its_own_greedy_answer(
    tiny_model, tiny_hf_model, tiny_tokenizer, vectors, tmp_path
):
    data = rows(9)
    found = screen(tiny_model, data, vectors, output=tmp_path / "run", max_new_tokens=STEPS, **QUIET)
    assert found.by == "difference"

    def expected(row, vector):
        base = greedy_base(tiny_hf_model, tiny_tokenizer, data[row], STEPS)
        return slow_difference(tiny_hf_model, tiny_tokenizer, data[row], base, vector)

    assert_scores(found, expected, vectors)


def test_a_given_base_response_takes_the_place_of_the_models_own(
    tiny_model, tiny_hf_model, tiny_tokenizer, vectors, tmp_path
):
    data = [{**row, "base_response": f"You are number {place}."} for place, row in enumerate(rows(5))]
    found = screen(tiny_model, data, vectors, output=tmp_path / "run", base="given", **QUIET)
    assert_scores(
        found,
        lambda row, vector: slow_difference(
            tiny_hf_model, tiny_tokenizer, data[row], data[row]["base_response"], vector
        ),
        vectors,
    )
    assert found.samples([3])[0].base_response == "You are number 3."


def test_a_prompt_that_the_server_of_base_responses_will_not_take_is_a_row_without_a_difference(
    tiny_model, vectors, tmp_path
):
    from persona_lens.clients.client import OpenAIClient
    from tests.fault_server import FaultServer, bad_request

    data = rows(4)
    long = data[2]["messages"][-2]["content"]

    def too_long(body, _):
        return bad_request("Too long.") if body["messages"][-1]["content"] == long else None

    with FaultServer(lambda _: "So it is.", faults=too_long) as server:
        client = OpenAIClient("studied", base_url=server.url)
        choices = {"output": tmp_path / "run", "base": client, "max_new_tokens": 4, **QUIET}
        found = screen(tiny_model, data, vectors, **choices)
    prompts = [row["messages"][-2]["content"] for row in data]
    assert found.score(f"{vectors[0].trait}@{vectors[0].layer}").isna().tolist() == [
        prompt == long for prompt in prompts
    ]
    assert 0 < prompts.count(long) < len(prompts)
    assert client.usage.rejected == 1


@pytest.mark.parametrize(("base", "by"), [("proxy", "proxy"), ("none", "response"), ("proxy", "response")])
def test_cheap_forms_are_the_response_with_and_without_the_last_prompt_token(
    tiny_model, tiny_hf_model, tiny_tokenizer, vectors, tmp_path, base, by
):
    data = rows(7)
    found = screen(tiny_model, data, vectors, output=tmp_path / "run", base=base, **QUIET)

    def expected(row, vector):
        pair = tokens(tiny_tokenizer, data[row]["messages"][:-1], data[row]["messages"][-1]["content"])
        response = projection(tiny_hf_model, pair, vector)
        return response - (projection(tiny_hf_model, pair, vector, "prompt_last") if by == "proxy" else 0)

    assert_scores(found, expected, vectors, by)


def test_a_form_that_was_not_measured_is_refused(tiny_model, vectors, tmp_path):
    found = screen(tiny_model, rows(3), vectors, output=tmp_path / "run", base="proxy", **QUIET)
    with pytest.raises(ValueError, match="no base responses"):
        found.score("evil", "difference")


def test_blocks_above_the_highest_layer_do_not_run(tiny_model, tmp_path):
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(tiny_model.blocks)
    ]
    try:
        screen(tiny_model, rows(4), pair_of_vectors(tiny_model), output=tmp_path / "run", base="proxy", **QUIET)
    finally:
        for handle in handles:
            handle.remove()
    assert set(ran) == {0, 1}


def test_only_a_drawn_share_of_rows_gets_a_base_response(tiny_model, vectors, tmp_path):
    found = screen(
        tiny_model,
        rows(40),
        vectors,
        output=tmp_path / "run",
        base_fraction=0.3,
        max_new_tokens=2,
        sample=None,
        **QUIET,
    )
    scores = found.score("evil")
    with_base = int(scores.notna().sum())
    assert 4 <= with_base <= 22
    assert found.dataset_score("data", "evil").n == with_base
    assert found.score("evil", "response").notna().all()


def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(tiny_model, vectors, tmp_path, monkeypatch):
    data = rows(60)
    whole = screen(tiny_model, data, vectors, output=tmp_path / "whole", base="proxy", **QUIET)
    assert read_plan(whole.folder).n_units == 1
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 7)
    whole = screen(tiny_model, data, vectors, output=tmp_path / "units", base="proxy", **QUIET)
    real, calls = ModelScorer.score, []

    def stops(self, planned):
        calls.append(len(planned))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, planned)

    monkeypatch.setattr(ModelScorer, "score", stops)
    with pytest.raises(KeyboardInterrupt):
        screen(tiny_model, data, vectors, output=tmp_path / "cut", base="proxy", **QUIET)
    log = tmp_path / "cut" / "scored.jsonl"
    assert len(log.read_text().splitlines()) == 3
    log.write_bytes(log.read_bytes() + b'{"unit": 3, "rows": [[')  # as a process that is killed in writing leaves it
    screen(tiny_model, data, vectors, output=tmp_path / "cut", base="proxy", **QUIET)
    assert (tmp_path / "cut" / "scores.parquet").read_bytes() == (whole.folder / "scores.parquet").read_bytes()
    assert len(log.read_text().splitlines()) == read_plan(whole.folder).n_units


def test_a_screening_goes_on_only_with_the_number_of_threads_it_began_with(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 5)
    vector = some_vectors(tiny_bridge, "evil", seed=1).at(2)
    shards = [{"output": tmp_path, "base": "proxy", "shard": (number, 2), **QUIET} for number in (0, 1)]
    with pytest.raises(ShardsMissing):
        screen(tiny_bridge, rows(12), vector, **shards[0])
    assert json.loads((tmp_path / "settings.json").read_text())["threads"] == 1
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match=r"was made with 1 CPU thread, now 2.* Go on with --threads 1 \(in Python"):
            screen(tiny_bridge, rows(12), vector, **shards[1])
        torch.set_num_threads(1)
        whole = screen(tiny_bridge, rows(12), vector, **shards[1])
        torch.set_num_threads(2)
        assert screen(tiny_bridge, rows(12), vector, **shards[1]).rows.equals(whole.rows)  # it is only read
    finally:
        torch.set_num_threads(1)


def test_a_screening_that_goes_on_the_next_day_records_the_day_of_its_prompts(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 5)
    monkeypatch.setattr(tiny_bridge.tokenizer, "chat_template", CLOCKED)
    set_clock(monkeypatch, "2026-11-30")
    vector = some_vectors(tiny_bridge, "evil", seed=1).at(2)
    whole = screen(tiny_bridge, rows(12), vector, output=tmp_path / "whole", base="proxy", **QUIET)
    with pytest.raises(ShardsMissing):
        screen(tiny_bridge, rows(12), vector, output=tmp_path / "run", base="proxy", shard=(0, 2), **QUIET)
    set_clock(monkeypatch, "2026-12-01")
    found = screen(tiny_bridge, rows(12), vector, output=tmp_path / "run", base="proxy", **QUIET)
    assert found.rows.equals(whole.rows)
    assert found.settings["template_date"] == "2026-11-30"


def test_a_screening_of_a_version_that_recorded_no_threads_goes_on(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 5)
    vector = some_vectors(tiny_bridge, "evil", seed=1).at(2)
    with pytest.raises(ShardsMissing):
        screen(tiny_bridge, rows(12), vector, output=tmp_path, base="proxy", shard=(0, 2), **QUIET)
    kept = json.loads((tmp_path / "settings.json").read_text())
    del kept["threads"]
    (tmp_path / "settings.json").write_text(json.dumps(kept))
    found = screen(tiny_bridge, rows(12), vector, output=tmp_path, base="proxy", **QUIET)
    assert len(found.rows) == 12


def test_shards_together_are_the_whole_and_the_last_one_writes_it(tiny_model, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 5)
    data = rows(33)
    whole = screen(tiny_model, data, vectors, output=tmp_path / "whole", base="proxy", **QUIET)
    for number in (2, 0):
        with pytest.raises(ShardsMissing, match="run the other shards"):
            screen(tiny_model, data, vectors, output=tmp_path / "sh", base="proxy", shard=(number, 3), **QUIET)
    with pytest.raises(ShardsMissing, match="units are not scored yet"):
        finish(tmp_path / "sh")
    screen(tiny_model, data, vectors, output=tmp_path / "sh", base="proxy", shard=(1, 3), **QUIET)
    assert (tmp_path / "sh" / "scores.parquet").read_bytes() == (whole.folder / "scores.parquet").read_bytes()


def test_shards_that_were_cut_another_way_are_taken_as_they_are(tiny_model, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 5)
    data = rows(33)
    with pytest.raises(ShardsMissing):
        screen(tiny_model, data, vectors, output=tmp_path / "sh", base="proxy", shard=(1, 3), **QUIET)
    found = screen(tiny_model, data, vectors, output=tmp_path / "sh", base="proxy", **QUIET)
    logs = [path.read_text().splitlines() for path in found.folder.glob("scored*.jsonl")]
    units = [json.loads(line)["unit"] for log in logs for line in log]
    assert sorted(units) == list(range(read_plan(found.folder).n_units))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"base": "none"}, "base"),
        ({"max_prompt_tokens": 50}, "max_prompt_tokens"),
        ({"seed": 1}, "seed"),
        ({"first_turn": True}, "first_turn"),
    ],
)
def test_a_folder_of_another_run_is_refused_by_the_setting_that_differs(tiny_model, vectors, tmp_path, changed, named):
    settings = {"base": "proxy", **QUIET}
    screen(tiny_model, rows(3), vectors, output=tmp_path, **settings)
    with pytest.raises(ValueError, match=f"another {named}"):
        screen(tiny_model, rows(3), vectors, output=tmp_path, **{**settings, **changed})


def test_a_folder_of_other_vectors_or_other_data_is_refused(tiny_model, vectors, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", rows(3))
    screen(tiny_model, one, vectors, output=tmp_path / "run", base="proxy", **QUIET)
    with pytest.raises(ValueError, match="another vectors"):
        screen(tiny_model, one, vectors[:1], output=tmp_path / "run", base="proxy", **QUIET)
    other = replace(vectors[0] * 2, trait="evil")
    with pytest.raises(ValueError, match="another fingerprints"):
        screen(tiny_model, one, [other, vectors[1]], output=tmp_path / "run", base="proxy", **QUIET)
    write_rows(one, rows(4))
    with pytest.raises(ValueError, match="another datasets"):
        screen(tiny_model, one, vectors, output=tmp_path / "run", base="proxy", **QUIET)


def test_a_finished_run_is_read_and_not_made_again(tiny_model, vectors, tmp_path, monkeypatch):
    first = screen(tiny_model, rows(4), vectors, output=tmp_path, base="proxy", **QUIET)
    monkeypatch.setattr("persona_lens.screening.scoring.ModelScorer.score", None)
    again = screen(tiny_model, rows(4), vectors, output=tmp_path, base="proxy", **QUIET)
    assert again.rows.equals(first.rows)


def test_two_processes_at_one_shard_are_told_apart(tiny_model, vectors, tmp_path):
    with (
        another_process(tmp_path / ".scored.jsonl.lock") as holder,
        pytest.raises(OSError, match=rf"scored\.jsonl is being written by process {holder}: wait until it ends"),
    ):
        screen(tiny_model, rows(4), vectors, output=tmp_path, base="proxy", **QUIET)


def test_steering_acts_and_is_a_setting_of_the_run(tiny_model, vectors, tmp_path):
    plain = screen(tiny_model, rows(4), vectors, output=tmp_path / "plain", base="none", **QUIET)
    with steer(tiny_model, vectors[1], coefficient=2.0):
        moved = screen(tiny_model, rows(4), vectors, output=tmp_path / "steered", base="none", **QUIET)
        with pytest.raises(ValueError, match="another interventions"):
            screen(tiny_model, rows(4), vectors, output=tmp_path / "plain", base="none", **QUIET)
    shift = moved.score("kind") - plain.score("kind")
    assert shift.tolist() == pytest.approx([2 * vectors[1].norm] * 4, abs=CLOSE)


def test_two_vectors_of_one_name_are_refused(tiny_model, vectors, tmp_path):
    with pytest.raises(ValueError, match="Several vectors are called evil@1"):
        screen(tiny_model, rows(2), [vectors[0], vectors[0]], output=tmp_path, base="proxy", **QUIET)


def test_the_stub_of_the_large_runs_keeps_to_the_protocol():
    assert isinstance(StubScorer(), Scorer)


def test_a_base_response_that_rows_share_is_run_once(tiny_bridge, tmp_path):
    ran = []
    embedding = tiny_bridge.original_model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, inputs, __: ran.append(len(inputs[0])))
    messages = [chat("Why?", answer) for answer in ("One.", "Two.", "Three.", "Four.")]
    data = [{"messages": each, "base_response": "Mine, and no other."} for each in messages]
    try:
        screen(tiny_bridge, data, pair_of_vectors(tiny_bridge), output=tmp_path, base="given", **QUIET)
    finally:
        handle.remove()
    assert sum(ran) == 5
