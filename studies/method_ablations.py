"""What each choice of the method is worth: the keep rule, how many pairs and questions, where to read, which direction.

The rollouts of one extraction are used over and over; every variant is held against the method as it is by the same
three measures: the cosine of the directions of two halves of its questions, how well it tells the kept responses to
held-out questions apart, and what steering by it does at equal norm (arXiv:2507.21509, sections 2.2 and 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from persona_lens.activations.means import stream_means
from persona_lens.evaluation.evaluate import Evaluation, evaluate_cells
from persona_lens.judges.scores import Judge, ScoredRollout, scorable_questions
from persona_lens.models.structure import Model
from persona_lens.rollouts.engines import Cell, CellEngine, ModelEngine
from persona_lens.statistics import Estimate, auc, question_resamples, resampled_auc
from persona_lens.storage.files import refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import Trait
from persona_lens.vectors.persona_vector import PersonaVector, Position
from persona_lens.vectors.persona_vectors import PersonaVectors
from studies.method_variants import (
    BASELINE,
    JudgedPair,
    Variant,
    chosen_pairs,
    fitted_direction,
    judged_pairs,
    method_variants,
)

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
HALVES, RESAMPLES = 50, 500
MIN_QUESTIONS = 3
"""A variant of fewer has no halves, and nothing is left where one is held out: it is told, and not measured."""
NOTHING = Estimate(None, None, None, 0)


class Measured(NamedTuple):
    """One variant with its three measures.

    Attributes:
        variant: What was made otherwise.
        pairs: How many pairs its direction was made from.
        cosine: To the direction of the method as it is.
        split_half: Cosine of the directions of two halves of the questions.
        held_out_auc: How well responses to held-out questions are told apart.
        auc_gain: That minus the same of the method as it is, paired over questions.
        effect: Change of the trait score under steering at equal norm.
        effect_gain: That minus the same of the method as it is, paired over questions.
        coherence: Under steering.
    """

    variant: Variant
    pairs: int
    cosine: float | None
    split_half: Estimate
    held_out_auc: Estimate
    auc_gain: Estimate
    effect: Estimate
    effect_gain: Estimate
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
        for measured in self.measured:
            row: dict[str, Any] = {
                "choice": measured.variant.choice,
                "variant": measured.variant.name,
                "pairs": measured.pairs,
            }
            row["cosine"] = measured.cosine
            for name in ("split_half", "held_out_auc", "auc_gain", "effect", "effect_gain", "coherence"):
                estimate: Estimate = getattr(measured, name)
                row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            rows.append(row)
        return pandas.DataFrame(rows).set_index("variant")

    def summary(self) -> dict[str, Any]:
        """Everything as JSON."""
        head = {"format_version": FORMAT_VERSION, "trait": self.trait, "layer": self.layer}
        rows = self.table().reset_index().astype(object)
        records = rows.where(rows.notna(), None).to_dict("records")
        return {**head, "coefficient": self.coefficient, "variants": records}


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

    Limits: variants share rollouts and questions, so they are told apart by `auc_gain` and `effect_gain`, which are
    paired, and not by whether their own intervals overlap; held-out AUC is taken on the responses that the method as
    it is has kept, and on their means, whatever a variant was made from.
    Raises FileNotFoundError where `run` holds no extraction, ValueError where too few of its pairs were kept.
    """
    refuse_other_json(Path(output) / "method_ablations.json", ("format_version", "trait", "variants"))
    vector = PersonaVectors.load(Path(run) / "vectors.safetensors").at(layer)
    rows, pairs = judged_pairs(Path(run), trait)
    variants = method_variants(len(trait.instructions), len({pair.question for pair in pairs}))
    pairs_of = {variant: chosen_pairs(variant, pairs) for variant in variants}
    fitted = [variant for variant in variants if len({pair.question for pair in pairs_of[variant]}) >= MIN_QUESTIONS]
    if BASELINE not in fitted:
        raise ValueError(f"{trait.name}: kept pairs of {MIN_QUESTIONS} questions are needed: sample more rollouts.")
    read: set[Position] = {variant.position for variant in fitted}
    means: dict[Position, np.ndarray] = {position: _means(model, rows, layer, position) for position in read}
    directions = {variant: fitted_direction(variant, pairs_of[variant], means[variant.position]) for variant in fitted}
    cells = {variant: Cell(_at_norm(vector, directions[variant]), coefficient) for variant in fitted}
    by_name = {cell.name: cell for cell in cells.values()}
    plain, *evaluations = evaluate_cells(
        CellEngine(ModelEngine(model, max_new_tokens, batch_size=120), by_name),
        trait,
        judge=judge,
        questions=scorable_questions(judge, trait, trait.evaluation_questions if questions is None else questions),
        folder=Path(output),
        name="ablations",
        seed=seed,
        progress=progress,
    )
    evaluation_of = dict(zip(by_name, evaluations, strict=True))
    steered = {variant: evaluation_of[cell.name] for variant, cell in cells.items()}
    aucs = {variant: _held_out_auc(variant, pairs_of[variant], pairs, means, seed) for variant in fitted}
    measured = tuple(
        Measured(
            variant,
            len(pairs_of[variant]),
            float(_unit(directions[variant]) @ _unit(directions[BASELINE])),
            _split_half(variant, pairs_of[variant], means[variant.position], seed),
            aucs[variant].estimate,
            aucs[variant].minus(aucs[BASELINE]),
            _change(plain, steered[variant]),
            _change(steered[BASELINE], steered[variant]),
            steered[variant].coherence,
        )
        if variant in steered
        else Measured(variant, len(pairs_of[variant]), None, *[NOTHING] * 6)
        for variant in variants
    )
    result = MethodAblations(trait.name, layer, coefficient, measured)
    write_json(Path(output) / "method_ablations.json", result.summary())
    return result


def _means(
    model: Model, rows: Sequence[ScoredRollout], layer: int, position: Position
) -> Float[np.ndarray, "row d_model"]:
    tokens = [row.rollout.conversation().tokenize(model.tokenizer) for row in rows]
    means = np.empty((len(rows), int(model.cfg.d_model)))
    for batch in stream_means(model, tokens, position=position):
        means[batch.rows] = batch.means[:, layer + 1].double().numpy()
    return means


def _at_norm(vector: PersonaVector, direction: Float[np.ndarray, " d_model"]) -> PersonaVector:
    """The direction as a vector of equal norm."""
    return replace(vector, direction=torch.from_numpy(_unit(direction) * vector.norm).float())


def _unit(direction: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, " d_model"]:
    return direction / np.linalg.norm(direction)


def _split_half(
    variant: Variant, pairs: Sequence[JudgedPair], means: Float[np.ndarray, "row d_model"], seed: int
) -> Estimate:
    """Mean cosine of the directions of two random halves of the questions, and its central 95 %."""
    questions = list(dict.fromkeys(pair.question for pair in pairs))
    draw, cosines = np.random.default_rng(seed), []
    for _ in range(HALVES):
        chosen = {questions[place] for place in draw.permutation(len(questions))[: len(questions) // 2]}
        halves = [[pair for pair in pairs if (pair.question in chosen) is side] for side in (True, False)]
        one, other = (_unit(fitted_direction(variant, half, means)) for half in halves)
        cosines.append(float(one @ other))
    return Estimate.of(float(np.mean(cosines)), np.array(cosines), len(questions))


class _Resampled(NamedTuple):
    """A number, the same over the same resamples of the questions as all others, and how many rows it is of."""

    value: float
    resamples: Float[np.ndarray, " resample"]
    n: int

    @property
    def estimate(self) -> Estimate:
        return Estimate.of(self.value, self.resamples, self.n)

    def minus(self, other: "_Resampled") -> Estimate:
        return Estimate.of(self.value - other.value, self.resamples - other.resamples, self.n)


def _held_out_auc(
    variant: Variant,
    own: Sequence[JudgedPair],
    pairs: Sequence[JudgedPair],
    means: dict[Position, np.ndarray],
    seed: int,
) -> _Resampled:
    """How well kept responses to a question are told apart by the direction of all other questions; over questions."""
    judged = [pair for pair in pairs if pair.is_kept]
    centred = means["response_mean"] - means["response_mean"].mean(axis=0)
    questions = list(dict.fromkeys(pair.question for pair in judged))
    sides: dict[str, list[float]] = {"positive": [], "negative": []}
    groups: list[int] = []
    for number, question in enumerate(questions):
        others = [pair for pair in own if pair.question != question]
        unit = _unit(fitted_direction(variant, others, means[variant.position]))
        for pair in judged:
            if pair.question == question:
                sides["positive"].append(float(centred[pair.positive] @ unit))
                sides["negative"].append(float(centred[pair.negative] @ unit))
                groups.append(number)
    positive, negative = (np.array(side) for side in sides.values())
    value = auc(positive, negative)
    weights = question_resamples(len(questions), RESAMPLES, seed)[:, groups]
    resampled = resampled_auc(positive, negative, weights, weights)
    return _Resampled(float("nan") if value is None else value, resampled, 2 * len(judged))


def _change(plain: Evaluation, steered: Evaluation) -> Estimate:
    """One trait score minus another, paired over questions."""
    before, after = plain.trait_score, steered.trait_score
    if before.value is None or after.value is None:
        return NOTHING
    resampled = steered.trait_score_resamples - plain.trait_score_resamples
    return Estimate.of(after.value - before.value, resampled, after.n)
