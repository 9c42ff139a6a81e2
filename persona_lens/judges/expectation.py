"""The judge's number, from the probabilities of what it could have said (arXiv:2507.21509, appendix B).

Score = sum(n * p_n) / sum(p_n) over the integers n from 0 to 100 among the likeliest first tokens; where they hold less
than a quarter of the probability there is no score. For a tokenizer that splits numbers into digits, p_n is the product
along the digits of n, up to the end of the number.
"""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

MIN_MASS = 0.25

Alternatives = Iterable[tuple[str, float]]
"""Alternatives for one token of an answer: (text, natural log-probability)."""


class Expectation(NamedTuple):
    """A score from 0 to 100, None where it is missing, and the total probability of integers."""

    value: float | None
    mass: float


def expectation(probabilities: Mapping[int, float], *, min_mass: float = MIN_MASS) -> Expectation:
    """The mean integer under these probabilities; missing where they hold less than `min_mass` together."""
    mass = math.fsum(probabilities.values())
    if mass < min_mass or mass == 0:
        return Expectation(None, mass)
    mean = math.fsum(number * probability for number, probability in probabilities.items()) / mass
    return Expectation(min(100.0, max(0.0, mean)), mass)


def integer(text: str) -> int | None:
    """The integer from 0 to 100 in a text that holds nothing else but white space; None for any other text."""
    match = re.fullmatch(r"\s*([0-9]{1,3})\s*", text)
    return int(match[1]) if match and int(match[1]) <= 100 else None


def number_tokens(alternatives: Alternatives) -> dict[int, float]:
    """The probability of each integer from 0 to 100 that is one token."""
    probabilities: defaultdict[int, float] = defaultdict(float)
    for text, logprob in alternatives:
        if (number := integer(text)) is not None:
            probabilities[number] += math.exp(logprob)  # "85" and " 85" are one number
    return dict(probabilities)


async def digit_sequences(
    alternatives_after: Callable[[str], Awaitable[Alternatives]], *, min_branch: float = 0.01
) -> dict[int, float]:
    """The probability of each integer from 0 to 100, multiplied out over the tokens that spell it.

    `alternatives_after(beginning)` gives the next tokens of an answer that begins so. It is called for beginnings that
    another digit could continue and whose probability is at least `min_branch`; the others are left out, of the mass
    too. Two digits other than 10 are taken as the whole number, as is a 0.
    """
    probabilities: defaultdict[int, float] = defaultdict(float)
    # (beginning, probability), depth first, so that one row never has more than one call at a time.
    open_ends: list[tuple[str, float]] = [("", 1.0)]
    while open_ends:
        beginning, probability = open_ends.pop()
        alternatives = [(text, math.exp(logprob)) for text, logprob in await alternatives_after(beginning)]
        if beginning.strip():
            ends = max(0.0, 1 - math.fsum(p for text, p in alternatives if re.match("[0-9]", text)))
            probabilities[int(beginning)] += probability * ends
        for text, share in alternatives:
            following = beginning + text
            if not re.fullmatch(r"\s{0,2}[0-9]{0,3}", following) or not text:
                continue
            if following.strip() and int(following) * 10 not in range(10, 101):
                if int(following) <= 100:
                    probabilities[int(following)] += probability * share
            elif probability * share >= min_branch:
                open_ends.append((following, probability * share))
    return dict(probabilities)


# The tags around the thoughts of a judge that reasons in its answer.
_THOUGHTS_OPEN = re.compile(r"<(?:think|thinking|thought|reasoning)>|\[THINK\]", re.IGNORECASE)
_THOUGHTS_CLOSE = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]", re.IGNORECASE)
# Repetitions of the scale, which are no score: "0-100", "from 0 to 100", "/100", "out of 100", "85 of 100" (but not
# "a score of 100"). No part can match the same text in two ways, so that matching takes linear time.
_SCALE = re.compile(
    r"(?:(?<![\w.,-])[01]\s*(?:[-\u2010-\u2015\u2212~]|to|and)\s*|/\s*|\bout\s+of\s+(?:a\s+possible\s+)?|(?<=[0-9])\s+of\s+)"
    r"100(?:\.0+)?(?![0-9A-Za-z]|[.,][0-9])",
    re.IGNORECASE,
)
# Characters that belong to one number or name: "7.5", "85%", "1,000", "-5", "50-60", "GPT-4.1".
_WORD = re.compile(r"[^\W_][\w.,%\u2010-\u2013\u2212-]*|[.,\u2010-\u2013\u2212-]+[^\W_][\w.,%\u2010-\u2013\u2212-]*")
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)%?([^\W0-9_]*)")


def read_number(text: str) -> float | None:
    """The score that a text states; None where it states none or more than one.

    The text has one number from 0 to 100, in digits of any script: `85`, `Score (0-100): 85`, `85/100`,
    `85 out of 100`, `85%`. Two numbers, a range such as `50-60`, a negative number, `1,000` and a refusal are none.
    Thoughts between `<think>` and `</think>` do not count. Takes time linear in the length of the text.
    """
    said = _without_thoughts(text).replace("_", " ")  # Markdown's emphasis
    if is_refusal(said) or re.search(r"\bREFUSAL\b", said, re.IGNORECASE):
        return None
    score: float | None = None
    for word in _WORD.findall(_SCALE.sub(" ", _ascii_digits(said))):
        word = word.rstrip(".,\u2010\u2011\u2012\u2013\u2212-")
        if word[:1].isalpha() or not re.search(r"[0-9]", word):
            continue  # a name such as GPT-4.1, or a lone sign
        number = _NUMBER.fullmatch(word)
        if number is None or score is not None:
            return None
        # A unit may follow at once, as in "85points", but neither an exponent, "½" nor "k".
        if number[2] and not (number[2].isalpha() and number[2].lower() not in ("k", "m")):
            return None
        score = float(number[1])
    return score if score is not None and score <= 100 else None


def has_thoughts(text: str) -> bool:
    """Whether an answer holds the judge's thoughts, or the closing tag of thoughts that its template opened."""
    return bool(_THOUGHTS_OPEN.search(text) or _THOUGHTS_CLOSE.search(text))


def _without_thoughts(text: str) -> str:
    """The answer after its thoughts; empty where these were cut."""
    return _THOUGHTS_OPEN.split(_THOUGHTS_CLOSE.split(text)[-1])[0]


def _ascii_digits(text: str) -> str:
    """The text with decimal digits of every script as 0 to 9; superscripts and fractions stay as they are."""
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(character, character)) for character in text)


def is_refusal(text: str) -> bool:
    """Whether an answer, or its first token, is the word REFUSAL of the rubrics, with or without a label."""
    label = r"^[\W_]*(?:(?:score|rating|answer|verdict)\b[\W_]*)?"
    said = re.sub(label, "", _without_thoughts(text), flags=re.IGNORECASE)[:20].rstrip().upper()
    return said.startswith("REFUS") or (bool(said) and "REFUSAL".startswith(said))
