"""The sentiment lexicon as a judge: the simplest control for a trait such as `optimistic`.

Score = 50 * (1 + compound), with the compound valence of VADER (Hutto & Gilbert, ICWSM 2014): the valences of the words
that its lexicon lists, adjusted for negation, degree and emphasis by rules, sum to s, and compound = s / sqrt(s² + 15).
Knows nothing about traits, models or meaning: whatever the trait is, it counts pleasant and unpleasant English words.
"""

from collections.abc import Sequence
from importlib.metadata import version

from persona_lens.judges.scores import Score
from persona_lens.rollouts.rows import Rollout
from persona_lens.storage.text import missing_package
from persona_lens.traits.trait import Trait


class SentimentJudge:
    """Judges by the VADER sentiment lexicon: 0 unpleasant, 50 neutral, 100 pleasant; gives no coherence.

    Limits: it counts words, so it neither understands a sentence nor notices gibberish; it saturates on long text,
    where a few sentences in one mood already score near 0 or 100; text without a word of its lexicon, in any other
    language than English for instance, scores 50. It knows valence and nothing else, so it is a control for
    valence-like traits (optimistic, impolite) and says nothing about others (sycophantic, hallucinating).
    Source: Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
    ICWSM 2014.

    Raises:
        ImportError: The package vaderSentiment is not installed.
    """

    def __init__(self, *, batch_size: int = 1000):
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise missing_package("SentimentJudge", "vaderSentiment", extra="embedded") from error
        self.batch_size = batch_size
        self._analyzer = SentimentIntensityAnalyzer()

    def name(self, trait: Trait) -> str:
        """The lexicon and its version."""
        return f"VADER sentiment lexicon (vaderSentiment {version('vaderSentiment')})"

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """Score rollouts by their responses; an empty one has no score.

        Evidence is the compound valence and the shares of pleasant and unpleasant words.
        """
        return [Score(None, None) if row.is_empty else self._score(row.response) for row in rollouts]

    def _score(self, text: str) -> Score:
        found = self._analyzer.polarity_scores(text)
        evidence = {"compound": found["compound"], "pleasant": found["pos"], "unpleasant": found["neg"]}
        return Score(50 * (1 + found["compound"]), None, evidence)
