"""Made-up monitoring experiments and projections, for tests of monitoring and of what draws or reads its files."""

import random

import torch

from persona_lens.judges.scores import Score
from persona_lens.monitoring.experiment import MonitoringExperiment, Point


def drawn(n, seed=0, shift=0.0):
    """Normal numbers."""
    generator = random.Random(seed)
    return [generator.gauss(shift, 1) for _ in range(n)]


def points(conditions, questions, projection, score):

    return tuple(
        Point(name, question, tuple(float(projection(c, q)) * (layer + 1) for layer in range(2)), score(c, q), 1, 1)
        for c, name in enumerate(conditions)
        for q, question in enumerate(questions)
    )


def experiment(found, layer=0):

    return MonitoringExperiment("grumpy", layer, found, {"judge": "by hand"})


class LengthJudge:
    """Scores by the number of letters: real texts, and scores that differ."""

    batch_size = 100

    def name(self, trait):
        return "length"

    def score(self, trait, rollouts, *, progress=False):

        return [Score(float(len(row.response) % 101), 90.0) for row in rollouts]


def read(reply):
    """The projections of a watched reply, that of the prompt's last token first."""
    return torch.cat([reply.prompt_projection[None], reply.projections])
