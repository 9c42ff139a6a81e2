"""Scores of rollouts: the judge's protocol, and the append-only file of scores beside the rollouts."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm.auto import tqdm

from persona_lens.chat.templates import fixed_date
from persona_lens.generation.decoding import plan_batches
from persona_lens.rollouts.rows import Rollout
from persona_lens.statistics import on_scale
from persona_lens.storage.files import DAMAGE, JsonLines, ensure_writable
from persona_lens.storage.locks import writes_file
from persona_lens.traits.trait import Trait, load_trait


@dataclass(frozen=True)
class Score:
    """Trait score and coherence from 0 to 100, None where the judge gave no number, and the numbers behind them."""

    trait_score: float | None
    coherence: float | None
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(type(value) in (int, float) for value in self.evidence.values()):
            raise TypeError(f"evidence is numbers by name, got {self.evidence!r:.80}.")
        for name, value in (("trait_score", self.trait_score), ("coherence", self.coherence)):
            if value is not None and on_scale(value) != value:
                value = on_scale(value)
                object.__setattr__(self, name, value)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{name} is from 0 to 100, or None where the judge gave no number; got {value}.")


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its scores, as in `Score`."""

    rollout: Rollout
    trait_score: float | None
    coherence: float | None
    evidence: Mapping[str, float] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether the trait score is missing because the judge called the response a refusal."""
        return bool(self.evidence.get("trait_refused"))

    @property
    def rejected(self) -> bool:
        """Whether a score is missing because the judge's server did not take the request, such as one too long."""
        return any(self.evidence.get(f"{name}_rejected") for name in ("trait", "coherence"))

    @property
    def is_empty(self) -> bool:
        """Whether the rollout has no response."""
        return self.rollout.is_empty


@runtime_checkable
class Judge(Protocol):
    """Whatever scores rollouts."""

    batch_size: int

    def name(self, trait: Trait) -> str:
        """The judge and every setting that shapes its scores of this trait; a resume must match it."""
        ...

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """One score a rollout, in order."""
        ...


@runtime_checkable
class StreamingJudge(Protocol):
    """A judge whose scores come one by one, each of them worth keeping as it comes."""

    def score_each(self, trait: Trait, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Score]]:
        """Yield (index, score) of every rollout, in the order in which they come."""
        ...


@runtime_checkable
class DetectingJudge(Protocol):
    """A judge that detects at its first call how its answers are read as scores.

    The reading is not part of the name, which needs no server: every row of a file records it, and a resume keeps it.
    """

    @property
    def reading(self) -> str | None:
        """How answers are read, None before it is detected."""
        ...

    def read_as(self, reading: str) -> None:
        """Read answers in this way; raises ValueError where another one is set."""
        ...


@runtime_checkable
class CalibratedJudge(Protocol):
    """A judge that was fitted on answers to some questions, which it then may not score."""

    def used_questions(self, trait: Trait) -> tuple[str, ...]:
        """The questions that it was fitted on."""
        ...


class CombinedJudge:
    """The trait scores of one judge with the coherence of another; evidence is of both.

    For a trait judge that gives no coherence, such as a classifier: the keep rule needs both.
    """

    def __init__(self, trait_judge: Judge, coherence_judge: Judge):
        self.trait_judge, self.coherence_judge = trait_judge, coherence_judge
        self.batch_size = min(trait_judge.batch_size, coherence_judge.batch_size)

    def name(self, trait: Trait) -> str:
        """Both judges."""
        return f"trait by {self.trait_judge.name(trait)}; coherence by {self.coherence_judge.name(trait)}"

    def used_questions(self, trait: Trait) -> tuple[str, ...]:
        """The questions that either judge was fitted on, and which are therefore not scored."""
        judges = [judge for judge in (self.trait_judge, self.coherence_judge) if isinstance(judge, CalibratedJudge)]
        return tuple(dict.fromkeys(question for judge in judges for question in judge.used_questions(trait)))

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """One score a rollout, in order."""
        by_trait = self.trait_judge.score(trait, rollouts, progress=progress)
        by_coherence = self.coherence_judge.score(trait, rollouts, progress=progress)
        return [
            Score(one.trait_score, other.coherence, {**other.evidence, **one.evidence})
            for one, other in zip(by_trait, by_coherence, strict=True)
        ]


def scorable_questions(judge: Judge, trait: Trait, questions: Sequence[str]) -> list[str]:
    """The questions without those that the judge was calibrated on; raises ValueError where none is left."""
    used = set(judge.used_questions(trait) if isinstance(judge, CalibratedJudge) else ())
    scorable = [question for question in questions if question not in used]
    if not scorable:
        raise ValueError(
            f"{trait.name}: the judge was calibrated on all {len(questions)} questions: "
            "calibrate it on fewer (calibration_questions=), or pass other questions."
        )
    return scorable


def score_rollouts(
    rollouts: Sequence[Rollout],
    trait: Trait | str,
    *,
    judge: Judge,
    output_file: str | Path | None = None,
    progress: bool = True,
) -> list[ScoredRollout]:
    """Score rollouts with a judge: take the scores in `output_file`, and append the missing ones batch by batch.

    An interrupted batch is judged again whole, so a resumed run has the scores that an uninterrupted one has.

    Raises:
        ValueError: The file holds scores of these rollouts by another judge, or something else than scores.
        OSError: The file cannot be written, or another process writes it.
    """
    if not isinstance(judge, Judge) or isinstance(rollouts, Judge):
        raise TypeError("Expected score_rollouts(rollouts, trait, judge=judge); before 0.2 the judge came first.")
    trait = load_trait(trait)
    file = None if output_file is None else JsonLines(output_file)
    if file is not None:
        ensure_writable(file.path)
    with writes_file(None if file is None else file.path):
        name = judge.name(trait)
        done = {} if file is None else _resume(file, {rollout.key for rollout in rollouts}, name, judge)
        with (
            fixed_date(next((row.date for row in rollouts if row.date), "")),
            tqdm(total=len(rollouts), initial=len(done), desc="judge", unit="row", disable=not progress) as bar,
            closing(_fresh(judge, trait, rollouts, done, progress)) as batches,
        ):
            for scores in batches:
                if file is not None:
                    reading = {"reading": judge.reading} if isinstance(judge, DetectingJudge) else {}
                    file.append({**_row(key, score, name), **reading} for key, score in scores.items())
                done |= scores
                bar.update(len(scores))
    return [_scored(rollout, done[rollout.key]) for rollout in rollouts]


def unscored(rollouts: Sequence[Rollout], scores: str | Path) -> list[Rollout]:
    """The rollouts without a line in a file of scores, whoever the judge was; writes nothing."""
    scored = {str(row.get("key")) for row in JsonLines(scores).whole()}
    return [rollout for rollout in rollouts if rollout.key not in scored]


def _fresh(
    judge: Judge, trait: Trait, rollouts: Sequence[Rollout], done: Mapping[str, Score], progress: bool
) -> Generator[dict[str, Score], None, None]:
    """Scores of the rows that are not done: one by one, or from those batches of the whole plan that hold any."""
    if isinstance(judge, StreamingJudge):
        missing = [rollout for rollout in rollouts if rollout.key not in done]
        yield from ({missing[index].key: score} for index, score in judge.score_each(trait, missing))
        return
    for indices in plan_batches(len(rollouts), judge.batch_size):
        batch = [rollouts[index] for index in indices]
        if not all(rollout.key in done for rollout in batch):
            scores = zip(batch, judge.score(trait, batch, progress=progress), strict=True)
            yield {rollout.key: score for rollout, score in scores if rollout.key not in done}


FIELDS = ("key", "trait_score", "coherence", "judge")
"""The fields of every row of a file of scores."""


def _row(key: str, score: Score, judge: str) -> dict[str, Any]:
    values = {"trait_score": score.trait_score, "coherence": score.coherence, "evidence": dict(score.evidence)}
    return {"key": key, **values, "judge": judge}


def _resume(file: JsonLines, keys: set[str], name: str, judge: Judge) -> dict[str, Score]:
    """The scores of these rollouts in the file; refuses those of another judge."""
    done: dict[str, Score] = {}
    for number, row in enumerate(file.resume(FIELDS), start=1):
        if not isinstance(row.get("key"), str) or row["key"] not in keys:
            continue
        if row.get("judge") != name:
            raise ValueError(
                f"{file.path}, line {number}, was scored by another judge ({row.get('judge')!r}, now {name!r}). "
                "Choose another output, or move that file away."
            )
        if isinstance(judge, DetectingJudge) and row.get("reading") is not None:
            judge.read_as(str(row["reading"]))
        done[row["key"]] = _score(row, file.path, number)
    return done


def _score(row: Mapping[str, Any], path: Path, number: int) -> Score:
    try:
        return Score(row["trait_score"], row["coherence"], row.get("evidence", {}))
    except DAMAGE as error:
        raise ValueError(f"{path}, line {number}: not a score ({error}).") from error


def read_scores(path: str | Path, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
    """Scores of these rollouts, in their order, from a file that `score_rollouts` wrote.

    Raises ValueError where a rollout has no line (a None score is a line), or its line is not a score.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No scores at {path}: make them with `persona-lens judge`.")
    lines = enumerate(JsonLines(path).read(), start=1)
    by_key = {row["key"]: (row, number) for number, row in lines if isinstance(row.get("key"), str)}
    missing = [rollout.key for rollout in rollouts if rollout.key not in by_key]
    if missing:
        raise ValueError(f"{path} has no line for {len(missing)} of {len(rollouts)} rollouts, such as {missing[0]!r}.")
    scores = [_score(row, path, number) for row, number in (by_key[rollout.key] for rollout in rollouts)]
    return [_scored(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]


def _scored(rollout: Rollout, score: Score) -> ScoredRollout:
    return ScoredRollout(rollout, score.trait_score, score.coherence, score.evidence)
