"""The method's choices made otherwise: which judged pairs a variant takes, and how they become a direction."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from persona_lens.judges.keep import keep_pairs, pair_rollouts
from persona_lens.judges.scores import ScoredRollout, read_scores
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.traits.trait import Trait
from persona_lens.vectors.persona_vector import Position

Direction = Literal["difference in means", "logistic regression", "linear discriminant"]


@dataclass(frozen=True)
class Variant:
    """The method with one choice made otherwise.

    Attributes:
        name: What is different.
        choice: Which choice that is.
        threshold: Of the keep rule; None keeps every pair whose responses are not empty.
        pairs: Only the first so many instruction pairs; None takes all.
        questions: Only the first so many questions; None takes all.
        position: Which tokens are averaged.
        direction: How the two sides become a direction.
    """

    name: str
    choice: str
    threshold: float | None = 50.0
    pairs: int | None = None
    questions: int | None = None
    position: Position = "response_mean"
    direction: Direction = "difference in means"


BASELINE = Variant("as it is", "-")


def method_variants(n_pairs: int, n_questions: int) -> list[Variant]:
    """The method as it is, and every choice made otherwise, for a trait of so many pairs and questions."""
    fewer_pairs = [count for count in (1, 2, 3) if count < n_pairs]
    fewer_questions = [count for count in (5, 10) if count < n_questions]
    return [
        BASELINE,
        Variant("no filter", "keep rule", threshold=None),
        *(Variant(f"threshold {limit:g}", "keep rule", threshold=limit) for limit in (25.0, 75.0)),
        *(Variant(f"{count} pair{'s' * (count > 1)}", "instruction pairs", pairs=count) for count in fewer_pairs),
        *(Variant(f"{count} questions", "questions", questions=count) for count in fewer_questions),
        Variant("last prompt token", "tokens", position="prompt_last"),
        Variant("prompt mean", "tokens", position="prompt_mean"),
        Variant("logistic regression", "direction", direction="logistic regression"),
        Variant("linear discriminant", "direction", direction="linear discriminant"),
    ]


class JudgedPair(NamedTuple):
    """A judged pair of responses: where its two rows stand, and what it is."""

    positive: int
    negative: int
    question: str
    instruction: int
    is_kept: bool
    scores: tuple[ScoredRollout, ScoredRollout]


def judged_pairs(run: Path, trait: Trait) -> tuple[list[ScoredRollout], list[JudgedPair]]:
    """The rows of all pairs that have two responses, and the pairs."""
    scored = read_scores(run / "scores.jsonl", read_rollouts(run / "rollouts.jsonl"))
    both = [(one, other) for one, other in pair_rollouts(scored) if one is not None and other is not None]
    both = [pair for pair in both if not (pair[0].is_empty or pair[1].is_empty)]
    kept, _ = keep_pairs(both, trait=trait.name, min_pairs=2)
    names = {one.rollout.key for one, _ in kept}
    pairs = []
    for place, pair in enumerate(both):
        row = pair[0].rollout
        pairs.append(JudgedPair(2 * place, 2 * place + 1, row.question, row.instruction or 0, row.key in names, pair))
    return [row for pair in both for row in pair], pairs


def chosen_pairs(variant: Variant, pairs: Sequence[JudgedPair]) -> list[JudgedPair]:
    """The pairs that a variant is made from."""
    questions = list(dict.fromkeys(pair.question for pair in pairs))[: variant.questions]
    instructions = sorted({pair.instruction for pair in pairs})[: variant.pairs]
    some = [pair for pair in pairs if pair.question in questions and pair.instruction in instructions]
    if variant.threshold is None:
        return some
    kept, _ = keep_pairs([pair.scores for pair in some], trait=variant.name, threshold=variant.threshold, min_pairs=0)
    names = {one.rollout.key for one, _ in kept}
    return [pair for pair in some if pair.scores[0].rollout.key in names]


def fitted_direction(
    variant: Variant, pairs: Sequence[JudgedPair], means: Float[np.ndarray, "row d_model"]
) -> Float[np.ndarray, " d_model"]:
    """From the negative side to the positive one; its norm means something for the difference in means alone."""
    sides = [means[[pair.positive for pair in pairs]], means[[pair.negative for pair in pairs]]]
    if variant.direction == "difference in means":
        return sides[0].mean(axis=0) - sides[1].mean(axis=0)
    rows, labels = np.concatenate(sides), np.repeat([1, 0], len(pairs))
    rows = (rows - rows.mean(axis=0)) / rows.std()  # one scale for all features, so that the direction stays one
    fitted: Any = (
        LogisticRegression(max_iter=1000)
        if variant.direction == "logistic regression"
        else LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    )
    return fitted.fit(rows, labels).coef_[0]
