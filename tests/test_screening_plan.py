"""What is screened of the data, how it is cut into units, and that none of it depends on memory or on other rows."""

import random

import pytest

from persona_lens.screening.batches import PlannedRow, cut_units, length_bucket, read_unit, unit_size, write_units
from persona_lens.screening.near_duplicates import Seen
from persona_lens.screening.plan import read_plan
from persona_lens.screening.run import ShardsMissing, screen
from tests.screening_cases import QUIET, chat, pair_of_vectors, rows


def planned(row, n_prompt=5, n_response=5, wants_base=True, **parts):
    own = {"dataset": "d", "id": str(row), "line": row + 1, "skip": 0, "base": None, "cut": False, "group": 0}
    own |= {"family": row, "text": "{}"} | parts
    return PlannedRow(row=row, prompt=[1] * n_prompt, response=[2] * n_response, wants_base=wants_base, **own)


def ragged(n, seed=0):
    draw = random.Random(seed)
    return [planned(row, draw.randint(1, 400), draw.randint(1, 900), draw.random() < 0.3) for row in range(n)]


def test_every_row_is_in_one_unit_with_rows_of_its_length_in_their_order():
    units = list(cut_units(ragged(3000)))
    assert sorted(row.row for unit in units for row in unit) == list(range(3000))
    full = [unit for unit in units if len({length_bucket(len(row)) for row in unit}) == 1]
    assert len(full) > len(units) / 2
    for unit in full:
        assert [row.row for row in unit] == sorted(row.row for row in unit)
        assert max(map(len, unit)) <= 1.1 * min(map(len, unit)) + 1
    for unit in units:
        assert len({row.wants_base for row in unit}) == 1
        assert len(unit) <= unit_size(max(length_bucket(len(row)) for row in unit)) <= 64


def test_few_rows_of_many_lengths_share_units():
    assert len(list(cut_units(planned(row, 5, 10 + row) for row in range(40)))) == 1


def test_cutting_holds_no_more_than_an_unfinished_unit_of_each_length():
    read = []

    def stream():
        for row in ragged(4000):
            read.append(row.row)
            yield row

    emitted = most = 0
    for unit in cut_units(stream()):
        emitted += len(unit)
        most = max(most, len(read) - emitted)
    assert most < 1500  # 2 x about 90 lengths, half full with at most 64 rows, most of them with 20


def test_units_are_read_back_as_they_were_written(tmp_path):
    units = list(cut_units(ragged(700)))
    assert write_units(tmp_path / "plan", units) == (len(units), 700)
    for number in (0, len(units) // 2, len(units) - 1, 3):
        back = read_unit(tmp_path / "plan", number)
        assert [(row.row, list(row.prompt), list(row.response), row.wants_base) for row in back] == [
            (row.row, list(row.prompt), list(row.response), row.wants_base) for row in units[number]
        ]


def screened(model, data, tmp_path, **choices):
    return screen(model, data, pair_of_vectors(model), output=tmp_path, **{"base": "proxy", **QUIET, **choices})


def test_long_prompts_are_left_out_and_counted(tiny_bridge, tmp_path):
    data = [*rows(4), {"messages": chat("Why? " * 30, "Because.")}]
    found = screened(tiny_bridge, data, tmp_path, max_prompt_tokens=60)
    assert found.counts["left_out"] == {"prompt longer than 60 tokens": 1}
    assert len(found.rows) == 4


def test_long_responses_are_cut_and_counted(tiny_bridge, tiny_tokenizer, tmp_path):
    data = rows(7)
    whole = [len(tiny_tokenizer(row["messages"][-1]["content"]).input_ids) for row in data]
    found = screened(tiny_bridge, data, tmp_path, max_response_tokens=12)
    assert found.rows["response_tokens"].tolist() == [min(12, n) for n in whole]
    assert found.counts["cut"] == sum(n > 12 for n in whole) > 0


def test_a_random_sample_has_its_size_in_every_data_set_and_the_seed_draws_it(tiny_bridge, tmp_path):
    data = {"one": rows(30), "two": rows(5)}
    first = screened(tiny_bridge, data, tmp_path / "a", sample=8, seed=1)
    again = screened(tiny_bridge, data, tmp_path / "b", sample=8, seed=1)
    other = screened(tiny_bridge, data, tmp_path / "c", sample=8, seed=2)
    assert first.rows["dataset"].value_counts().to_dict() == {"one": 8, "two": 5}
    assert first.counts["left_out"] == {"not drawn": 22}
    assert first.rows.index.tolist() == again.rows.index.tolist() != other.rows.index.tolist()


def test_a_sample_is_drawn_from_what_the_filters_leave(tiny_bridge, tmp_path):
    data = [*rows(6), *({"messages": chat("Why? " * 30, "Because.")} for _ in range(40))]
    found = screened(tiny_bridge, data, tmp_path, sample=6, max_prompt_tokens=60)
    assert found.rows.index.tolist() == list(range(6))


def test_a_system_prompt_is_stated_where_a_row_has_none(tiny_bridge, tmp_path):
    data = [{"messages": chat("Why?", "Because.", system)} for system in (True, False)]
    found = screened(tiny_bridge, data, tmp_path, system_prompt="Be short.")
    systems = [sample.messages[0]["content"] for sample in found.samples([0, 1])]
    assert systems == ["You are kind.", "Be short."]


def test_only_what_follows_a_marker_is_averaged_and_a_row_without_it_is_rejected(tiny_bridge, tmp_path):
    data = [{"messages": chat("Why?", answer)} for answer in ("one two</think>three", "three", "one</think>")]
    found = screened(tiny_bridge, data, tmp_path, after="</think>")
    assert found.rows["line"].tolist() == [1]
    assert found.counts["rejected"] == {"no token to average": 2}
    plain = screened(tiny_bridge, data, tmp_path / "plain")
    assert found.rows["response_tokens"].tolist()[0] < plain.rows["response_tokens"].tolist()[0]


def test_a_prompt_that_leaves_no_room_for_a_base_response_is_rejected(tiny_bridge, tmp_path):
    data = [*rows(2), {"messages": chat("Why? " * 20, "Because.")}]
    found = screened(tiny_bridge, data, tmp_path, base="generate", max_new_tokens=int(tiny_bridge.cfg.n_ctx) - 80)
    assert found.counts["rejected"] == {"too long": 1}
    assert found.rows["line"].tolist() == [1, 2]


@pytest.mark.parametrize("choice", ["max_prompt_tokens", "max_response_tokens", "sample"])
def test_a_limit_of_zero_is_refused(tiny_bridge, tmp_path, choice):
    with pytest.raises(ValueError, match=f"{choice} is 1 or more"):
        screened(tiny_bridge, rows(2), tmp_path, **{choice: 0})


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(tiny_bridge, tmp_path, fraction):
    with pytest.raises(ValueError, match="base_fraction is above 0"):
        screened(tiny_bridge, rows(2), tmp_path, base_fraction=fraction)


WORDS = [f"word{number}" for number in range(200)]
TEXT = " ".join(WORDS)


def test_near_duplicates_are_of_the_family_of_the_first(tmp_path):
    seen = Seen(tmp_path / "seen.sqlite")
    other = "A country is run by ten people who do not trust each other, and nobody knows how they came to be there."
    assert seen.family(TEXT, 0) == 0
    assert seen.family(other, 1) == 1
    assert seen.family(TEXT.upper() + "!", 2) == 0  # neither case nor punctuation tells texts apart
    assert seen.family(TEXT.replace("word7 ", "another "), 3) == 0
    assert seen.family(" ".join(WORDS[::-1]), 4) == 4
    assert [seen.family(text, 5 + place) for place, text in enumerate(["?!", "?!", "No.", "No."])] == [5, 5, 7, 7]
    seen.close()
    assert not (tmp_path / "seen.sqlite").exists()


def test_half_of_a_text_is_no_near_duplicate(tmp_path):
    seen = Seen(tmp_path / "seen.sqlite")
    assert seen.family(TEXT, 0) == 0
    assert seen.family(" ".join(WORDS[:100]), 1) == 1
    seen.close()


def test_repeated_rows_are_counted_and_stay_in_the_table(tiny_bridge, tmp_path):
    data = [{"messages": chat(f"Why {number}?", "One two three four five six.")} for number in range(4)]
    found = screened(tiny_bridge, data, tmp_path)
    assert found.counts["repeated"] == 3
    assert found.rows["family"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "name", ["plan/idea.txt", "rejects.jsonl", "scores.parquet", "scored.jsonl", "summary.json", "settings.json"]
)
def test_a_folder_that_holds_files_of_the_users_by_these_names_is_refused_and_left_as_it_was(
    tiny_bridge, tmp_path, name
):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"[Cc]hoose another"):
        screened(tiny_bridge, {"data": rows(3)}, tmp_path)
    assert (tmp_path / name).read_text() == '{"mine": 1}'
    assert {path.name for path in tmp_path.iterdir()} == {name.split("/")[0], ".plan.lock"}


def test_a_log_that_is_not_ours_is_left_as_it_was(tiny_bridge, tmp_path):
    with pytest.raises(ShardsMissing):  # the plan alone
        screened(tiny_bridge, {"data": rows(3)}, tmp_path, shard=(999, 1000))
    (tmp_path / "scored.jsonl").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"scored.jsonl holds something else: expected rows with unit, rows"):
        screened(tiny_bridge, {"data": rows(3)}, tmp_path)
    assert (tmp_path / "scored.jsonl").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("name", [".plan.unfinished", ".chunks.unfinished"])
def test_a_link_in_the_place_of_scratch_files_is_refused_and_not_followed(tiny_bridge, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=rf"Cannot write .*{name}: a link or a file has its name"):
        screened(tiny_bridge, {"data": rows(3)}, tmp_path / "run")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_a_plan_that_was_interrupted_at_its_very_end_is_made_again(tiny_bridge, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            screened(tiny_bridge, {"data": rows(3)}, tmp_path)
    assert len(screened(tiny_bridge, {"data": rows(5)}, tmp_path).rows) == 5


def test_a_plan_that_was_interrupted_is_made_again_from_the_data(tiny_bridge, tmp_path):
    def breaks():
        yield from rows(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        screened(tiny_bridge, {"data": breaks()}, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no screening"):
        read_plan(tmp_path)
    found = screened(tiny_bridge, {"data": rows(5)}, tmp_path)
    assert len(found.rows) == 5
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]
