"""Scores of rollouts: what a judge returns, and the append-only file they are kept in beside the rollouts.

Knows nothing about how a judge arrives at a number.
"""

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
from persona_lens.traits.trait import Trait


@dataclass(frozen=True)
class Score:
    """A judgement: trait and coherence from 0 to 100, or None where the judge gave no number; and what it rests on."""

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
    """A rollout with what a judge made of it."""

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
    """Whatever scores rollouts. `name` identifies judge and settings, and a resume must match it."""

    batch_size: int

    def name(self, trait: Trait) -> str:
        """The judge and every setting that shapes its scores of this trait."""
        ...

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """One score a rollout, in order."""
        ...


@runtime_checkable
class StreamingJudge(Protocol):
    """A judge whose scores come one by one, each of them worth keeping as it comes."""

    def score_each(self, trait: Trait, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Score]]:
        """(index, score) of every rollout, in whatever order they come."""
        ...


@runtime_checkable
class DetectingJudge(Protocol):
    """A judge that finds out at its first call how its scores are to be read.

    That is no part of its name, which needs no server; it stands in every row of a file, and a resume reads alike.
    """

    @property
    def reading(self) -> str | None:
        """How scores are read; None where that is not known yet."""
        ...

    def read_as(self, reading: str) -> None:
        """Read scores in this way; raises ValueError where it is known to be another."""
        ...


@runtime_checkable
class CalibratedJudge(Protocol):
    """A judge that was fitted on answers to some questions, which it then may not score."""

    def used_questions(self, trait: Trait) -> tuple[str, ...]:
        """The questions that it was fitted on."""
        ...


def scorable_questions(judge: Judge, trait: Trait, questions: Sequence[str]) -> list[str]:
    """The questions that the judge may score: all but those that it was calibrated on.

    Raises ValueError where none is left.
    """
    used = judge.used_questions(trait) if isinstance(judge, CalibratedJudge) else ()
    left = [question for question in questions if question not in set(used)]
    if not left:
        raise ValueError(
            f"{trait.name}: the judge was calibrated on all {len(questions)} questions: "
            "calibrate it on fewer (calibration_questions=), or pass other questions."
        )
    return left


def score_rollouts(
    judge: Judge,
    trait: Trait,
    rollouts: Sequence[Rollout],
    *,
    output: str | Path | None = None,
    progress: bool = True,
) -> list[ScoredRollout]:
    """Judge rollouts, taking from `output` what is scored there already and appending the rest batch by batch.

    An interrupted batch is judged again whole, so a resumed run has the scores that an uninterrupted one has.
    Raises ValueError where `output` holds scores of these rollouts by another judge or something else than scores,
    OSError where another process writes it.
    """
    file = None if output is None else JsonLines(output)
    if file is not None:
        ensure_writable(file.path)
    with writes_file(None if file is None else file.path):
        name = judge.name(trait)
        done = {} if file is None else _resume(file, {rollout.key for rollout in rollouts}, name, judge)
        with (
            fixed_date(next((row.date for row in rollouts if row.date), "")),
            tqdm(total=len(rollouts), initial=len(done), desc="judge", unit="row", disable=not progress) as bar,
            closing(_fresh(judge, trait, rollouts, done, progress)) as fresh,
        ):
            for scores in fresh:
                if file is not None:
                    reading = {"reading": judge.reading} if isinstance(judge, DetectingJudge) else {}
                    file.append({**_row(key, score, name), **reading} for key, score in scores.items())
                done |= scores
                bar.update(len(scores))
    return [_scored(rollout, done[rollout.key]) for rollout in rollouts]


def unscored(rollouts: Sequence[Rollout], output: str | Path) -> list[Rollout]:
    """The rollouts that have no line in a file of scores yet, whoever the judge was; touches nothing."""
    scored = {str(row.get("key")) for row in JsonLines(output).whole()}
    return [rollout for rollout in rollouts if rollout.key not in scored]


def _fresh(
    judge: Judge, trait: Trait, rollouts: Sequence[Rollout], done: Mapping[str, Score], progress: bool
) -> Generator[dict[str, Score], None, None]:
    """Scores of the rows that are not done: one by one, or from the batches of the whole plan that hold any."""
    if isinstance(judge, StreamingJudge):
        missing = [rollout for rollout in rollouts if rollout.key not in done]
        yield from ({missing[index].key: score} for index, score in judge.score_each(trait, missing))
        return
    for batch in plan_batches(len(rollouts), judge.batch_size):
        members = [rollouts[row] for row in batch]
        wanted = {member.key for member in members} - done.keys()
        if wanted:
            scores = zip(members, judge.score(trait, members, progress=progress), strict=True)
            yield {member.key: score for member, score in scores if member.key in wanted}


FIELDS = ("key", "trait_score", "coherence", "judge")
"""What every row of a file of scores has."""


def _row(key: str, score: Score, judge: str) -> dict[str, Any]:
    values = {"trait_score": score.trait_score, "coherence": score.coherence, "evidence": dict(score.evidence)}
    return {"key": key, **values, "judge": judge}


def _resume(file: JsonLines, keys: set[str], name: str, judge: Judge) -> dict[str, Score]:
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
    """Scores of the given rollouts from a file that `score_rollouts` wrote, by one judge, in the rollouts' order.

    Raises ValueError where a rollout has no line of its own (a None score is a line), or its line is not a score.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No scores at {path}: make them with `persona-lens judge`.")
    rows = enumerate(JsonLines(path).read(), start=1)
    lines = {row["key"]: (row, number) for number, row in rows if isinstance(row.get("key"), str)}
    missing = [rollout.key for rollout in rollouts if rollout.key not in lines]
    if missing:
        raise ValueError(f"{path} has no line for {len(missing)} of {len(rollouts)} rollouts, such as {missing[0]!r}.")
    scores = [_score(lines[rollout.key][0], path, lines[rollout.key][1]) for rollout in rollouts]
    return [_scored(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]


def _scored(rollout: Rollout, score: Score) -> ScoredRollout:
    return ScoredRollout(rollout, score.trait_score, score.coherence, score.evidence)
