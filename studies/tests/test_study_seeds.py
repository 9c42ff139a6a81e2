"""What the studies draw at random depends on its seed, and on nothing else."""

import numpy as np
import pytest

from persona_lens.judges.scores import ScoredRollout
from studies.dataset_scores import subset_loss
from studies.dialz_pairs import draw_pairs
from studies.hidden_rows import find_hidden
from studies.method_ablations import _split_half
from studies.method_variants import JudgedPair, Variant
from studies.tests.screening_study_cases import made_up
from tests.evaluation_cases import make_rollout

SCORES = np.random.default_rng(7).normal(size=40)


def rows_of_a_mixture(seed):
    is_mood = np.arange(40) < 20
    found = find_hidden(SCORES, is_mood, ~is_mood, [f"q{n % 10}" for n in range(40)], 0.2, n_mixtures=4, seed=seed)
    return found.aucs.tolist()


def rows_of_mixtures_of_the_same_prompts(seed):
    """One prompt alone: every mixture draws it, and only the rows are drawn."""
    is_mood = np.arange(40) < 20
    found = find_hidden(SCORES, is_mood, ~is_mood, ["q"] * 40, 0.2, n_mixtures=4, seed=seed)
    return found.aucs.tolist()


def halves(seed):
    side = ScoredRollout(make_rollout("Why?", 0), 80.0, 90.0)
    pairs = [JudgedPair(2 * n, 2 * n + 1, f"q{n}", 0, True, (side, side)) for n in range(9)]
    means = np.random.default_rng(1).normal(size=(18, 4))
    return _split_half(Variant("as it is", "-"), pairs, means, seed)


DRAWS = {
    "pairs of answers": lambda seed: draw_pairs(made_up(), 6, seed),
    "subsets of rows": lambda seed: subset_loss(
        list(SCORES[:39].reshape(3, 13)), np.array([0.1, 0.5, 0.4]), 0.3, n_subsets=5, seed=seed
    ),
    "mixtures": rows_of_a_mixture,
    "rows of a mixture": rows_of_mixtures_of_the_same_prompts,
    "halves of the questions": halves,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_equal_seeds_give_equal_results_and_other_seeds_other_ones(draw):
    found = [draw(seed) for seed in (1, 2, 3)]
    assert found == [draw(seed) for seed in (1, 2, 3)]
    assert found[0] != found[1] != found[2] != found[0]
