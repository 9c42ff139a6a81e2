"""What shifts a persona before it speaks: system prompts from discouraging to encouraging, and examples in context.

The conditions of arXiv:2507.21509, section 3.3 and appendix C, as planned rollouts.
Knows nothing about models or projections.

What a monitoring experiment found: one point for each condition and question, and how its two sides correlate.

Pearson's correlation of the last prompt token's projection with the mean trait score, over all points, and within
conditions: the mean over conditions of the correlation of their points, those whose scores hardly vary (standard
deviation below 1) left out (arXiv:2507.21509, section 3.3 and appendix C).
Knows nothing about models.
Does the prompt give the persona away? The last prompt token's projection against how the model then behaves.

Every condition's prompts are answered several times and judged; each prompt's last token is projected on the unit
vector at every layer, before a word is said (arXiv:2507.21509, section 3.3).
Knows nothing about which conditions these are.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
from persona_lens.storage.files import DAMAGE, checked, refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT, Trait
from persona_lens.vectors.persona_vectors import PersonaVectors

if TYPE_CHECKING:
    import pandas


def system_prompts(trait: Trait, questions: Sequence[str], *, per_question: int = 10) -> list[Prompt]:
    """Every question under each of the trait's eight monitoring prompts, in their order.

    Raises ValueError for a trait without monitoring prompts.
    """
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
    trait: Trait,
    questions: Sequence[str],
    examples: Sequence[tuple[str, str]],
    *,
    shots: Sequence[int] = (0, 5, 10, 15, 20),
    per_question: int = 10,
    seed: int = 0,
) -> list[Prompt]:
    """Every question after so many examples of the trait, (question, answer) pairs, under a neutral system prompt.

    Each question has its own random order of the examples, without those of its own question, and a longer context
    begins with the examples of a shorter one. Raises ValueError where there are too few examples.
    """
    if list(shots) != sorted(set(shots)) or not shots or shots[0] < 0:
        raise ValueError(f"shots are different numbers of examples, ascending, got {list(shots)}.")
    planned: list[Prompt] = []
    shown: dict[str, list[tuple[str, str]]] = {}
    for question in questions:
        others = [example for example in examples if example[0] != question]
        if len(others) < shots[-1]:
            raise ValueError(
                f"{trait.name}: {shots[-1]} examples are wanted and {len(others)} are there for {question!r}: "
                "give more judged positive responses, or lower shots."
            )
        shown[question] = random.Random(f"{seed} {question}").sample(others, shots[-1])
    for count in shots:
        planned += [
            Prompt(
                trait.name,
                "neutral",
                None,
                NEUTRAL_SYSTEM_PROMPT,
                question,
                sample,
                condition=f"{count} examples",
                examples=tuple(shown[question][:count]),
            )
            for question in questions
            for sample in range(per_question)
        ]
    return planned


def judged_examples(folder: str | Path, *, threshold: float = 50.0) -> list[tuple[str, str]]:
    """Examples for `many_shot` from the folder of an extraction: (question, answer), one for each question.

    Of a question's positive responses whose trait score is at least `threshold`, the highest; a question without one is
    left out. Raises FileNotFoundError where the folder holds no judged rollouts.
    """
    scored = read_scores(Path(folder) / "scores.jsonl", read_rollouts(Path(folder) / "rollouts.jsonl"))
    shown = [row for row in scored if row.rollout.polarity == "positive" and (row.trait_score or 0.0) >= threshold]
    best = sorted(shown, key=lambda row: row.trait_score or 0.0)  # of several, the last and highest stays
    return list({row.rollout.question: (row.rollout.question, row.rollout.response) for row in best}.values())


FORMAT_VERSION = 1
MIN_SPREAD = 1.0


@dataclass(frozen=True)
class Point:
    """One question in one condition.

    Attributes:
        condition: The condition's name.
        question: What was asked.
        projections: Of the last prompt token on the unit vector, at every layer.
        trait_score: Mean over the responses that have one, 0 to 100; None where none has.
        scored: How many those are.
        responses: How many there were.
    """

    condition: str
    question: str
    projections: tuple[float, ...]
    trait_score: float | None
    scored: int
    responses: int


@dataclass(frozen=True)
class MonitoringExperiment:
    """The points of an experiment, conditions in their order.

    Attributes:
        trait: The trait that was judged, and whose vectors were projected on.
        layer: The layer that was chosen before; its correlations are the result, those of the others the curve.
        points: One for each condition and question.
        settings: What it was made with: judge, engine, vectors, numbers.
        seed: Seed of the bootstrap.

    Limits: the overall correlation is mostly that of the conditions' means, which a monitor would see in the system
    prompt itself; what it adds shows within conditions.
    """

    trait: str
    layer: int
    points: tuple[Point, ...] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def conditions(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(point.condition for point in self.points))

    @property
    def n_layers(self) -> int:
        """How many layers were projected on."""
        return len(self.points[0].projections)

    @cached_property
    def compared(self) -> tuple[Point, ...]:
        """The points that have a trait score."""
        return tuple(point for point in self.points if point.trait_score is not None)

    def overall(self, layer: int | None = None) -> Estimate:
        """Pearson over all points, its interval over questions; `n` counts the points."""
        return self._estimate([self.compared], layer)

    def within(self, layer: int | None = None) -> Estimate:
        """Mean over conditions of Pearson over their points, those with hardly any spread of scores left out."""
        return self._estimate(self._varied, layer)

    @cached_property
    def _varied(self) -> list[tuple[Point, ...]]:
        groups = [tuple(point for point in self.compared if point.condition == name) for name in self.conditions]
        return [group for group in groups if group and float(np.std(_scores(group))) >= MIN_SPREAD]

    def _estimate(self, groups: Sequence[Sequence[Point]], layer: int | None) -> Estimate:
        """Mean over groups of points of their correlation."""
        place = {name: index for index, name in enumerate(dict.fromkeys(point.question for point in self.points))}
        drawn = question_resamples(len(place), N_RESAMPLES, self.seed)
        values: list[float] = []
        resamples: list[np.ndarray] = []
        for group in groups:
            projections = np.array([point.projections[self.layer if layer is None else layer] for point in group])
            scores = _scores(group)
            found = pearson(projections, scores)
            if found is not None:
                rows = drawn[:, [place[point.question] for point in group]]
                values.append(found)
                resamples.append(resampled_pearson(projections, scores, rows))
        if not values:
            return Estimate(None, None, None, 0)
        table = np.ma.masked_invalid(np.stack(resamples)).mean(axis=0).filled(np.nan)
        return Estimate.of(float(np.mean(values)), table, sum(map(len, groups)))

    def curve(self) -> "pandas.DataFrame":
        """Both correlations at every layer, with their intervals: `overall`, `overall_low`, ..., `within_high`."""
        import pandas

        rows = []
        for layer in range(self.n_layers):
            row: dict[str, float | None] = {}
            for name, found in (("overall", self.overall(layer)), ("within", self.within(layer))):
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append(row)
        return pandas.DataFrame(rows, index=pandas.RangeIndex(self.n_layers, name="layer"), dtype=float)

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
            "conditions_within": len(self._varied),
            "conditions": json.loads(self.table().reset_index().to_json(orient="records") or "[]"),
        }

    def __str__(self) -> str:
        missing = len(self.points) - len(self.compared)
        unscored = f"; {missing} points have no score" if missing else ""
        return (
            f"{self.trait}, layer {self.layer}, {len(self.compared)} points of {len(self.conditions)} conditions: "
            f"r {_decimals(self.overall())} overall, {_decimals(self.within())} within "
            f"{len(self._varied)} conditions{unscored}"
        )

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, whole or not at all."""
        points = [asdict(point) for point in self.points]
        header = {"format_version": FORMAT_VERSION, "trait": self.trait, "layer": self.layer, "seed": self.seed}
        write_json(Path(path), {**header, "settings": self.settings, "summary": self.summary(), "points": points})

    @classmethod
    def load(cls, path: str | Path) -> "MonitoringExperiment":
        """What `save` wrote; raises ValueError where the file is damaged or of another format."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {saved['format_version']}, and this reads {FORMAT_VERSION}")
            points = tuple(_read_point(**row) for row in saved["points"])
            counts = {len(point.projections) for point in points}
            if len(counts) != 1:
                raise ValueError("its points have different numbers of layers" if counts else "it has no points")
            layer = checked(saved["layer"], int, low=0, high=max(counts) - 1)
            settings, seed = checked(saved["settings"], dict), checked(saved["seed"], int, low=0)
            return cls(checked(saved["trait"], str), layer, points, settings, seed)
        except DAMAGE as error:
            raise ValueError(f"{path} is not a monitoring experiment ({error}): run it again.") from error


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


def _decimals(found: Estimate) -> str:
    if found.value is None:
        return "undefined"
    return f"{found.value:.2f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")


@writes_output
@keeps_date
def monitoring_experiment(
    model: Model,
    trait: Trait,
    vectors: PersonaVectors,
    prompts: Sequence[Prompt],
    *,
    judge: Judge,
    layer: int,
    engine: RolloutEngine | None = None,
    max_new_tokens: int = 1000,
    output: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MonitoringExperiment:
    """Answer, judge and project the prompts of `system_prompts` or `many_shot`, or of your own.

    `layer` is the one chosen beforehand, as by `select_layer`: the best of the curve would be chosen on its own result.
    With `output`, a folder, rollouts, scores and the result (experiment.json) are written there, and an interrupted
    run goes on. Raises ValueError where a vector does not belong to the model, or a prompt stands twice.
    """
    vectors.check(model)
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise ValueError(f"{trait.name}: {len(prompts)} prompts are planned and some stand twice: give each one place.")
    vector = vectors.at(layer)  # refuses a layer that there is not, before anything is sampled
    folder = None if output is None else Path(output)
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
    found = MonitoringExperiment(trait.name, layer, _points(model, vectors, scored), settings, seed)
    if folder is not None:
        found.save(folder / "experiment.json")
    return found


def _points(model: Model, vectors: PersonaVectors, scored: Sequence[ScoredRollout]) -> tuple[Point, ...]:
    groups: dict[tuple[str, str], list[ScoredRollout]] = {}
    for row in scored:
        groups.setdefault((row.rollout.condition, row.rollout.question), []).append(row)
    asked = [members[0].rollout for members in groups.values()]
    rows = []
    for each in asked:
        with fixed_date(each.date):
            rows.append(each.prompt.tokenize(model.tokenizer))
    projections = torch.empty(len(rows), vectors.n_layers, dtype=torch.float32)
    for batch in stream_means(model, rows, position="prompt_last"):
        projections[batch.rows] = vectors.project(batch.means[:, 1:])
    return tuple(
        _point(*group, members, row) for (group, members), row in zip(groups.items(), projections.tolist(), strict=True)
    )


def _point(condition: str, question: str, members: Sequence[ScoredRollout], projections: Sequence[float]) -> Point:
    scores = [row.trait_score for row in members if row.trait_score is not None]
    mean = sum(scores) / len(scores) if scores else None
    return Point(condition, question, tuple(projections), mean, len(scores), len(members))
