"""The monitoring experiment: does the last prompt token's projection predict how the model then behaves?

Every question is asked under every condition (system prompts from discouraging to encouraging, or a number of examples
in context), answered several times and judged. Each prompt's last token is projected on the unit vector at every layer,
before a word is said. Pearson's correlation of projection and mean trait score is taken over all points, and within
conditions: the mean over conditions of the correlation of their points, without conditions whose scores hardly vary
(standard deviation below 1). Source: arXiv:2507.21509, section 3.3 and appendix C.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from persona_lens.activations.means import stream_means
from persona_lens.chat.templates import fixed_date
from persona_lens.judges.scores import Judge, ScoredRollout, read_scores, score_rollouts
from persona_lens.models.structure import Model
from persona_lens.rollouts.collection import collect_rollouts, keeps_date
from persona_lens.rollouts.engines import ModelEngine, RolloutEngine
from persona_lens.rollouts.rows import Prompt, read_rollouts
from persona_lens.statistics import N_RESAMPLES, Estimate, pearson, question_resamples, resampled_pearson
from persona_lens.storage.files import checked, read_result, refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT, Trait, load_trait
from persona_lens.vectors.persona_vectors import PersonaVectors

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
MIN_SPREAD = 1.0


def system_prompts(trait: Trait | str, questions: Sequence[str], *, per_question: int = 10) -> list[Prompt]:
    """Every question under each of the trait's eight monitoring prompts; ValueError for a trait without any."""
    trait = load_trait(trait) if isinstance(trait, str) else trait
    if not trait.monitoring_prompts:
        raise ValueError(
            f"{trait.name} has no monitoring prompts: add the eight, from discouraging to encouraging, "
            "or have `generate_trait` write them."
        )
    return [
        Prompt(trait.name, "neutral", None, prompt, question, sample, condition=f"system prompt {number}")
        for number, prompt in enumerate(trait.monitoring_prompts, start=1)
        for question in questions
        for sample in range(per_question)
    ]


def many_shot(
    trait: Trait | str,
    questions: Sequence[str],
    examples: Sequence[tuple[str, str]],
    *,
    shots: Sequence[int] = (0, 5, 10, 15, 20),
    per_question: int = 10,
    seed: int = 0,
) -> list[Prompt]:
    """Every question after some number of examples of the trait, (question, answer) pairs, under a neutral prompt.

    Each question has its own random order of the examples of other questions, and a longer context begins with the
    examples of a shorter one. Raises ValueError where there are too few examples.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    if list(shots) != sorted(set(shots)) or not shots or shots[0] < 0:
        raise ValueError(f"shots are different numbers of examples, ascending, got {list(shots)}.")
    shuffled: dict[str, list[tuple[str, str]]] = {}
    for question in questions:
        others = [example for example in examples if example[0] != question]
        if len(others) < shots[-1]:
            raise ValueError(
                f"{trait.name}: {shots[-1]} examples are wanted and {len(others)} are there for {question!r}: "
                "give more judged positive responses, or lower shots."
            )
        shuffled[question] = random.Random(f"{seed} {question}").sample(others, shots[-1])
    neutral = Prompt(trait.name, "neutral", None, NEUTRAL_SYSTEM_PROMPT, "", 0)
    return [
        replace(
            neutral,
            question=question,
            sample=sample,
            condition=f"{count} examples",
            examples=tuple(shuffled[question][:count]),
        )
        for count in shots
        for question in questions
        for sample in range(per_question)
    ]


def judged_examples(folder: str | Path, *, threshold: float = 50.0) -> list[tuple[str, str]]:
    """Examples for `many_shot` from an extraction's folder: (question, answer), one for each question.

    A question's answer is its positive response with the highest trait score; a question is left out where that is
    below `threshold`. Raises FileNotFoundError where the folder holds no judged rollouts.
    """
    scored = read_scores(Path(folder) / "scores.jsonl", read_rollouts(Path(folder) / "rollouts.jsonl"))
    shown = [row for row in scored if row.rollout.polarity == "positive" and (row.trait_score or 0.0) >= threshold]
    best = sorted(shown, key=lambda row: row.trait_score or 0.0)  # the last of a question overwrites the others
    return list({row.rollout.question: (row.rollout.question, row.rollout.response) for row in best}.values())


@dataclass(frozen=True)
class Point:
    """One question in one condition.

    Attributes:
        condition: The condition's name.
        question: The question.
        projections: Of the last prompt token on the unit vector, at every layer.
        trait_score: Mean over the responses that have one, 0 to 100; None where none has.
        scored: Number of responses with a score.
        responses: Number of responses.
    """

    condition: str
    question: str
    projections: tuple[float, ...]
    trait_score: float | None
    scored: int
    responses: int


@dataclass(frozen=True)
class MonitoringExperiment:
    """The points of an experiment. Drawn by `pl.plots.monitoring_experiment` and `pl.plots.layer_correlations`.

    Attributes:
        trait: The trait that was judged, and whose vectors were projected on.
        layer: The layer chosen beforehand; its correlations are the result.
        points: One for each condition and question, conditions in their order.
        settings: Judge, engine, vector and position.
        seed: Seed of the bootstrap.

    Limits: the overall correlation is mostly that of the conditions' means, which one could read from the system prompt
    itself; what a monitor adds shows within conditions.
    """

    trait: str
    layer: int
    points: tuple[Point, ...] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def conditions(self) -> list[str]:
        """Names of the conditions, in order."""
        return list(dict.fromkeys(point.condition for point in self.points))

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.points[0].projections)

    @cached_property
    def compared(self) -> tuple[Point, ...]:
        """The points that have a trait score."""
        return tuple(point for point in self.points if point.trait_score is not None)

    def overall(self, layer: int | None = None) -> Estimate:
        """Pearson over all points, its interval over questions; `n` counts the points."""
        return self._estimate([self.compared], layer)

    def within(self, layer: int | None = None) -> Estimate:
        """Mean over conditions of Pearson over their points, without conditions whose scores hardly vary."""
        return self._estimate(self._varying, layer)

    @cached_property
    def _varying(self) -> list[tuple[Point, ...]]:
        groups = [tuple(point for point in self.compared if point.condition == name) for name in self.conditions]
        return [group for group in groups if group and float(np.std(_scores(group))) >= MIN_SPREAD]

    def _estimate(self, groups: Sequence[Sequence[Point]], layer: int | None) -> Estimate:
        """Mean over groups of points of their correlation."""
        place = {name: index for index, name in enumerate(dict.fromkeys(point.question for point in self.points))}
        weights = question_resamples(len(place), N_RESAMPLES, self.seed)
        values: list[float] = []
        resamples: list[np.ndarray] = []
        for group in groups:
            projections = np.array([point.projections[self.layer if layer is None else layer] for point in group])
            scores = _scores(group)
            correlation = pearson(projections, scores)
            if correlation is not None:
                rows = weights[:, [place[point.question] for point in group]]
                values.append(correlation)
                resamples.append(resampled_pearson(projections, scores, rows))
        if not values:
            return Estimate(None, None, None, 0)
        table = np.ma.masked_invalid(np.stack(resamples)).mean(axis=0).filled(np.nan)
        return Estimate.of(float(np.mean(values)), table, sum(map(len, groups)))

    def curve(self) -> "pandas.DataFrame":
        """Both correlations at every layer, with their intervals: `overall`, `overall_low`, ..., `within_high`."""
        import pandas

        names = [name + end for name in ("overall", "within") for end in ("", "_low", "_high")]
        rows = [(*self.overall(layer)[:3], *self.within(layer)[:3]) for layer in range(self.n_layers)]
        index = pandas.RangeIndex(self.n_layers, name="layer")
        return pandas.DataFrame(rows, index=index, columns=names, dtype=float)

    def table(self) -> "pandas.DataFrame":
        """A row for each condition: its mean projection at the layer, its mean trait score, how many were scored."""
        import pandas

        rows = []
        for name in self.conditions:
            own = [point for point in self.points if point.condition == name]
            scores = [point.trait_score for point in own if point.trait_score is not None]
            rows.append(
                {
                    "condition": name,
                    "projection": float(np.mean([point.projections[self.layer] for point in own])),
                    "trait_score": float(np.mean(scores)) if scores else None,
                    "scored": sum(point.scored for point in own),
                    "responses": sum(point.responses for point in own),
                }
            )
        return pandas.DataFrame(rows).set_index("condition")

    def summary(self) -> dict[str, Any]:
        """The result as JSON; what is undefined is None."""
        return {
            "trait": self.trait,
            "layer": self.layer,
            "overall": self.overall()._asdict(),
            "within": self.within()._asdict(),
            "conditions_within": len(self._varying),
            "conditions": json.loads(self.table().reset_index().to_json(orient="records") or "[]"),
        }

    def __str__(self) -> str:
        missing = len(self.points) - len(self.compared)
        unscored = f"; {missing} points have no score" if missing else ""
        return (
            f"{self.trait}, layer {self.layer}, {len(self.compared)} points of {len(self.conditions)} conditions: "
            f"r {_decimals(self.overall())} overall, {_decimals(self.within())} within "
            f"{len(self._varying)} conditions{unscored}"
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        points = [asdict(point) for point in self.points]
        header = {"format_version": FORMAT_VERSION, "trait": self.trait, "layer": self.layer, "seed": self.seed}
        write_json(Path(path), {**header, "settings": self.settings, "summary": self.summary(), "points": points})

    @classmethod
    def load(cls, path: str | Path) -> "MonitoringExperiment":
        """Read what `save` wrote; FileNotFoundError, or ValueError for a damaged file or another version's."""
        return read_result(
            Path(path), FORMAT_VERSION, cls._from_record, "monitoring experiment", "monitoring_experiment"
        )

    @classmethod
    def _from_record(cls, record: Mapping[str, Any]) -> "MonitoringExperiment":
        points = tuple(_read_point(**row) for row in record["points"])
        counts = {len(point.projections) for point in points}
        if len(counts) != 1:
            raise ValueError("its points have different numbers of layers" if counts else "it has no points")
        layer = checked(record["layer"], int, low=0, high=max(counts) - 1)
        settings, seed = checked(record["settings"], dict), checked(record["seed"], int, low=0)
        return cls(checked(record["trait"], str), layer, points, settings, seed)


def _read_point(
    condition: Any, question: Any, projections: Any, trait_score: Any, scored: Any, responses: Any
) -> Point:
    return Point(
        checked(condition, str),
        checked(question, str),
        tuple(checked(value, float) for value in projections),
        checked(trait_score, float, NoneType, low=0, high=100),
        checked(scored, int, low=0),
        checked(responses, int, low=0),
    )


def _scores(points: Sequence[Point]) -> np.ndarray:
    return np.array([point.trait_score for point in points], dtype=float)


def _decimals(estimate: Estimate) -> str:
    if estimate.value is None:
        return "undefined"
    return f"{estimate.value:.2f}" + ("" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]")


@writes_output
@keeps_date
def monitoring_experiment(
    model: Model,
    vectors: PersonaVectors,
    trait: Trait | str,
    prompts: Sequence[Prompt],
    *,
    judge: Judge,
    layer: int,
    engine: RolloutEngine | None = None,
    max_new_tokens: int = 1000,
    output_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MonitoringExperiment:
    """Answer, judge and project the prompts of `system_prompts` or `many_shot`, or your own.

    Choose `layer` beforehand, as with `select_layer`: the best layer of the curve would be chosen on its own result.
    `output_dir` keeps the rollouts, scores and result (experiment.json); a second call continues where the first
    stopped. Raises ValueError where a vector does not belong to the model, or a prompt is repeated.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    vectors.check(model)
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise ValueError(f"{trait.name}: some of the {len(prompts)} prompts are repeated: pass each once.")
    vector = vectors.at(layer)  # refuses a layer that does not exist, before anything is sampled
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        refuse_other_json(folder / "experiment.json", ("format_version", "trait", "points"))
    engine = ModelEngine(model, max_new_tokens) if engine is None else engine
    rollouts = collect_rollouts(
        engine, prompts, seed=seed, output_file=folder and folder / "rollouts.jsonl", progress=progress
    )
    scored = score_rollouts(
        rollouts, trait, judge=judge, output_file=folder and folder / "scores.jsonl", progress=progress
    )
    settings = {
        "judge": judge.name(trait),
        "engine": engine.name,
        "vector": vector.fingerprint,
        "position": vectors.position,
    }
    experiment = MonitoringExperiment(trait.name, layer, _points(model, vectors, scored), settings, seed)
    if folder is not None:
        experiment.save(folder / "experiment.json")
    return experiment


def _points(model: Model, vectors: PersonaVectors, scored: Sequence[ScoredRollout]) -> tuple[Point, ...]:
    groups: dict[tuple[str, str], list[ScoredRollout]] = {}
    for row in scored:
        groups.setdefault((row.rollout.condition, row.rollout.question), []).append(row)
    tokens = []
    for members in groups.values():
        with fixed_date(members[0].rollout.date):
            tokens.append(members[0].rollout.prompt.tokenize(model.tokenizer))
    projections = torch.empty(len(tokens), vectors.n_layers, dtype=torch.float32)
    for batch in stream_means(model, tokens, position="prompt_last"):
        projections[batch.rows] = vectors.project(batch.means[:, 1:])
    points = []
    for (condition, question), row in zip(groups, projections.tolist(), strict=True):
        members = groups[condition, question]
        scores = [member.trait_score for member in members if member.trait_score is not None]
        mean = sum(scores) / len(scores) if scores else None
        points.append(Point(condition, question, tuple(row), mean, len(scores), len(members)))
    return tuple(points)
