"""Screening against the obvious way: every row by itself on the plain Hugging Face model, with its greedy answer."""

import json
import shutil
import tracemalloc
from contextlib import ExitStack
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from persona_lens.chat.batches import ChatTokens
from persona_lens.clients.client import OpenAIClient
from persona_lens.interventions.hooks import steer
from persona_lens.screening.batches import PlannedRow, cut_units, scored_units, write_units
from persona_lens.screening.plan import read_plan
from persona_lens.screening.result import Screening
from persona_lens.screening.run import ShardsMissing, finish, score_here, score_units
from persona_lens.screening.samples import Sample
from persona_lens.screening.scoring import ModelScorer
from persona_lens.storage.files import write_json
from tests.chat_cases import CLOCKED, set_clock
from tests.fault_cases import another_process
from tests.fault_server import FaultServer, bad_request
from tests.screening_cases import (
    QUIET,
    StubScorer,
    assert_same_files,
    chat,
    greedy_base,
    pair_of_vectors,
    projection,
    rows,
    screened,
    slow_difference,
    tokens,
    write_rows,
)

CLOSE = 5e-5  # projections are float32 on a HookedTransformer
STEPS = 6


@pytest.fixture
def vectors(tiny_model):
    return pair_of_vectors(tiny_model)


@pytest.fixture
def units_of_five(monkeypatch):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 5)


FORMS = ["generate difference", "given difference", "proxy proxy", "none response", "proxy response"]


@pytest.mark.parametrize(("base", "by"), [form.split() for form in FORMS])
def test_every_form_of_score_is_the_formula_of_one_row(
    tiny_model, tiny_hf_model, tiny_tokenizer, vectors, tmp_path, base, by
):
    data = [{**row, "base_response": f"You are number {place}."} for place, row in enumerate(rows(7))]
    screening = screened(tiny_model, data, tmp_path, base=base, max_new_tokens=STEPS)
    assert screening.by == by or by == "response"

    def expected(row, vector):
        prompt, response = tokens(tiny_tokenizer, row["messages"][:-1], row["messages"][-1]["content"])
        score = projection(tiny_hf_model, (prompt, response), vector)
        if by == "response":
            return score
        if by == "proxy":
            return score - projection(tiny_hf_model, (prompt, response), vector, "prompt_last")
        own = row["base_response"]
        own = own if base == "given" else greedy_base(tiny_hf_model, tiny_tokenizer, row, STEPS)
        return slow_difference(tiny_hf_model, tiny_tokenizer, row, own, vector)

    for vector in vectors:
        scores = screening.score(f"{vector.trait}@{vector.layer}", by).tolist()
        assert scores == pytest.approx([expected(row, vector) for row in data], abs=CLOSE)
    assert (screening.samples([3])[0].base_response == "You are number 3.") == (base == "given")
    if by != "difference":
        with pytest.raises(ValueError, match="no base responses"):
            screening.score("evil", "difference")


def test_a_prompt_that_the_server_of_base_responses_will_not_take_is_a_row_without_a_difference(tiny_model, tmp_path):
    data = rows(4)
    prompts = [row["messages"][-2]["content"] for row in data]

    def too_long(body, _):
        return bad_request("Too long.") if body["messages"][-1]["content"] == prompts[2] else None

    with FaultServer(lambda _: "So it is.", faults=too_long) as server:
        client = OpenAIClient("studied", base_url=server.url)
        screening = screened(tiny_model, data, tmp_path, base=client, max_new_tokens=4)
    assert screening.score("evil").isna().tolist() == [prompt == prompts[2] for prompt in prompts]
    assert 0 < prompts.count(prompts[2]) < len(prompts)
    assert client.usage.rejected == 1


def test_blocks_above_the_highest_layer_do_not_run(tiny_model, tmp_path):
    ran = set()
    with ExitStack() as stack:
        for layer, block in enumerate(tiny_model.blocks):
            stack.callback(block.register_forward_pre_hook(lambda *_, layer=layer: ran.add(layer)).remove)
        screened(tiny_model, rows(4), tmp_path)
    assert ran == {0, 1}


def test_a_base_response_that_rows_share_is_run_once(tiny_bridge, tmp_path):
    ran = []
    embedding = tiny_bridge.original_model.get_input_embeddings()
    data = [
        {"messages": chat("Why?", answer), "base_response": "Mine."} for answer in ("One.", "Two.", "Three.", "No.")
    ]
    with ExitStack() as stack:
        hook = embedding.register_forward_hook(lambda _, inputs, __: ran.append(len(inputs[0])))
        stack.callback(hook.remove)
        screened(tiny_bridge, data, tmp_path, base="given")
    assert sum(ran) == 5


def test_only_a_drawn_share_of_rows_gets_a_base_response(tiny_model, tmp_path):
    screening = screened(tiny_model, rows(40), tmp_path, base="generate", base_fraction=0.3, max_new_tokens=2)
    with_base = int(screening.score("evil").notna().sum())
    assert 4 <= with_base <= 22
    assert screening.dataset_score("data", "evil").n == with_base
    assert screening.score("evil", "response").notna().all()


def test_steering_acts_and_is_a_setting_of_the_run(tiny_model, vectors, tmp_path):
    plain = screened(tiny_model, rows(4), tmp_path / "plain", base="none")
    with steer(tiny_model, vectors[1], coefficient=2.0):
        moved = screened(tiny_model, rows(4), tmp_path / "steered", base="none")
        with pytest.raises(ValueError, match="another interventions"):
            screened(tiny_model, rows(4), tmp_path / "plain", base="none")
    shift = moved.score("kind") - plain.score("kind")
    assert shift.tolist() == pytest.approx([2 * vectors[1].norm] * 4, abs=CLOSE)


# One file a unit


def test_each_unit_is_one_file_with_the_identity_texts_and_scores_of_its_rows(tiny_bridge, tmp_path, units_of_five):
    data = rows(23)
    screening = screened(tiny_bridge, data, tmp_path, max_new_tokens=3, base="generate")
    plan = read_plan(tmp_path)
    files = sorted((tmp_path / "scores").iterdir())
    assert [path.name for path in files] == [f"unit-{unit:07d}.parquet" for unit in range(plan.n_units)]
    assert plan.n_units > 4
    numbers = []
    for unit, path in enumerate(files):
        for record in pyarrow.parquet.read_table(path).to_pylist():
            assert record["messages"] == data[record["row"]]["messages"][:-1]
            assert record["response"] == data[record["row"]]["messages"][-1]["content"]
            assert record["base_response"] == screening.samples([record["row"]])[0].base_response
            assert record["unit"] == unit == screening.rows["unit"][record["row"]]
            assert record["evil@1.response"] == screening.rows["evil@1.response"][record["row"]]
            numbers.append(record["row"])
    assert sorted(numbers) == screening.rows.index.tolist() == list(range(23))


def test_only_the_columns_that_are_asked_for_are_read(tiny_bridge, tmp_path, monkeypatch):
    screened(tiny_bridge, rows(9), tmp_path)
    screening, read = Screening.load(tmp_path), []
    scores = type(screening._plan).scores
    monkeypatch.setattr(type(screening._plan), "scores", lambda self, names: read.append(names) or scores(self, names))
    screening.score("evil")
    screening.dataset_score("data", "kind", by="response")
    assert read == [["evil@1.response", "evil@1.prompt"], ["dataset", "group", "kind@0.response"]]


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    def planned(row):
        sample = Sample(row, "data", str(row), row + 1, ({"role": "user", "content": "Why? " * 50},), "Because. " * 100)
        chat = ChatTokens((1,) * 50, (2 + row % 7,) * 100)
        return PlannedRow(sample, chat, wants_base=False, cut=False, group=row % 300, family=row)

    def peak(n):
        folder = tmp_path / str(n)
        (folder / "plan").mkdir(parents=True)
        tracemalloc.start()
        n_units, n_rows = write_units(folder / "plan" / "units.arrow", cut_units(planned(row) for row in range(n)))
        counts = {"planned": n, "repeated": 0}
        write_json(folder / "plan" / "plan.json", {"units": n_units, "rows": n_rows, "counts": counts})
        settings = {"format_version": 2, "vectors": ["evil@1"], "base": "proxy", "datasets": [{"name": "data"}]}
        write_json(folder / "settings.json", settings)
        plan, arrow = read_plan(folder), [0]

        def score(units):
            for unit in score_here(StubScorer().score, plan, units):
                arrow.append(pa.total_allocated_bytes())
                yield unit

        score_units(plan, score, **QUIET)
        scoring = tracemalloc.get_traced_memory()[1] + max(arrow)
        tracemalloc.reset_peak()
        assert finish(folder).dataset_score("data").n == n
        finishing = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return scoring, finishing

    (scoring, finishing), (more_scoring, more_finishing) = peak(2_000), peak(20_000)
    assert more_scoring < 1.5 * scoring
    assert more_finishing < 1.5 * finishing


# Resuming


def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    data = rows(60)
    assert read_plan(screened(tiny_model, data, tmp_path / "one").folder).n_units == 1
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 7)
    whole = screened(tiny_model, data, tmp_path / "whole")
    real, calls = ModelScorer.score, []

    def stops(self, planned):
        calls.append(len(planned))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, planned)

    monkeypatch.setattr(ModelScorer, "score", stops)
    with pytest.raises(KeyboardInterrupt):
        screened(tiny_model, data, tmp_path / "cut")
    assert scored_units(tmp_path / "cut") == [0, 1, 2]
    with pytest.raises(FileNotFoundError, match="no finished screening"):
        Screening.load(tmp_path / "cut")
    # As a process that is killed in writing leaves it.
    unfinished = tmp_path / "cut" / "scores" / ".unit-0000003.parquet.0123456789abcdef.unfinished"
    unfinished.write_bytes(b"PAR1")
    screened(tiny_model, data, tmp_path / "cut")
    assert not unfinished.exists()
    assert len(calls) == 4 + read_plan(whole.folder).n_units - 3
    assert_same_files(tmp_path / "cut", whole.folder)
    monkeypatch.setattr(ModelScorer, "score", None)  # a finished run is read and not made again
    assert screened(tiny_model, data, tmp_path / "cut").rows.equals(whole.rows)


@pytest.mark.parametrize("last", [(1, 3), (0, 1)])
def test_shards_together_are_the_whole_and_the_last_one_scores_what_is_left(
    tiny_model, tmp_path, units_of_five, monkeypatch, last
):
    data, folder = rows(33), tmp_path / "shards"
    whole = screened(tiny_model, data, tmp_path / "whole")
    for number in (2, 0):
        with pytest.raises(ShardsMissing, match="run the other shards"):
            screened(tiny_model, data, folder, shard=(number, 3))
        assert all(unit % 3 in (number, 2) for unit in scored_units(folder))
    with pytest.raises(ShardsMissing, match="units are not scored yet"):
        finish(folder)
    done, real, calls = scored_units(folder), ModelScorer.score, []
    monkeypatch.setattr(ModelScorer, "score", lambda self, planned: calls.append(planned) or real(self, planned))
    screened(tiny_model, data, folder, shard=last)
    assert len(calls) == read_plan(folder).n_units - len(done)
    assert_same_files(folder, whole.folder)


def test_a_screening_goes_on_only_with_the_number_of_threads_it_began_with(tiny_bridge, tmp_path, units_of_five):
    def shard(number):
        return screened(tiny_bridge, rows(12), tmp_path, shard=(number, 2))

    with pytest.raises(ShardsMissing):
        shard(0)
    assert json.loads((tmp_path / "settings.json").read_text())["threads"] == 1
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match=r"was made with 1 CPU thread, now 2"):
            shard(1)
        torch.set_num_threads(1)
        whole = shard(1)
        torch.set_num_threads(2)
        assert shard(1).rows.equals(whole.rows)  # it is only read
    finally:
        torch.set_num_threads(1)


def test_a_screening_that_goes_on_the_next_day_records_the_day_of_its_prompts(
    tiny_bridge, tmp_path, monkeypatch, units_of_five
):
    monkeypatch.setattr(tiny_bridge.tokenizer, "chat_template", CLOCKED)
    set_clock(monkeypatch, "2026-11-30")
    whole = screened(tiny_bridge, rows(12), tmp_path / "whole")
    with pytest.raises(ShardsMissing):
        screened(tiny_bridge, rows(12), tmp_path / "run", shard=(0, 2))
    set_clock(monkeypatch, "2026-12-01")
    screening = screened(tiny_bridge, rows(12), tmp_path / "run")
    assert screening.rows.equals(whole.rows)
    assert screening.settings["template_date"] == "2026-11-30"


# Refusals


def test_a_folder_of_another_run_is_refused_by_the_setting_that_differs(tiny_model, vectors, tmp_path):
    data, folder = write_rows(tmp_path / "one.jsonl", rows(3)), tmp_path / "run"
    screened(tiny_model, data, folder, vectors)
    for changed in ({"base": "none"}, {"max_prompt_tokens": 50}, {"seed": 1}, {"first_turn": True}):
        with pytest.raises(ValueError, match=f"another {next(iter(changed))}"):
            screened(tiny_model, data, folder, vectors, **changed)
    with pytest.raises(ValueError, match="another vectors"):
        screened(tiny_model, data, folder, vectors[:1])
    with pytest.raises(ValueError, match="another fingerprints"):
        screened(tiny_model, data, folder, [replace(vectors[0] * 2, trait="evil"), vectors[1]])
    write_rows(data, rows(4))
    with pytest.raises(ValueError, match="another datasets"):
        screened(tiny_model, data, folder, vectors)


def test_two_vectors_of_one_name_are_refused(tiny_model, vectors, tmp_path):
    with pytest.raises(ValueError, match="Several vectors are called evil@1"):
        screened(tiny_model, rows(2), tmp_path, [vectors[0], vectors[0]])


def test_two_processes_at_one_shard_are_told_apart(tiny_model, tmp_path):
    with (
        another_process(tmp_path / ".shard-0-of-1.lock") as holder,
        pytest.raises(OSError, match=rf"shard-0-of-1 is being written by process {holder}: wait until it ends"),
    ):
        screened(tiny_model, rows(4), tmp_path)


def test_scores_that_are_not_of_every_row_are_refused(tiny_bridge, tmp_path, units_of_five):
    screened(tiny_bridge, rows(12), tmp_path)
    first, second = sorted((tmp_path / "scores").iterdir())[:2]
    whole = second.read_bytes()
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=r"scores of .* rows, and 12 are planned"):
        Screening.load(tmp_path).score("evil")
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot be read .* delete the damaged file and screen again"):
        Screening.load(tmp_path).score("evil")
    second.unlink()
    assert len(screened(tiny_bridge, rows(12), tmp_path).rows) == 12
    assert second.read_bytes() == whole
