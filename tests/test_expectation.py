"""The judge's mathematics, against cases worked out by hand and against whole distributions of answers."""

import asyncio
import math
import time
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.judges.expectation import (
    digit_sequences,
    expectation,
    integer,
    is_refusal,
    number_tokens,
    read_number,
)


def logs(probabilities: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(text, math.log(probability)) for text, probability in probabilities.items()]


class Speller:
    """A model with a known distribution over whole answers, which it says a character at a time."""

    def __init__(self, answers: Mapping[str, float]):
        self.answers, self.calls = answers, 0

    async def __call__(self, beginning: str) -> list[tuple[str, float]]:
        self.calls += 1
        possible = {answer: p for answer, p in self.answers.items() if answer.startswith(beginning)}
        total = math.fsum(possible.values())
        characters: dict[str, float] = {}
        for answer, probability in possible.items():
            character = answer[len(beginning) : len(beginning) + 1] or "<end>"
            characters[character] = characters.get(character, 0.0) + probability / total
        return logs({character: p for character, p in characters.items() if p > 0})


def spelled(answers: Mapping[str, float], **options: float) -> dict[int, float]:
    return asyncio.run(digit_sequences(Speller(answers), **options))


def test_the_score_is_the_probability_weighted_mean_of_the_integers():
    tokens = logs({"80": 0.5, "90": 0.25, "the": 0.25})

    found = expectation(number_tokens(tokens))
    assert found.value == pytest.approx(250 / 3)
    assert found.mass == pytest.approx(0.75)


def test_tokens_that_say_the_same_integer_count_together():
    found = expectation(number_tokens(logs({"85": 0.2, " 85": 0.2, "10": 0.4})))

    assert found.value == pytest.approx((85 * 0.4 + 10 * 0.4) / 0.8)


@pytest.mark.parametrize(
    ("mass", "is_missing"), [(0.2499, True), (0.25, False), (0.9, False)], ids=["below", "at the limit", "above"]
)
def test_a_score_is_missing_where_integers_hold_less_than_a_quarter(mass, is_missing):
    found = expectation({70: mass})

    assert (found.value is None) == is_missing
    assert found.mass == mass


@pytest.mark.parametrize("text", ["101", "-5", "5.5", "", " ", "1_0", "+7", "٣", "²", "5a", "1 0", "0x1", "1000"])
def test_what_is_no_integer_from_0_to_100_is_not_counted(text):
    assert integer(text) is None


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("100", 100), (" 42", 42), ("7\n", 7), ("07", 7)])
def test_an_integer_may_have_white_space_around_it(text, number):
    assert integer(text) == number


probabilities = st.dictionaries(st.integers(0, 100), st.floats(1e-3, 1.0), min_size=1, max_size=20)


@given(probabilities)
def test_the_expectation_lies_between_the_smallest_and_the_largest_integer(weights):
    found = expectation(weights, min_mass=0.0)

    assert found.value is not None
    assert min(weights) - 1e-9 <= found.value <= max(weights) + 1e-9
    assert 0 <= found.value <= 100


@given(probabilities, st.randoms())
def test_the_order_of_the_tokens_does_not_matter(weights, random):
    tokens = logs({str(number): weight / 100 for number, weight in weights.items()})
    shuffled = list(tokens)
    random.shuffle(shuffled)

    assert expectation(number_tokens(tokens), min_mass=0.0) == pytest.approx(
        expectation(number_tokens(shuffled), min_mass=0.0), rel=1e-12
    )


@given(probabilities, st.floats(0.0, 5.0))
def test_digit_sequences_give_what_whole_tokens_give(weights, refusing):
    total = math.fsum(weights.values()) + refusing + 0.1
    answers = {str(number): weight / total for number, weight in weights.items()}
    answers |= {"REFUSAL": refusing / total, "I would say 30": 0.1 / total}

    by_digits = spelled(answers, min_branch=0.0)

    whole = number_tokens(logs({text: p for text, p in answers.items() if p > 0}))
    assert {n: p for n, p in by_digits.items() if p > 1e-12} == pytest.approx(whole)
    assert expectation(by_digits) == pytest.approx(expectation(whole))


@given(probabilities)
def test_leaving_out_unlikely_beginnings_loses_no_more_than_they_hold(weights):
    total = math.fsum(weights.values())
    answers = {str(number): weight / total for number, weight in weights.items()}
    first = {digit: math.fsum(p for text, p in answers.items() if text[0] == digit) for digit in "123456789"}
    left_out = math.fsum(p for p in first.values() if p < 0.01) + 0.01  # and what 10 begins

    assert math.fsum(spelled(answers).values()) >= 1 - left_out - 1e-9


def test_digits_are_multiplied_along_the_number():
    answers = {"8": 0.1, "85": 0.3, "80": 0.2, "10": 0.1, "100": 0.2, "0": 0.1}

    assert spelled(answers) == pytest.approx({8: 0.1, 85: 0.3, 80: 0.2, 10: 0.1, 100: 0.2, 0: 0.1, 1: 0.0})


def test_a_number_may_follow_white_space():
    assert spelled({" 85": 0.5, "\n7": 0.5}) == pytest.approx({85: 0.5, 7: 0.5, 8: 0.0})


def test_more_than_100_is_no_score():
    assert math.fsum(spelled({"101": 0.4, "109": 0.2, "85": 0.4}).values()) == pytest.approx(0.4)


def test_only_beginnings_that_another_digit_could_continue_are_looked_into():
    model = Speller({"0": 0.3, "85": 0.3, "100": 0.2, "REFUSAL": 0.2})

    asyncio.run(digit_sequences(model))

    assert model.calls == 4  # the first place, after 8, after 1, after 10


WRITTEN = {
    85: """85| 85.|Score: 85|**85**|85/100|85 / 100|85 out of 100|85 of 100 points|85%|_85_|- 85|85points|85\u5206
        |Score (0-100): 85|Score (0 \u2013 100): 85|On a scale from 0 to 100, 85|\u0668\u0665|\uff18\uff15
        |GPT-4.1 says 85|<score>85</score>""",
    7.5: "7.5|7.5/100.0",
    100: "100|100/100|100 out of 100|a score of 100|100 %",
    0: "0|between 0 and 100: 0",
    # Two numbers, a range, a negative number, none at all.
    None: """between 40 and 60|101|-5|REFUSAL||GPT4 says so|50-60|50\u201360|50% - 60%|about 50 to 60|50/60|8/10|0-100
        |-5, or rather 85|\u22125|1,000|85,5|100.5|1.2.3|1e2|5k|8\u00b2|85\u00bd|100 of 1000""",
}


@pytest.mark.parametrize(("number", "texts"), WRITTEN.items())
def test_a_number_is_read_from_text_where_it_is_clear_which(number, texts):
    for text in texts.split("|"):
        assert read_number(text) == number, text


@pytest.mark.parametrize(
    "text", ["REFUSAL: 0", "**REFUSAL** (0)", "Score: REFUSAL 0", "refusal, so 100", "0 (REFUSAL)"]
)
def test_a_refusal_with_a_number_is_a_refusal(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "number", "refuses"),
    [
        ("<think>between 20 and 30, not 90</think> 70", 70, False),
        ("20 or 30?</think>\n70", 70, False),  # the template had opened the block
        ("[THINK]20[/THINK]70", 70, False),
        ("<think>70", None, False),
        ("<think>80?</think>REFUSAL", None, True),
    ],
)
def test_thoughts_of_the_judge_are_not_its_score(text, number, refuses):
    assert read_number(text) == number
    assert is_refusal(text) is refuses


@pytest.mark.parametrize(
    "part", ["1%", "1-", "1.", "1,", "1 ", "0-100", "0 to ", "of 100", "/100", "out of ", "<think>"]
)
def test_reading_a_long_answer_takes_time_linear_in_its_length(part):
    begin = time.perf_counter()
    read_number(part * (60_000 // len(part)))
    assert time.perf_counter() - begin < 1.0  # a quadratic reading takes some ten seconds for "1%"


@given(st.text(alphabet="0158 .,-%/()REFUSALto\n\u2212\u0665<>"))
def test_any_text_gives_a_number_from_0_to_100_or_none(text):
    number = read_number(text)
    assert number is None or 0 <= number <= 100
    assert number is None or not is_refusal(text)
    assert read_number("<think>12 or 34</think>" + text) == number


@given(
    st.integers(0, 100),
    st.sampled_from(["{}", " {}.", "**{}**", "Score: {}", "Score (0-100): {}", "{}/100", "{} out of 100", "{}%"]),
)
def test_a_score_is_read_however_it_is_dressed(number, dress):
    assert read_number(dress.format(number)) == number
    assert read_number("REFUSAL: " + dress.format(number)) is None
    assert read_number(dress.format(f"{number}-{number + 1}")) is None


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("REFUSAL", True),
        ("RE", True),
        (" refusal", True),
        ("Refused.", True),
        ("**REFUSAL**", True),
        ("Score: REF", True),
        ("", False),
        ("85", False),
        ("I", False),
    ],
)
def test_a_refusal_is_told_from_its_first_token(text, refuses):
    assert is_refusal(text) == refuses
