"""What each choice of the method is worth: the keep rule, how many pairs and questions, where to read, which direction.

The rollouts of one extraction are used over and over; every variant is held against the method as it is by the same
three measures: the cosine of the directions of two halves of its questions, how well it tells the kept responses to
held-out questions apart, and what steering by it does at equal norm (arXiv:2507.21509, sections 2.2 and 3.2).
Knows nothing about how rollouts were sampled or judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from persona_lens.activations import stream_means
from persona_lens.evaluation import Cell, Evaluation, evaluate_cells
from persona_lens.judges import Judge, ScoredRollout, keep_pairs, pair_rollouts, read_scores, scorable_questions
from persona_lens.locks import writes_output
from persona_lens.models import Model
from persona_lens.records import ensure_writable, write_json
from persona_lens.rollouts import read_rollouts
from persona_lens.statistics import Estimate, auc, question_resamples, resampled_auc
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVector, PersonaVectors, Position

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
HALVES, RESAMPLES = 50, 500
MIN_QUESTIONS = 3
"""A variant of fewer has no halves, and nothing is left where one is held out: it is told, and not measured."""
NOTHING = Estimate(None, None, None, 0)
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
        *(Variant(f"{count} pairs", "instruction pairs", pairs=count) for count in fewer_pairs),
        *(Variant(f"{count} questions", "questions", questions=count) for count in fewer_questions),
        Variant("last prompt token", "tokens", position="prompt_last"),
        Variant("prompt mean", "tokens", position="prompt_mean"),
        Variant("logistic regression", "direction", direction="logistic regression"),
        Variant("linear discriminant", "direction", direction="linear discriminant"),
    ]


class Measured(NamedTuple):
    """One variant with its three measures; `pairs` it was made from, `cosine` to the method as it is."""

    variant: Variant
    pairs: int
    cosine: float | None
    split_half: Estimate
    held_out_auc: Estimate
    effect: Estimate
    coherence: Estimate


@dataclass(frozen=True)
class MethodAblations:
    """Every variant at one layer.

    Attributes:
        trait: The trait.
        layer: Where directions were made and steered by, counted from 0.
        coefficient: By which all were steered, in units of the norm of the method's own direction.
        measured: The variants, the method as it is first.
    """

    trait: str
    layer: int
    coefficient: float
    measured: tuple[Measured, ...]

    def table(self) -> "pandas.DataFrame":
        """A row for each variant, each measure with its 95 % interval."""
        import pandas

        rows = []
        for each in self.measured:
            row: dict[str, Any] = {"choice": each.variant.choice, "variant": each.variant.name, "pairs": each.pairs}
            row["cosine"] = each.cosine
            for name in ("split_half", "held_out_auc", "effect", "coherence"):
                found: Estimate = getattr(each, name)
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append(row)
        return pandas.DataFrame(rows).set_index("variant")

    def summary(self) -> dict[str, Any]:
        """Everything as JSON."""
        head = {"format_version": FORMAT_VERSION, "trait": self.trait, "layer": self.layer}
        rows = self.table().reset_index().astype(object)
        records = rows.where(rows.notna(), None).to_dict("records")
        return {**head, "coefficient": self.coefficient, "variants": records}


class _Pair(NamedTuple):
    """A judged pair of responses: where its two rows stand, and what it is."""

    positive: int
    negative: int
    question: str
    instruction: int
    is_kept: bool
    scores: tuple[ScoredRollout, ScoredRollout]


@writes_output
def method_ablations(
    model: Model,
    trait: Trait,
    run: str | Path,
    *,
    judge: Judge,
    layer: int,
    coefficient: float = 2.0,
    questions: Sequence[str] | None = None,
    max_new_tokens: int = 1000,
    output: str | Path,
    seed: int = 0,
    progress: bool = True,
) -> MethodAblations:
    """Every variant of the method on the rollouts of `run`, the folder of an extraction.

    All directions are scaled to the norm of the run's own and steered by `coefficient` on the trait's evaluation
    questions; `effect` is the change of the trait score against no steering. `output`, a folder, takes the steered
    answers, from which a second call goes on, and method_ablations.json.

    Limits: variants share rollouts, so their differences are surer than the intervals say; held-out AUC is taken on the
    responses that the method as it is has kept, and on their means, whatever a variant was made from.
    Raises FileNotFoundError where `run` holds no extraction, ValueError where too few of its pairs were kept.
    """
    ensure_writable(Path(output) / "method_ablations.json")
    vector = PersonaVectors.load(Path(run) / "vectors.safetensors").at(layer)
    rows, pairs = _judged_pairs(Path(run), trait)
    variants = method_variants(len(trait.instructions), len({pair.question for pair in pairs}))
    chosen = {each: _chosen(each, pairs) for each in variants}
    made = [each for each in variants if len({pair.question for pair in chosen[each]}) >= MIN_QUESTIONS]
    if BASELINE not in made:
        raise ValueError(f"{trait.name}: kept pairs of {MIN_QUESTIONS} questions are needed: sample more rollouts.")
    read: set[Position] = {each.position for each in made}
    means: dict[Position, np.ndarray] = {position: _means(model, rows, layer, position) for position in read}
    directions = {each: _direction(each, chosen[each], means[each.position]) for each in made}
    plain, *found = evaluate_cells(
        model,
        trait,
        judge,
        [Cell(_at_norm(vector, directions[each]), coefficient) for each in made],
        questions=scorable_questions(judge, trait, trait.evaluation_questions if questions is None else questions),
        max_new_tokens=max_new_tokens,
        folder=Path(output),
        name="ablations",
        seed=seed,
        progress=progress,
    )
    steered = dict(zip(made, found, strict=True))
    measured = tuple(
        Measured(
            each,
            len(chosen[each]),
            float(_unit(directions[each]) @ _unit(directions[BASELINE])),
            _split_half(each, chosen[each], means[each.position], seed),
            _held_out_auc(each, chosen[each], pairs, means, seed),
            _change(plain, steered[each]),
            steered[each].coherence,
        )
        if each in steered
        else Measured(each, len(chosen[each]), None, NOTHING, NOTHING, NOTHING, NOTHING)
        for each in variants
    )
    result = MethodAblations(trait.name, layer, coefficient, measured)
    write_json(Path(output) / "method_ablations.json", result.summary())
    return result


def _judged_pairs(run: Path, trait: Trait) -> tuple[list[ScoredRollout], list[_Pair]]:
    """The rows of all pairs that have two responses, and the pairs."""
    scored = read_scores(run / "scores.jsonl", read_rollouts(run / "rollouts.jsonl"))
    both = [(one, other) for one, other in pair_rollouts(scored) if one is not None and other is not None]
    both = [pair for pair in both if not (pair[0].is_empty or pair[1].is_empty)]
    kept, _ = keep_pairs(both, trait=trait.name, min_pairs=2)
    names = {one.rollout.key for one, _ in kept}
    pairs = []
    for place, pair in enumerate(both):
        row = pair[0].rollout
        pairs.append(_Pair(2 * place, 2 * place + 1, row.question, row.instruction or 0, row.key in names, pair))
    return [row for pair in both for row in pair], pairs


def _means(
    model: Model, rows: Sequence[ScoredRollout], layer: int, position: Position
) -> Float[np.ndarray, "row d_model"]:
    tokens = [row.rollout.conversation().tokenize(model.tokenizer) for row in rows]
    found = np.empty((len(rows), int(model.cfg.d_model)))
    for batch in stream_means(model, tokens, position=position):
        found[batch.rows] = batch.means[:, layer + 1].double().numpy()
    return found


def _chosen(variant: Variant, pairs: Sequence[_Pair]) -> list[_Pair]:
    """The pairs that a variant is made from."""
    questions = list(dict.fromkeys(pair.question for pair in pairs))[: variant.questions]
    instructions = sorted({pair.instruction for pair in pairs})[: variant.pairs]
    found = [pair for pair in pairs if pair.question in questions and pair.instruction in instructions]
    if variant.threshold is None:
        return found
    kept, _ = keep_pairs([pair.scores for pair in found], trait=variant.name, threshold=variant.threshold, min_pairs=0)
    names = {one.rollout.key for one, _ in kept}
    return [pair for pair in found if pair.scores[0].rollout.key in names]


def _direction(
    variant: Variant, pairs: Sequence[_Pair], means: Float[np.ndarray, "row d_model"]
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


def _at_norm(vector: PersonaVector, direction: Float[np.ndarray, " d_model"]) -> PersonaVector:
    """The direction as a vector of equal norm."""
    return replace(vector, direction=torch.from_numpy(_unit(direction) * vector.norm).float())


def _unit(direction: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, " d_model"]:
    return direction / np.linalg.norm(direction)


def _split_half(
    variant: Variant, pairs: Sequence[_Pair], means: Float[np.ndarray, "row d_model"], seed: int
) -> Estimate:
    """Mean cosine of the directions of two random halves of the questions, and its central 95 %."""
    questions = list(dict.fromkeys(pair.question for pair in pairs))
    draw, cosines = np.random.default_rng(seed), []
    for _ in range(HALVES):
        chosen = {questions[place] for place in draw.permutation(len(questions))[: len(questions) // 2]}
        halves = [[pair for pair in pairs if (pair.question in chosen) is side] for side in (True, False)]
        one, other = (_unit(_direction(variant, half, means)) for half in halves)
        cosines.append(float(one @ other))
    return Estimate.of(float(np.mean(cosines)), np.array(cosines), len(questions))


def _held_out_auc(
    variant: Variant, own: Sequence[_Pair], pairs: Sequence[_Pair], means: dict[Position, np.ndarray], seed: int
) -> Estimate:
    """How well kept responses to a question are told apart by the direction of all other questions; over questions."""
    judged = [pair for pair in pairs if pair.is_kept]
    centred = means["response_mean"] - means["response_mean"].mean(axis=0)
    questions = list(dict.fromkeys(pair.question for pair in judged))
    sides: dict[str, list[float]] = {"positive": [], "negative": []}
    groups: list[int] = []
    for number, question in enumerate(questions):
        others = [pair for pair in own if pair.question != question]
        unit = _unit(_direction(variant, others, means[variant.position]))
        for pair in judged:
            if pair.question == question:
                sides["positive"].append(float(centred[pair.positive] @ unit))
                sides["negative"].append(float(centred[pair.negative] @ unit))
                groups.append(number)
    positive, negative = (np.array(side) for side in sides.values())
    value = auc(positive, negative)
    weights = question_resamples(len(questions), RESAMPLES, seed)[:, groups]
    resampled = resampled_auc(positive, negative, weights, weights)
    return Estimate.of(float("nan") if value is None else value, resampled, 2 * len(judged))


def _change(plain: Evaluation, steered: Evaluation) -> Estimate:
    """Trait score under steering minus that without, paired over questions."""
    before, after = plain.trait_score, steered.trait_score
    if before.value is None or after.value is None:
        return NOTHING
    resampled = steered.trait_score_resamples - plain.trait_score_resamples
    return Estimate.of(after.value - before.value, resampled, after.n)
