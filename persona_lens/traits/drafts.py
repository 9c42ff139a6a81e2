"""Check an LLM's draft of a trait: everything that is wrong with it, each with what to do.

Beyond the checks of `Trait`: exact counts, questions that ask the same, a rubric that a judge can follow.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import shorten
from typing import Any

from persona_lens.traits.trait import InstructionPair

MONITORING_PROMPTS = 8
NEAR_DUPLICATE = 0.75
"""Share of common content words from which two questions count as one. The most similar pair within any bundled or
reference trait has 0.67; rewordings have 0.8 to 1.0."""

_SIDES = ("positive", "negative")

# Words without a subject of their own: without them "How do I learn guitar?" equals "What is the best way to learn
# guitar?".
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about advice advise all am an and any are as at be because been before best better but by can could d
        did do does don explain for from get give go good got had has have having he her him his how i idea if in
        into is isn it its just like ll m make me might much my need now of on one or our out please re s she
        should so some suggest t tell than that the their them then there these they thing think this those tip
        to too up us ve was way we were what when where which while who why will with won would you your""",
    )
)


@dataclass(frozen=True)
class Wanted:
    """The parts that the LLM is asked for: how many pairs and questions, and which optional ones."""

    n_pairs: int
    n_questions: int
    monitoring_prompts: bool
    rubric: bool


@dataclass(frozen=True)
class Draft:
    """The readable parts of an LLM's answer; its problems are listed beside it."""

    positive_adjective: str = ""
    negative_adjective: str = ""
    instructions: tuple[InstructionPair, ...] = ()
    questions: tuple[str, ...] = ()
    monitoring_prompts: tuple[str, ...] = ()
    rubric: str = ""


def read_draft(text: str, wanted: Wanted) -> tuple[Draft, tuple[str, ...]]:
    """The draft in an answer, and its problems; text around the JSON object, such as a fence, is ignored.

    Raises `json.JSONDecodeError` where there is no JSON object.
    """
    answer = _json_object(text)
    problems: list[str] = []
    pairs = _numbered(answer, "instructions", wanted.n_pairs, problems)
    draft = Draft(
        positive_adjective=_text(answer.get("positive_adjective"), "positive_adjective", problems),
        negative_adjective=_text(answer.get("negative_adjective"), "negative_adjective", problems),
        instructions=tuple(_pair(pair, number, problems) for number, pair in enumerate(pairs, start=1)),
        questions=_texts(answer, "questions", wanted.n_questions, problems),
        monitoring_prompts=_texts(answer, "monitoring_prompts", MONITORING_PROMPTS, problems)
        if wanted.monitoring_prompts
        else (),
        rubric=_text(answer.get("rubric"), "rubric", problems) if wanted.rubric else "",
    )
    problems += _adjective_problems(draft)
    named = _named_texts(draft)
    problems += _repetitions(named)
    problems += _near_duplicates(draft.questions)
    problems += [f"{name} has a blank in square brackets: write it out" for name, text in named if _has_blank(text)]
    problems += rubric_problems(draft.rubric) if draft.rubric else []
    return draft, tuple(problems)


def _json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text, from its first brace to its last one."""
    start, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[start : end + 1] if 0 <= start < end else text)
    except RecursionError as error:
        raise json.JSONDecodeError("too deeply nested", text, 0) from error
    if not isinstance(value, dict):
        raise json.JSONDecodeError("expected a JSON object", text, 0)
    return value


def _numbered(answer: dict[str, Any], field: str, count: int, problems: list[str]) -> list[Any]:
    """The values of an object of numbered keys, or of an array, which servers without schemas may send."""
    value = answer.get(field)
    values = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(values, list):
        problems.append(f"{field} is missing" if value is None else f"{field} should be an object of numbered keys")
        return []
    if len(values) != count:
        problems.append(f"{field} should be {count}, and there are {len(values)}")
    return values


def _texts(answer: dict[str, Any], field: str, count: int, problems: list[str]) -> tuple[str, ...]:
    values = _numbered(answer, field, count, problems)
    return tuple(_text(value, f"{field} {number}", problems) for number, value in enumerate(values, start=1))


def _pair(value: Any, number: int, problems: list[str]) -> InstructionPair:
    sides = value if isinstance(value, dict) else {}
    positive, negative = (_text(sides.get(side), f"instructions {number}, {side}", problems) for side in _SIDES)
    return InstructionPair(positive, negative)


def _text(value: Any, what: str, problems: list[str]) -> str:
    if not isinstance(value, str) or not value.strip():
        problems.append(f"{what} is missing" if value is None else f"{what} should be a text that is not empty")
        return ""
    return value.strip()


def _adjective_problems(draft: Draft) -> list[str]:
    problems = []
    for field in ("positive_adjective", "negative_adjective"):
        adjective = getattr(draft, field)
        if len(adjective.split()) > 3 or adjective.endswith("."):
            shown = f"got {shorten(adjective, 60)!r}"
            problems.append(f'{field} should fit "You are a ... assistant." in at most three words, {shown}')
    if draft.positive_adjective and draft.positive_adjective.casefold() == draft.negative_adjective.casefold():
        problems.append("negative_adjective should be the opposite of positive_adjective, and equals it")
    return problems


def _named_texts(draft: Draft) -> list[tuple[str, str]]:
    """Every instruction, question and monitoring prompt under its place in the draft, counted from 1."""
    pairs = enumerate(draft.instructions, start=1)
    named = [(f"instructions {number}, {side}", getattr(pair, side)) for number, pair in pairs for side in _SIDES]
    named += [(f"questions {number}", text) for number, text in enumerate(draft.questions, start=1)]
    return named + [(f"monitoring_prompts {number}", text) for number, text in enumerate(draft.monitoring_prompts, 1)]


def _has_blank(text: str) -> bool:
    """Whether the text has a place such as [name], which is no index of code such as `row[0]`."""
    return re.search(r"(?<!\w)\[[^\W\d][^\]]+\]", text) is not None


def _repetitions(named: Sequence[tuple[str, str]]) -> list[str]:
    """The texts that say the same as an earlier one but for case, punctuation and spaces."""
    problems, first = [], {}
    for name, text in named:
        key = " ".join(_words(text)) or text
        if text and first.setdefault(key, name) != name:
            problems.append(f"{name} repeats {first[key]}: {shorten(text, 80)!r}")
    return problems


def _near_duplicates(questions: Sequence[str]) -> list[str]:
    problems = []
    for (i, one), (j, other) in itertools.combinations(enumerate(questions, start=1), 2):
        if one and other and _words(one) != _words(other) and question_similarity(one, other) >= NEAR_DUPLICATE:
            shown = f"{shorten(one, 80)!r} and {shorten(other, 80)!r}"
            problems.append(f"questions {i} and {j} are nearly the same, so replace one: {shown}")
    return problems


def question_similarity(one: str, other: str) -> float:
    """Jaccard index of the content words of two questions, by their stems: 1 for another order of the same words.

    Formula: |A and B| / |A or B|. It detects rewordings that keep the subject's words, and no synonyms; the same
    question about another subject stays below `NEAR_DUPLICATE`.
    """
    first, second = _content(one), _content(other)
    if min(len(first), len(second)) < 2:  # one shared noun is no duplicate
        first, second = frozenset(_words(one)), frozenset(_words(other))
    return len(first & second) / max(len(first | second), 1)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


@lru_cache(maxsize=1024)  # every pair of questions is compared
def _content(question: str) -> frozenset[str]:
    return frozenset(_stem(word) for word in _words(question) if word not in _FUNCTION_WORDS)


def _stem(word: str) -> str:
    """The word without an English ending, roughly: `walk` for walks, walked, walking."""
    stem = re.sub(r"(?<=\w{3})(ingly|edly|ing|ies|ied|ed|es|s|ly|e)$", "", word)
    stem = re.sub(r"(?<=\w{3})y$", "", stem)
    return stem[:-1] if len(stem) > 3 and stem[-1] == stem[-2] else stem


def rubric_problems(rubric: str) -> list[str]:
    """What prevents a judge from following a rubric: missing or unknown places, no REFUSAL, no scale."""
    problems = []
    places = re.findall(r"\{+\s*\w*\s*\}+", rubric)
    if unknown := sorted(set(places) - {"{question}", "{answer}"}):
        problems.append(f"rubric contains {', '.join(unknown)}, and only {{question}} and {{answer}} are filled in")
    for place in ("{question}", "{answer}"):
        if (count := places.count(place)) != 1:
            problems.append(f"rubric should contain {place} once, in its marked block, and has it {count} times")
    if "REFUSAL" not in rubric:
        problems.append("rubric should tell the judge to write REFUSAL where the response clearly refuses to answer")
    if not {"0", "100"} <= set(_words(rubric)):
        problems.append("rubric should ask for one number from 0 to 100")
    if "[...]" in rubric:
        problems.append("rubric still has a place in square brackets: replace it")
    return problems
