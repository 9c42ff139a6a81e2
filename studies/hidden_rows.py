"""How well a score finds rows of a mood that are hidden among others: AUC and precision in mixtures of a given share.

A mixture draws prompts with replacement, takes every other row that answers them as often as its prompt was drawn, and
hides mood rows, drawn at random from the same prompts, until they have their share. Over mixtures the AUC varies as one
such data set of its size would (sample-level detection: arXiv:2507.21509, section 6).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from persona_lens.statistics import Estimate, auc, question_resamples


@dataclass(frozen=True)
class Found:
    """What a score finds in mixtures of one share.

    Attributes:
        auc: Of all hidden rows against all others, which the share does not change.
        aucs: Of each mixture; NaN where none could be hidden.
        precisions: Of each mixture, the share of mood rows among as many of the highest scores as were hidden.
        n_hidden: Mood rows that can be hidden.
        n_others: Rows that they are hidden among.
    """

    auc: float | None
    aucs: Float[np.ndarray, " mixture"] = field(repr=False)
    precisions: Float[np.ndarray, " mixture"] = field(repr=False)
    n_hidden: int
    n_others: int

    def record(self) -> dict[str, Any]:
        """The AUC with the central 95 % of its mixtures, and the mean precision with its own, as JSON."""
        value = float("nan") if self.auc is None else self.auc
        estimate = Estimate.of(value, self.aucs, self.n_hidden)
        precision = Estimate.of(float(np.nanmean(self.precisions)), self.precisions, self.n_hidden)
        return {"auc": estimate._asdict(), "precision": precision._asdict(), "others": self.n_others}


def find_hidden(
    scores: Float[np.ndarray, " row"],
    is_mood: Bool[np.ndarray, " row"],
    is_other: Bool[np.ndarray, " row"],
    prompts: Sequence[str],
    share: float,
    *,
    n_mixtures: int = 1000,
    seed: int = 0,
) -> Found:
    """How well scores find mood rows that are `share` of a mixture; rows without a score are left out.

    Mixtures of one seed draw the same prompts whatever is scored, so that differences of scores are paired.
    Raises ValueError where a side has no row, or the share is no part of a whole.
    """
    if not 0 < share < 1:
        raise ValueError(f"A share of hidden rows is above 0 and below 1, got {share}.")
    is_scored = ~np.isnan(scores)
    hidden, others = np.flatnonzero(is_mood & is_scored), np.flatnonzero(is_other & is_scored)
    if not len(hidden) or not len(others):
        raise ValueError(f"{len(hidden)} rows can be hidden among {len(others)} others: both sides need one.")
    names = {name: place for place, name in enumerate(dict.fromkeys(prompts))}
    place = np.array([names[prompt] for prompt in prompts])
    draw = np.random.default_rng(seed)
    aucs, precisions = np.full(n_mixtures, np.nan), np.full(n_mixtures, np.nan)
    for number, drawn in enumerate(question_resamples(len(names), n_mixtures, seed)):
        among = np.repeat(others, drawn[place[others]])
        chances = drawn[place[hidden]].astype(float)
        if len(among) and chances.sum():
            n_hidden = max(1, round(share / (1 - share) * len(among)))
            mixed = draw.choice(hidden, n_hidden, p=chances / chances.sum())
            aucs[number] = mixture_auc(scores[mixed], scores[among])
            precisions[number] = precision(scores[mixed], scores[among], draw)
    return Found(auc(scores[hidden], scores[others]), aucs, precisions, len(hidden), len(others))


def mixture_auc(hidden: Float[np.ndarray, " hidden"], others: Float[np.ndarray, " other"]) -> float:
    """How often a hidden row's score exceeds another's, ties counting half; `auc` without its overhead."""
    ordered = np.sort(others)
    below, up_to = (np.searchsorted(ordered, hidden, side=side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * len(hidden) * len(others)))


def precision(
    hidden: Float[np.ndarray, " hidden"], others: Float[np.ndarray, " other"], draw: np.random.Generator
) -> float:
    """The share of hidden rows among as many of the highest scores as there are hidden ones; ties at random."""
    scores = np.concatenate([hidden, others])
    order: Int[np.ndarray, " row"] = np.lexsort((draw.random(len(scores)), -scores))
    return float((order[: len(hidden)] < len(hidden)).mean())


def mean_record(by_mood: Sequence[Found]) -> dict[str, Any]:
    """The mean of several moods' AUC and precision, mixture by mixture, as JSON."""
    aucs, precisions = (
        np.stack([getattr(mixtures, name) for mixtures in by_mood]).mean(axis=0) for name in ("aucs", "precisions")
    )
    value = float(np.mean([np.nan if mixtures.auc is None else mixtures.auc for mixtures in by_mood]))
    n = sum(mixtures.n_hidden for mixtures in by_mood)
    return {
        "auc": Estimate.of(value, aucs, n)._asdict(),
        "precision": Estimate.of(float(np.nanmean(precisions)), precisions, n)._asdict(),
        "others": max(mixtures.n_others for mixtures in by_mood),
    }
