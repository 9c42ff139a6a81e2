"""What is drawn at random depends on its seed, and on nothing else: equal seeds give equal results, others do not."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from persona_lens.evaluation.dose_response import random_directions
from persona_lens.experiments.dataset_scores import subset_loss
from persona_lens.experiments.dialz_pairs import draw_pairs
from persona_lens.experiments.hidden_rows import find_hidden
from persona_lens.experiments.method_ablations import _split_half
from persona_lens.experiments.method_variants import JudgedPair, Variant
from persona_lens.finetuning.dataset import prompted
from persona_lens.finetuning.training import _seed_global_generators
from persona_lens.interop.sparse_autoencoders import _random_cosine
from persona_lens.judges.likelihood_ratio import shuffle_words
from persona_lens.judges.scores import ScoredRollout
from persona_lens.models.scopes import global_randomness_kept
from persona_lens.monitoring.experiment import many_shot
from persona_lens.monitoring.transcripts import Transcript
from persona_lens.statistics import mean_estimate, question_resamples
from persona_lens.traits.trait import load_trait
from persona_lens.vectors.direction_statistics import direction_metrics
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.test_dialz_pairs import made_up
from tests.test_direction_statistics import balanced_design, planted_rows
from tests.test_likelihood_ratio import answer
from tests.vector_cases import random_tensor

VECTOR = PersonaVectors.from_directions(random_tensor(3, 6, seed=2), trait="evil").at(1)
SCORES = np.random.default_rng(7).normal(size=40)


def metrics(name):
    design = balanced_design()
    return lambda seed: direction_metrics(planted_rows(design, 0.7), design, n_resamples=30, n_placebo=9, seed=seed)[
        name
    ]


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
    side = ScoredRollout(answer("So."), 80.0, 90.0)
    pairs = [JudgedPair(2 * n, 2 * n + 1, f"q{n}", 0, True, (side, side)) for n in range(9)]
    means = np.random.default_rng(1).normal(size=(18, 4))
    return _split_half(Variant("as it is", "-"), pairs, means, seed)


def global_draws(seed):
    with global_randomness_kept(nn.Identity()):
        _seed_global_generators(seed)
        return float(torch.rand(1)), float(np.random.random()), random.random()


def one_global_draw(place):
    return lambda seed: global_draws(seed)[place]


def drawn_prompts(seed):
    chats = [Transcript([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])] * 20
    return [chat.messages[0]["content"] for chat in prompted(chats, ["A.", "B.", "C."], seed=seed)]


def examples(seed):
    pairs = [(f"Why {n}?", f"So {n}.") for n in range(9)]
    return [prompt.examples for prompt in many_shot(load_trait("evil"), ["How?"], pairs, shots=[4], seed=seed)]


DRAWS = {
    **{name: metrics(name) for name in ("placebo_auc_95", "placebo_norm_95", "split_half", "split_half_low")},
    **{name: metrics(name) for name in ("held_out_auc_low", "bootstrap_cosine_low")},
    "resamples": lambda seed: question_resamples(6, 5, seed).tolist(),
    "an interval of a mean": lambda seed: mean_estimate(SCORES, list(range(40)), seed=seed),
    "shuffled words": lambda seed: shuffle_words("a b c d e f g h i", seed),
    "random directions": lambda seed: [each.direction.tolist() for each in random_directions(VECTOR, 2, seed=seed)],
    "a random cosine": lambda seed: _random_cosine(random_tensor(5, 6, seed=1), 4, seed),
    "preventative prompts": drawn_prompts,
    **{name: one_global_draw(place) for place, name in enumerate(("torch's", "numpy's", "Python's"))},
    "pairs of answers": lambda seed: draw_pairs(made_up(), 6, seed),
    "subsets of rows": lambda seed: subset_loss(
        list(SCORES[:39].reshape(3, 13)), np.array([0.1, 0.5, 0.4]), 0.3, n_subsets=5, seed=seed
    ),
    "mixtures": rows_of_a_mixture,
    "rows of a mixture": rows_of_mixtures_of_the_same_prompts,
    "halves of the questions": halves,
    "examples before a question": examples,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_equal_seeds_give_equal_results_and_other_seeds_other_ones(draw):
    found = [draw(seed) for seed in (1, 2, 3)]
    assert found == [draw(seed) for seed in (1, 2, 3)]
    assert found[0] != found[1] != found[2] != found[0]
