"""Two judges as one."""

import pytest


def rollout(response):
    from persona_lens.rollouts.rows import Rollout

    return Rollout("optimistic", "neutral", None, "Be kind.", "How are you?", 0, response, None, "stop", "by hand", 0)


class Fixed:
    """A judge that always gives one score."""

    batch_size = 10

    def __init__(self, score, questions=None):
        self.given = score
        if questions is not None:
            self.used_questions = lambda trait: questions

    def name(self, trait):
        return f"always {self.given.trait_score}"

    def score(self, trait, rollouts, *, progress=False):
        return [self.given for _ in rollouts]


@pytest.fixture
def combined():
    from persona_lens.judges.scores import CombinedJudge, Score

    first, second = Score(80.0, None, {"terms": 3.0}), Score(10.0, 95.0, {"nll": 2.0})
    return CombinedJudge(Fixed(first, ("a", "b")), Fixed(second, ("b", "c")))


def test_the_trait_is_the_first_judges_and_coherence_the_seconds(combined):
    from persona_lens.traits.trait import load_trait

    [score] = combined.score(load_trait("optimistic"), [rollout("Well.")])

    assert (score.trait_score, score.coherence) == (80.0, 95.0)
    assert dict(score.evidence) == {"terms": 3.0, "nll": 2.0}


def test_its_name_is_both_names(combined):
    from persona_lens.traits.trait import load_trait

    assert combined.name(load_trait("optimistic")) == "trait by always 80.0; coherence by always 10.0"


def test_questions_that_either_was_fitted_on_are_not_scored(combined):
    from persona_lens.judges.scores import scorable_questions
    from persona_lens.traits.trait import load_trait

    assert scorable_questions(combined, load_trait("optimistic"), ["a", "b", "c", "d"]) == ["d"]


def test_a_judge_that_was_fitted_on_nothing_adds_no_questions():
    from persona_lens.judges.scores import CombinedJudge, Score
    from persona_lens.traits.trait import load_trait

    judge = CombinedJudge(Fixed(Score(1.0, None)), Fixed(Score(1.0, 2.0)))

    assert judge.used_questions(load_trait("optimistic")) == ()
