"""The judge's number, from the probabilities of what it could have said (arXiv:2507.21509, appendix B).

Score = sum(n * p_n) / sum(p_n) over the integers n from 0 to 100 among the likeliest tokens of the first place; where
they hold less than a quarter of the probability there is no score. A tokenizer that splits numbers into digits spreads
a number over several places, and p_n is then the product along its digits, up to where the number ends.
Knows nothing about servers or prompts: probabilities come in, a number comes out.
"""

import math
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

MIN_MASS = 0.25

Alternatives = Iterable[tuple[str, float]]
"""What could stand at one place of an answer: (text of a token, natural log-probability)."""


class Expectation(NamedTuple):
    """A score from 0 to 100, None where it is missing, and the probability of all integers together."""

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
    """The integer from 0 to 100 that a text is, with nothing but white space around it; None for any other text."""
    found = re.fullmatch(r"\s*([0-9]{1,3})\s*", text)
    return int(found[1]) if found and int(found[1]) <= 100 else None


def number_tokens(alternatives: Alternatives) -> dict[int, float]:
    """The probability of each integer from 0 to 100 that is a token by itself."""
    found: defaultdict[int, float] = defaultdict(float)
    for text, logprob in alternatives:
        if (number := integer(text)) is not None:
            found[number] += math.exp(logprob)  # "85" and " 85" are one number
    return dict(found)


async def digit_sequences(
    alternatives_after: Callable[[str], Awaitable[Alternatives]], *, min_branch: float = 0.01
) -> dict[int, float]:
    """The probability of each integer from 0 to 100, multiplied out over the tokens that spell it.

    `alternatives_after(beginning)` gives what could follow in an answer that begins so. Only beginnings that another
    digit could continue are looked into, and only those that have a probability of `min_branch` or more; what lies
    behind the others is left out, of the mass too. Two digits other than 10 are taken to end there, as does a 0.
    """
    found: defaultdict[int, float] = defaultdict(float)
    # (beginning, probability): depth first, so that one row never has more than one call under way.
    open_ends: list[tuple[str, float]] = [("", 1.0)]
    while open_ends:
        beginning, probability = open_ends.pop()
        alternatives = [(text, math.exp(logprob)) for text, logprob in await alternatives_after(beginning)]
        if beginning.strip():
            ends = max(0.0, 1 - math.fsum(p for text, p in alternatives if re.match("[0-9]", text)))
            found[int(beginning)] += probability * ends
        for text, share in alternatives:
            following = beginning + text
            if not re.fullmatch(r"\s{0,2}[0-9]{0,3}", following) or not text:
                continue
            if following.strip() and int(following) * 10 not in range(10, 101):
                if int(following) <= 100:
                    found[int(following)] += probability * share
            elif probability * share >= min_branch:
                open_ends.append((following, probability * share))
    return dict(found)


def read_number(text: str) -> float | None:
    """The score that a text states: its only number, from 0 to 100, also as `85/100`; None where that is not clear."""
    numbers = re.findall(r"(?<![\w.-])[0-9]+(?:\.[0-9]+)?(?![\w%]*[0-9])", re.sub(r"/\s*100\b", "", text))
    if len(numbers) != 1 or float(numbers[0]) > 100:
        return None
    return float(numbers[0])


def is_refusal(text: str) -> bool:
    """Whether an answer, or its first token, is the word REFUSAL that rubrics ask for."""
    said = text.strip().upper()
    return said.startswith("REFUS") or (bool(said) and "REFUSAL".startswith(said))
