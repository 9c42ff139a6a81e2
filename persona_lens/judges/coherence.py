"""Coherence without a server: fluent, and not repeating itself.

100 * sigmoid((m - NLL) / w) * min(1, distinct / floor), with NLL the mean negative log-likelihood per token under the
unsteered model and a neutral system prompt, and `distinct` the share of 4-grams of tokens that are different; m and w
are such that the model's own neutral responses have median 90 and their word-shuffles median 10, and the floor is the
5th percentile of `distinct` among them.
Knows nothing about traits.

Two judges as one: the trait score of the first with the coherence of the second.

For a judge that knows a trait and not whether a text is coherent, such as a classifier: the keep rule needs both.
Knows nothing about either judge.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persona_lens.judges.scores import CalibratedJudge, Judge, Score
from persona_lens.rollouts.rows import Rollout
from persona_lens.traits.trait import Trait

Numbers = Sequence[float] | np.ndarray
LOGIT_90 = math.log(9.0)


@dataclass(frozen=True)
class CoherenceScale:
    """The fitted constants of the scale; `centre` and `width` in nats per token."""

    centre: float
    width: float
    distinct_floor: float

    def score(self, nll: float, distinct: float) -> float:
        """Coherence from 0 to 100 of a response with this NLL per token and share of distinct 4-grams."""
        fluent = 1 / (1 + math.exp(min(700.0, -(self.centre - nll) / self.width)))
        return 100 * fluent * min(1.0, distinct / self.distinct_floor)

    @classmethod
    def fit(cls, clean: Numbers, shuffled: Numbers, distinct: Numbers) -> "CoherenceScale":
        """Constants from the NLLs of neutral responses, of their word-shuffles, and the responses' distinct shares.

        Raises ValueError where shuffling does not raise the median NLL: then NLL cannot measure coherence.
        """
        low, high = float(np.median(clean)), float(np.median(shuffled))
        if not high > low:
            raise ValueError(
                f"Shuffled text is as likely as clean text under this model (median NLL {high:.2f} against {low:.2f}), "
                "so it cannot judge coherence. Use longer responses or another judge."
            )
        floor = max(float(np.percentile(distinct, 5)), 1e-3)
        return cls(centre=(low + high) / 2, width=(high - low) / (2 * LOGIT_90), distinct_floor=floor)


def distinct_four_grams(tokens: Sequence[int]) -> float:
    """The share of 4-grams of tokens that are different; 1 where there are fewer than four tokens."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def shuffle_words(text: str, seed: int) -> str:
    """The text's words in random order."""
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


def loop_words(text: str, n_words: int = 6) -> str:
    """As many words as the text has, its first few over and over."""
    words = text.split()
    return " ".join(words[index % n_words] for index in range(len(words)))


class CombinedJudge:
    """Takes trait scores from `trait_judge` and coherence from `coherence_judge`; evidence is of both."""

    def __init__(self, trait_judge: Judge, coherence_judge: Judge):
        self.trait_judge, self.coherence_judge = trait_judge, coherence_judge
        self.batch_size = min(trait_judge.batch_size, coherence_judge.batch_size)

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
