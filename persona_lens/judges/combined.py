"""Two judges as one: the trait score of the first with the coherence of the second.

For a judge that knows a trait and not whether a text is coherent, such as a classifier: the keep rule needs both.
Knows nothing about either judge.
"""

from collections.abc import Sequence

from persona_lens.judges.scores import CalibratedJudge, Judge, Score
from persona_lens.rollouts import Rollout
from persona_lens.traits import Trait


class CombinedJudge:
    """Takes trait scores from `trait_judge` and coherence from `coherence_judge`; evidence is of both."""

    def __init__(self, trait_judge: Judge, coherence_judge: Judge):
        self.trait_judge, self.coherence_judge = trait_judge, coherence_judge
        self.batch_rows = min(trait_judge.batch_rows, coherence_judge.batch_rows)

    def name(self, trait: Trait) -> str:
        """Both judges, each with what it gives."""
        return f"trait by {self.trait_judge.name(trait)}; coherence by {self.coherence_judge.name(trait)}"

    def used_questions(self, trait: Trait) -> tuple[str, ...]:
        """The questions that either was fitted on, and which are therefore not scored."""
        calibrated = [each for each in (self.trait_judge, self.coherence_judge) if isinstance(each, CalibratedJudge)]
        return tuple(dict.fromkeys(question for each in calibrated for question in each.used_questions(trait)))

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """One score a rollout, in order."""
        traits = self.trait_judge.score(trait, rollouts, progress=progress)
        coherent = self.coherence_judge.score(trait, rollouts, progress=progress)
        return [
            Score(one.trait_score, other.coherence, {**other.evidence, **one.evidence})
            for one, other in zip(traits, coherent, strict=True)
        ]
