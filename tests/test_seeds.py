"""What is drawn at random depends on its seed, and on nothing else: equal seeds give equal results, others do not."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from persona_lens.evaluation.dose_response import random_directions
from persona_lens.finetuning.dataset import prompted
from persona_lens.finetuning.training import _seed_global_generators
from persona_lens.interop.sparse_autoencoders import _random_cosine
from persona_lens.judges.likelihood_ratio import shuffle_words
from persona_lens.models.scopes import global_randomness_kept
from persona_lens.monitoring.experiment import many_shot
from persona_lens.monitoring.transcripts import Transcript
from persona_lens.statistics import mean_estimate, question_resamples
from persona_lens.traits.trait import load_trait
from persona_lens.vectors.direction_statistics import direction_metrics
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.vector_cases import balanced_design, planted_rows, random_tensor

VECTOR = PersonaVectors.from_directions(random_tensor(3, 6, seed=2), trait="evil").at(1)
SCORES = np.random.default_rng(7).normal(size=40)


def metrics(name):
    design = balanced_design()
    return lambda seed: direction_metrics(planted_rows(design, 0.7), design, n_resamples=30, n_placebo=9, seed=seed)[
        name
    ]


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
    "examples before a question": examples,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_equal_seeds_give_equal_results_and_other_seeds_other_ones(draw):
    found = [draw(seed) for seed in (1, 2, 3)]
    assert found == [draw(seed) for seed in (1, 2, 3)]
    assert found[0] != found[1] != found[2] != found[0]
