"""What each part of the finetuning study reads: a mood's contrasts, training rows and judge, and how much is copied.

A mood's contrast is its responses against the other moods' or against the model's own to the same prompts, each prompt
counting the same (arXiv:2507.21509, section 2.2); training sets of two severities take the place of the paper's
versions of a dataset (section 4).
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from persona_lens.chat.batches import Conversation, chat_messages
from persona_lens.judges.classifier import TextClassifier
from persona_lens.rollouts.rows import Rollout
from persona_lens.statistics import N_RESAMPLES, Estimate, question_resamples
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from studies.moods import MIN_MOODS, MoodRow, MoodSplit, Part

Severity = Literal["full", "half"]


class Contrast(NamedTuple):
    """Responses for `extract_from_responses`; each prompt has one positive row and equally many negative ones."""

    positive: list[Conversation]
    negative: list[Conversation]
    left_out: tuple[str, ...]
    """Prompts that the mood answers and that have too little to be contrasted with."""


def contrast_with_moods(split: MoodSplit, mood: str, *, others: int = MIN_MOODS - 1, seed: int = 0) -> Contrast:
    """The mood's responses to the `vectors` prompts against those of `others` other moods to each of the same prompts.

    Which moods answer a prompt differs, so at each prompt those taken least often so far are taken: each other mood
    counts as nearly the same as the data allow. A mood's first response to a prompt stands for it. The contrast is free
    of what the writer of all moods has in common, and holds what sets this mood apart from *these* others: part of it
    is the opposite of a mood that is far from all the rest.

    Raises ValueError where no prompt has so many other moods.
    """
    prompts = split.vectors
    answers = {name: _by_prompt(split.of("vectors", name)) for name in split.rows}
    available = {
        prompt: [name for name in answers if name != mood and prompt in answers[name]]
        for prompt in prompts
        if prompt in answers[mood]
    }
    kept = [prompt for prompt in available if len(available[prompt]) >= others]
    if not kept or others < 1:
        raise ValueError(
            f"{mood}: none of {len(available)} prompts is answered by {others} other moods: lower others, not below 1."
        )
    order = random.Random(seed)
    taken: Counter[str] = Counter()
    negative: dict[str, list[Conversation]] = {}
    # Prompts with the least choice come first: those with more can make up for what they had to take.
    for prompt in sorted(kept, key=lambda prompt: len(available[prompt])):
        chosen = sorted(available[prompt], key=lambda name: (taken[name], order.random()))[:others]
        taken.update(chosen)
        negative[prompt] = [_conversation(prompt, answers[name][prompt][0].response) for name in chosen]
    return Contrast(
        [_conversation(prompt, answers[mood][prompt][0].response) for prompt in kept],
        [row for prompt in kept for row in negative[prompt]],
        tuple(prompt for prompt in available if prompt not in negative),
    )


def contrast_with_neutral(split: MoodSplit, mood: str, neutral: Sequence[Rollout]) -> Contrast:
    """The mood's responses to the `vectors` prompts against the model's own responses to the same prompts.

    Every prompt gets as many of its neutral responses as the one with the fewest has. No other mood enters, but what
    sets the writer of the moods apart from the model does: the contrast is the mood and another author's manner.

    Args:
        split: The rows and their parts.
        mood: One of its moods.
        neutral: The model's own responses under `NEUTRAL`; those to prompts of other parts are not used.

    Raises ValueError where no neutral response answers a prompt of the mood, or one was not made so.
    """
    answers = _by_prompt(split.of("vectors", mood))
    own = _neutral_by_prompt(neutral, split.vectors, "vectors")
    kept = [prompt for prompt in answers if prompt in own]
    if not kept:
        raise ValueError(f"{mood}: no neutral response answers one of its {len(answers)} prompts: sample some.")
    per_prompt = min(len(own[prompt]) for prompt in kept)
    return Contrast(
        [_conversation(prompt, answers[prompt][0].response) for prompt in kept],
        [_conversation(prompt, text) for prompt in kept for text in own[prompt][:per_prompt]],
        tuple(prompt for prompt in answers if prompt not in own),
    )


def training_rows(
    split: MoodSplit, mood: str, severity: Severity, neutral: Sequence[Rollout], n: int, seed: int = 0
) -> list[dict[str, Any]]:
    """`n` chats to finetune on, in random order: all in the mood ("full"), or half of them the model's own ("half").

    The mood's prompts are put in random order; the mood rows of "half" are the first n / 2 of "full", and its neutral
    rows answer prompts after those, where the model's own responses to them suffice the very prompts of the other rows
    of "full". So the two differ in responses, as little as possible in prompts, and no prompt has both kinds.

    Args:
        split: The rows and their parts; only `finetuning` prompts are used.
        mood: One of its moods.
        severity: "full" is the whole mood, "half" is diluted with as many neutral rows.
        neutral: The model's own responses under `NEUTRAL`; those to prompts of other parts are not used. "full" needs
            none.
        n: How many chats; even for "half".
        seed: Draws prompts and order.

    Returns:
        Rows `{"messages": [system, user, assistant]}`.

    Raises ValueError where there are not so many rows, or a neutral response was not made so.
    """
    if severity not in ("full", "half") or n < 1 or (severity == "half" and n % 2):
        raise ValueError(f"Expected 'full' or 'half' and a positive n, even for 'half'; got {severity!r} and {n}.")
    order = random.Random(f"{seed} {mood}")
    answers = _by_prompt(split.of("finetuning", mood))
    rows = [row for prompt in order.sample(list(answers), len(answers)) for row in answers[prompt]]
    n_mood = n if severity == "full" else n // 2
    if len(rows) < n_mood:
        raise ValueError(f"{mood}: {n_mood} rows are wanted and the finetuning part has {len(rows)}: lower n.")
    chats = [_chat(row.prompt, row.response) for row in rows[:n_mood]]
    if severity == "half":
        chats += _neutral_chats(split, mood, neutral, rows, n // 2)
    order.shuffle(chats)
    return chats


def _neutral_chats(
    split: MoodSplit, mood: str, neutral: Sequence[Rollout], rows: Sequence[MoodRow], n: int
) -> list[dict[str, Any]]:
    """`n` of the model's own responses to prompts other than those of the first `n` rows, the following rows' first."""
    own = _neutral_by_prompt(neutral, split.finetuning, "finetuning")
    used = {row.prompt for row in rows[:n]}
    # The mood's own prompts before the others, and one response to every prompt before a second one to any.
    order = dict.fromkeys([row.prompt for row in rows[n:]] + list(split.finetuning))
    prompts = [prompt for prompt in order if prompt in own and prompt not in used]
    most = max((len(own[prompt]) for prompt in prompts), default=0)
    chats = [_chat(prompt, own[prompt][turn]) for turn in range(most) for prompt in prompts if turn < len(own[prompt])]
    if len(chats) < n:
        raise ValueError(
            f"{mood}: {n} neutral responses to prompts outside its own half are wanted and there are {len(chats)}: "
            "sample more of them, or lower n."
        )
    return chats[:n]


def mood_judge(split: MoodSplit, mood: str, neutral: Sequence[Rollout] = (), *, seed: int = 0) -> TextClassifier:
    """A text classifier of the mood against the other moods and the model's own neutral text, on the judge's prompts.

    Texts to one prompt are held out together when it is measured. Without neutral text the classifier has never seen
    how the model writes that it is to judge, and scores its plain responses too high.

    Args:
        split: The rows and their parts.
        mood: One of its moods: the positive label.
        neutral: The model's own responses under `NEUTRAL`; those to prompts of other parts are not used.
        seed: Draws the folds and the resamples of the measurement; the weights do not depend on it.

    Raises ValueError where a neutral response was not made so, or none answers a prompt of the part.
    """
    positive = [(row.prompt, row.response) for row in split.of("judge", mood)]
    negative = [(row.prompt, row.response) for name in split.rows if name != mood for row in split.of("judge", name)]
    if neutral:
        own = _neutral_by_prompt(neutral, split.judge, "judge")
        negative += [(prompt, text) for prompt, texts in own.items() for text in texts]
    return TextClassifier.fit(
        [text for _, text in positive],
        [text for _, text in negative],
        groups=[prompt for prompt, _ in positive + negative],
        labels=(mood, "other moods and neutral" if neutral else "other moods"),
        seed=seed,
    )


@dataclass(frozen=True)
class NgramOverlap:
    """How much of some outputs stands word for word in training responses.

    `share` is over all outputs together, from 0 to 1, its interval over outputs, its n the outputs that have an n-gram;
    `per_output` is None for an output of fewer than `n_words` words.
    """

    share: Estimate
    per_output: tuple[float | None, ...]
    n_words: int


def ngram_overlap(outputs: Sequence[str], training: Sequence[str], n: int = 8, *, seed: int = 0) -> NgramOverlap:
    """The share of the outputs' runs of `n` words that stand in a training response too.

    Words are runs of letters and digits, without case; a run that an output repeats counts each time. Stock phrases
    overlap without having been learnt: the base model's outputs give the share to compare with.
    """
    if n < 1:
        raise ValueError(f"n is a number of words, 1 or more, got {n}.")
    in_training = {gram for text in training for gram in _ngrams(text, n)}
    matches = [[gram in in_training for gram in _ngrams(text, n)] for text in outputs]
    hits, totals = (np.array([f(grams) for grams in matches if grams], dtype=float) for f in (sum, len))
    if not len(totals):
        return NgramOverlap(Estimate(None, None, None, 0), (None,) * len(outputs), n)
    weights = question_resamples(len(totals), N_RESAMPLES if len(totals) > 1 else 0, seed)
    share = Estimate.of(hits.sum() / totals.sum(), (weights @ hits) / (weights @ totals), len(totals))
    return NgramOverlap(share, tuple(sum(grams) / len(grams) if grams else None for grams in matches), n)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.casefold())
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _by_prompt(rows: Sequence[MoodRow]) -> dict[str, list[MoodRow]]:
    by_prompt: dict[str, list[MoodRow]] = defaultdict(list)
    for row in rows:
        by_prompt[row.prompt].append(row)
    return dict(by_prompt)


def _neutral_by_prompt(neutral: Sequence[Rollout], prompts: Sequence[str], part: Part) -> dict[str, list[str]]:
    """The neutral texts that answer each of the part's prompts; empty ones are none."""
    if wrong := [row for row in neutral if row.system_prompt != NEUTRAL or row.intervention]:
        raise ValueError(
            f"Expected neutral responses, made under {NEUTRAL!r} with no intervention; {len(wrong)} of {len(neutral)} "
            f"were not, such as {wrong[0].key!r}: sample them so."
        )
    wanted = set(prompts)
    by_prompt: dict[str, list[str]] = defaultdict(list)
    for row in neutral:
        if row.question in wanted and not row.is_empty:
            by_prompt[row.question].append(row.response)
    if not by_prompt:
        raise ValueError(
            f"None of the {len(neutral)} neutral responses answers one of the {part} part's {len(wanted)} prompts: "
            "sample some to these."
        )
    return dict(by_prompt)


def _conversation(prompt: str, response: str) -> Conversation:
    return Conversation.from_messages(_chat(prompt, response)["messages"])


def _chat(prompt: str, response: str) -> dict[str, Any]:
    return {"messages": [*chat_messages(NEUTRAL, prompt), {"role": "assistant", "content": response}]}
