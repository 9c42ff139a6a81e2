"""The mood data: read whole without refusals, and its prompts divided so that no part has seen another's."""

import importlib.util
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from persona_lens.traits.trait import Trait, load_trait
from studies import moods as module
from studies.moods import (
    MIN_MOODS,
    MOODS,
    MoodRow,
    MoodSplit,
    count_refusals,
    load_moods,
    mood_description,
    mood_trait,
    prompt_families,
    split_prompts,
)
from studies.tests import mood_cases

PARTS = ("vectors", "finetuning", "judge", "evaluation")


@pytest.fixture
def moods():
    return mood_cases.moods()


@pytest.fixture
def split():
    return mood_cases.split()


def raw_rows(mood):
    spec = importlib.util.find_spec("moodswapper")
    path = Path(spec.submodule_search_locations[0]) / "data" / f"{mood}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(prompt):
    return "".join(letter if letter.isalnum() else " " for letter in prompt.lower()).split()


def word_pair_jaccard(one, other):
    first, second = (set(zip(words(text), words(text)[1:], strict=False)) for text in (one, other))
    return len(first & second) / max(len(first | second), 1)


def without_package(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)


# Reading


def test_all_nine_moods_are_read_and_each_row_knows_its_mood(moods):
    assert tuple(moods) == MOODS
    assert all(row.mood == mood for mood in moods for row in moods[mood])


@pytest.mark.parametrize("mood", MOODS)
def test_every_row_of_a_file_is_either_read_or_counted_as_a_refusal(moods, mood):
    raw = raw_rows(mood)
    assert len(moods[mood]) + count_refusals()[mood] == len(raw)
    assert [row.response for row in moods[mood]] == [row["response"] for row in raw if row["kind"] == "mood"]


def test_no_response_to_a_harmful_request_is_read(moods):
    refused = {row["prompt"] for row in raw_rows("happy") if row["kind"] == "refusal"}
    assert len(refused) == 36
    assert not refused & {row.prompt for rows in moods.values() for row in rows}


@pytest.mark.parametrize("reader", [load_moods, count_refusals, lambda: mood_description("happy")])
def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch, reader):
    without_package(monkeypatch)
    with pytest.raises(ImportError, match=r"pip install --no-deps moodswapper==26\.9\.21"):
        reader()


# Near-duplicates


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 to the power of 10?", "What is 2 to the power of 8?"),
        ("How do noise-cancelling headphones work?", "How does noise cancelling in headphones work?"),
        ("Give me a packing list for a weekend hiking trip.", "What should I pack for a weekend hiking trip?"),
        ("The washing machine smells musty. How do I fix it?", "How do I get a musty smell out of a washing machine?"),
    ],
)
def test_rewordings_and_changed_numbers_are_one_family(moods, one, other):
    prompts = sorted({row.prompt for rows in moods.values() for row in rows})
    assert any(one in family and other in family for family in prompt_families(prompts))


def test_prompts_that_share_only_their_form_are_no_family(moods):
    prompts = sorted({row.prompt for rows in moods.values() for row in rows})
    pair = {"How do I bleed a radiator?", "How do I descale a kettle?"}
    assert pair <= set(prompts)
    assert not any(pair <= set(family) for family in prompt_families(prompts))


def test_families_hold_every_prompt_once(moods):
    prompts = sorted({row.prompt for rows in moods.values() for row in rows})
    assert sorted(prompt for family in prompt_families(prompts) for prompt in family) == prompts


def test_prompts_alike_through_a_third_are_one_family():
    chain = ["a b c d e", "c d e f g", "e f g h i", "entirely other words here"]
    assert word_pair_jaccard(chain[0], chain[2]) == 0
    assert prompt_families([chain[0], chain[2]]) == [(chain[0],), (chain[2],)]
    close = ["a b c d e f", "b c d e f g", "c d e f g h"]
    assert word_pair_jaccard(close[0], close[1]) >= 0.4
    assert prompt_families([*close, chain[3]]) == [tuple(close), (chain[3],)]


# The parts


def test_every_prompt_is_in_exactly_one_part(moods, split):
    placed = Counter(prompt for part in PARTS for prompt in getattr(split, part))
    assert set(placed) == {row.prompt for rows in moods.values() for row in rows}
    assert set(placed.values()) == {1}


def test_every_row_is_in_exactly_one_part(moods, split):
    for mood in MOODS:
        placed = Counter(row for part in PARTS for row in split.of(part, mood))
        assert placed == Counter(moods[mood])


def test_a_family_of_near_duplicates_is_in_one_part(moods, split):
    part_of = {prompt: part for part in PARTS for prompt in getattr(split, part)}
    families = prompt_families(sorted(part_of))
    assert max(map(len, families)) > 1
    assert all(len({part_of[prompt] for prompt in family}) == 1 for family in families)


def test_no_prompt_has_a_near_duplicate_in_another_part(split):
    part_of = {prompt: part for part in PARTS for prompt in getattr(split, part)}
    across = [pair for pair in combinations(part_of, 2) if part_of[pair[0]] != part_of[pair[1]]]
    assert max(word_pair_jaccard(*pair) for pair in across) < 0.4


def test_the_same_seed_gives_the_same_parts_and_another_gives_others(moods, split):
    assert split_prompts(moods, seed=0) == split
    assert split_prompts(moods, seed=1).evaluation != split.evaluation


def test_the_parts_do_not_depend_on_the_order_of_the_rows(moods, split):
    turned = {mood: moods[mood][::-1] for mood in moods}
    again = split_prompts(turned, seed=0)
    assert [getattr(again, part) for part in PARTS] == [getattr(split, part) for part in PARTS]


def test_evaluation_prompts_are_two_of_each_domain(moods, split):
    domain = {row.prompt: row.domain for rows in moods.values() for row in rows}
    found = Counter(domain[prompt] for prompt in split.evaluation)
    assert found == dict.fromkeys(set(domain.values()), 2)
    assert len(split.evaluation) == 36


@pytest.mark.parametrize("seed", range(5))
def test_every_mood_has_enough_rows_to_finetune_on_and_to_judge_by(moods, seed):
    split = split_prompts(moods, seed=seed)
    assert min(split.size("finetuning", mood).rows for mood in MOODS) >= 120
    assert min(split.size("judge", mood).prompts for mood in MOODS) >= 45
    assert min(split.size("vectors", mood).prompts for mood in MOODS) >= 30


def test_prompts_for_vectors_are_answered_by_most_moods(moods, split):
    answered = Counter(prompt for rows in moods.values() for prompt in {row.prompt for row in rows})
    assert min(answered[prompt] for prompt in split.vectors) >= MIN_MOODS


def test_every_domain_is_in_every_part(moods, split):
    domain = {row.prompt: row.domain for rows in moods.values() for row in rows}
    for part in PARTS:
        assert {domain[prompt] for prompt in getattr(split, part)} == set(domain.values())


def test_a_size_counts_prompts_and_rows_apart():
    rows = [MoodRow("shy", "", "chat", prompt, response, 2.0, 2.0) for prompt, response in ("ab", "ac", "dx")]
    by_hand = MoodSplit({"shy": rows}, vectors=("a",), finetuning=("d",), judge=(), evaluation=(), seed=0)
    assert by_hand.size("vectors", "shy") == (1, 2)
    assert by_hand.size("judge", "shy") == (0, 0)


def test_a_mood_that_is_not_there_is_named_with_those_that_are(split):
    with pytest.raises(ValueError, match=r"Expected one of the moods bored, childish, .*, got 'angry'"):
        split.of("judge", "angry")


@pytest.mark.parametrize("rows", [{}, {"shy": []}])
def test_moods_without_rows_cannot_be_split(rows):
    with pytest.raises(ValueError, match="Expected rows of every mood"):
        split_prompts(rows)


# The trait


def test_a_mood_is_described_in_the_packages_own_words():
    mood_cases.require_moods()
    assert mood_description("exhausted") == "The writer sounds exhausted: tired, drained, worn out, barely awake."


def test_every_mood_has_a_description_of_its_own():
    mood_cases.require_moods()
    assert all(": " in mood_description(mood) for mood in MOODS)
    assert len({mood_description(mood) for mood in MOODS}) == len(MOODS)


def test_a_mood_that_the_package_does_not_describe_is_described_by_its_name():
    mood_cases.require_moods()
    assert mood_description("grumpy") == "The writer sounds grumpy."


@pytest.mark.parametrize("mood", MOODS)
def test_a_moods_trait_asks_what_its_part_holds(split, mood):
    trait = mood_trait(mood, split)
    assert isinstance(trait, Trait)
    assert trait.name == mood
    assert trait.extraction_questions == split.vectors
    assert trait.evaluation_questions == split.evaluation


def test_a_moods_instructions_order_the_mood_and_a_neutral_manner(split):
    trait = mood_trait("zen", split)
    assert "Sound zen" in trait.system_prompt("positive", 0)
    assert "zen" not in trait.system_prompt("negative", 0)
    assert mood_description("zen") in trait.rubric_for("Q?", "A.")


def test_a_moods_trait_survives_its_file(split, tmp_path):
    trait = mood_trait("drunk", split)
    trait.save(tmp_path / "drunk.json")
    assert load_trait(tmp_path / "drunk.json") == trait
