"""What is screened of the data, how it is cut into units, and that none of it depends on memory or on other rows."""

import random
import shutil
from pathlib import Path

import pytest

from persona_lens.chat.batches import ChatTokens
from persona_lens.screening.batches import PlannedRow, cut_units, length_bucket, read_unit, unit_size, write_units
from persona_lens.screening.near_duplicates import Seen
from persona_lens.screening.plan import read_plan
from persona_lens.screening.result import Screening
from persona_lens.screening.run import finish
from persona_lens.screening.samples import Sample
from tests.screening_cases import chat, planned_only, rows, screened

OLD = Path(__file__).parent / "data" / "screening_0.1.0"


def planned(row, n_prompt=5, n_response=5, wants_base=True):
    sample = Sample(row, "d", str(row), row + 1, ({"role": "user", "content": "Why?"},), "Because.")
    return PlannedRow(sample, ChatTokens((1,) * n_prompt, (2,) * n_response), wants_base, False, group=0, family=row)


def ragged(n, seed=0):
    draw = random.Random(seed)
    return [planned(row, draw.randint(1, 400), draw.randint(1, 900), draw.random() < 0.3) for row in range(n)]


def test_every_row_is_in_one_unit_with_rows_of_its_length_in_their_order():
    units = list(cut_units(ragged(3000)))
    assert sorted(row.sample.row for unit in units for row in unit) == list(range(3000))
    full = [unit for unit in units if len({length_bucket(len(row)) for row in unit}) == 1]
    assert len(full) > len(units) / 2
    for unit in full:
        assert [row.sample.row for row in unit] == sorted(row.sample.row for row in unit)
        assert max(map(len, unit)) <= 1.1 * min(map(len, unit)) + 1
    for unit in units:
        assert len({row.wants_base for row in unit}) == 1
        assert len(unit) <= unit_size(max(length_bucket(len(row)) for row in unit)) <= 64
    assert len(list(cut_units(planned(row, 5, 10 + row) for row in range(40)))) == 1  # few rows of many lengths


def test_cutting_holds_no_more_than_an_unfinished_unit_of_each_length():
    read = []
    emitted = most = 0
    for unit in cut_units(read.append(row) or row for row in ragged(4000)):
        emitted += len(unit)
        most = max(most, len(read) - emitted)
    assert most < 1500  # 2 x about 90 lengths, half full with at most 64 rows, most of them with 20


def test_units_are_read_back_as_they_were_written(tmp_path):
    units = list(cut_units(ragged(700)))
    assert write_units(tmp_path / "units.arrow", units) == (len(units), 700)
    for number in (0, len(units) // 2, len(units) - 1, 3):
        assert read_unit(tmp_path / "units.arrow", number) == units[number]


# Which rows, and what is read of them


def test_long_prompts_are_left_out_and_long_responses_cut_and_both_are_counted(tiny_bridge, tiny_tokenizer, tmp_path):
    data = [*rows(7), {"messages": chat("Why? " * 30, "Because.")}]
    lengths = [len(tiny_tokenizer(row["messages"][-1]["content"]).input_ids) for row in data[:7]]
    screening = screened(tiny_bridge, data, tmp_path, max_prompt_tokens=60, max_response_tokens=12)
    assert screening.counts["left_out"] == {"prompt longer than 60 tokens": 1}
    assert screening.rows["response_tokens"].tolist() == [min(12, n) for n in lengths]
    assert screening.counts["cut"] == sum(n > 12 for n in lengths) > 0


def test_a_random_sample_of_what_the_filters_leave_has_its_size_in_every_set_and_the_seed_draws_it(
    tiny_bridge, tmp_path
):
    long = [{"messages": chat("Why? " * 30, "Because.")}] * 40
    data, limits = {"one": [*rows(30), *long], "two": [*long, *rows(5)]}, {"sample": 8, "max_prompt_tokens": 60}
    first, again, other = (
        screened(tiny_bridge, data, tmp_path / str(number), seed=seed, **limits)
        for number, seed in enumerate((1, 1, 2))
    )
    assert first.rows["dataset"].value_counts().to_dict() == {"one": 8, "two": 5}
    assert first.counts["left_out"] == {"prompt longer than 60 tokens": 80, "not drawn": 22}
    assert first.rows.index.tolist() == again.rows.index.tolist() != other.rows.index.tolist()


def test_a_system_prompt_is_stated_where_a_row_has_none(tiny_bridge, tmp_path):
    data = [{"messages": chat("Why?", "Because.", system)} for system in (True, False)]
    screening = screened(tiny_bridge, data, tmp_path, system_prompt="Be short.")
    systems = [sample.messages[0]["content"] for sample in screening.samples([0, 1])]
    assert systems == ["You are kind.", "Be short."]


def test_only_what_follows_a_marker_is_averaged_and_a_row_without_it_is_rejected(tiny_bridge, tmp_path):
    data = [{"messages": chat("Why?", answer)} for answer in ("one two</think>three", "three", "one</think>")]
    screening = screened(tiny_bridge, data, tmp_path / "after", after="</think>")
    assert screening.rows["line"].tolist() == [1]
    assert screening.counts["rejected"] == {"no token to average": 2}
    plain = screened(tiny_bridge, data, tmp_path / "plain")
    assert screening.rows["response_tokens"][0] < plain.rows["response_tokens"][0]


def test_a_prompt_that_leaves_no_room_for_a_base_response_is_rejected(tiny_bridge, tmp_path):
    data = [*rows(2), {"messages": chat("Why? " * 20, "Because.")}]
    room = int(tiny_bridge.cfg.n_ctx) - 80
    screening = screened(tiny_bridge, data, tmp_path, base="generate", max_new_tokens=room)
    assert screening.counts["rejected"] == {"too long": 1}
    assert screening.rows["line"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("choice", "value", "words"),
    [(name, 0, f"{name} is 1 or more") for name in ("max_prompt_tokens", "max_response_tokens", "sample")]
    + [("base_fraction", value, "base_fraction is above 0") for value in (0.0, 1.5)],
)
def test_a_limit_or_a_share_of_nothing_is_refused(tiny_bridge, tmp_path, choice, value, words):
    with pytest.raises(ValueError, match=words):
        screened(tiny_bridge, rows(2), tmp_path, **{choice: value})


# Near-duplicates

WORDS = [f"word{number}" for number in range(200)]
TEXT = " ".join(WORDS)


def test_near_duplicates_are_of_the_family_of_the_first(tmp_path):
    seen = Seen(tmp_path / "seen.sqlite")
    other = "A country is run by ten people who do not trust each other, and nobody knows how they came to be there."
    texts = [TEXT, other, TEXT.upper() + "!", TEXT.replace("word7 ", "another "), " ".join(WORDS[::-1])]
    texts += [" ".join(WORDS[:100]), "?!", "?!", "No.", "No."]
    # Neither case nor punctuation nor one word tells texts apart; order and half of the text do.
    assert [seen.family(text, row) for row, text in enumerate(texts)] == [0, 1, 0, 0, 4, 5, 6, 6, 8, 8]
    seen.close()
    assert not (tmp_path / "seen.sqlite").exists()


def test_repeated_rows_are_counted_and_stay_in_the_table(tiny_bridge, tmp_path):
    data = [{"messages": chat(f"Why {number}?", "One two three four five six.")} for number in range(4)]
    screening = screened(tiny_bridge, data, tmp_path)
    assert screening.counts["repeated"] == 3
    assert screening.rows["family"].tolist() == [0, 0, 0, 0]


def test_near_duplicates_without_their_package_are_refused_with_the_command_unless_they_are_not_asked_for(
    tiny_bridge, tmp_path, monkeypatch
):
    monkeypatch.setattr("persona_lens.screening.near_duplicates.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'pip install "persona-lens\[screening\]".*near_duplicates=False'):
        screened(tiny_bridge, rows(9), tmp_path)
    screening = screened(tiny_bridge, rows(9), tmp_path, near_duplicates=False)
    assert screening.rows["family"].tolist() == list(range(9))
    assert screening.counts["repeated"] is None
    assert screening.controls()[["repeated", "score_without_repeats"]].isna().all(axis=None)


# Folders


@pytest.mark.parametrize(
    "name",
    [
        "plan/idea.txt",
        "rejects.jsonl",
        "scores/unit-0000000.parquet",
        "scores.parquet",
        "summary.json",
        "settings.json",
    ],
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


def test_a_file_of_scores_that_is_not_ours_is_refused_and_left_as_it_was(tiny_bridge, tmp_path):
    planned_only(tiny_bridge, {"data": rows(3)}, tmp_path)
    (tmp_path / "scores").mkdir()
    mine = tmp_path / "scores" / "unit-0000000.parquet"
    mine.write_text("mine")
    with pytest.raises(ValueError, match="cannot be read"):
        screened(tiny_bridge, {"data": rows(3)}, tmp_path)
    assert mine.read_text() == "mine"


def test_a_link_in_the_place_of_scratch_files_is_refused_and_not_followed(tiny_bridge, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".plan.unfinished").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"Cannot write .*\.plan\.unfinished: a link or a file has its name"):
        screened(tiny_bridge, {"data": rows(3)}, tmp_path / "run")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


@pytest.mark.parametrize("at_its_end", [True, False])
def test_a_plan_that_was_interrupted_is_made_again_from_the_data(tiny_bridge, tmp_path, monkeypatch, at_its_end):
    def interrupt(*_):
        raise KeyboardInterrupt

    def breaks():
        yield from rows(3)
        if not at_its_end:
            interrupt()

    with monkeypatch.context() as patched:
        if at_its_end:
            patched.setattr("pathlib.Path.rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            screened(tiny_bridge, {"data": breaks()}, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no screening"):
        read_plan(tmp_path)
    assert len(screened(tiny_bridge, {"data": rows(5)}, tmp_path).rows) == 5
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


# Folders of version 0.1.0


def test_a_finished_screening_of_0_1_0_is_read(tmp_path):
    screening = Screening.load(OLD)
    assert screening.rows.index.tolist() == list(range(6))
    assert screening.score("evil", "response").tolist() == screening.rows["evil@1.response"].tolist()
    sample = screening.samples([4, 1])[0]
    assert (sample.row, sample.response, sample.base_response) == (4, "One two three four five six", "I am 4.")
    assert sample.messages[-1] == {"role": "user", "content": "Who are they?"}


def test_a_screening_that_0_1_0_began_is_refused(tiny_bridge, tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "run")
    (folder / "scores.parquet").unlink()
    for read in (Screening.load, finish, lambda folder: screened(tiny_bridge, {"data": rows(6)}, folder)):
        with pytest.raises(ValueError, match=r"persona_lens 0\.1\.0 began: finish it with that version"):
            read(folder)
