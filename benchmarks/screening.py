"""Screening on SmolLM2-135M-Instruct: what stopping at a vector's layer saves, against reading it at the last one.

Every way projects the same rows on directions at one layer; the projections have to be those that a plain forward pass
of the whole model gives there, row by row.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.comparison import Claim, Comparison, compare
from benchmarks.extraction import bridge
from benchmarks.steering import random_vectors
from benchmarks.texts import shared_prompts
from benchmarks.timing import Contestant
from persona_lens.chat.batches import ChatTokens
from persona_lens.screening.batches import PlannedRow
from persona_lens.screening.samples import Sample
from persona_lens.screening.scoring import ModelScorer

LAYERS = (4, 9, 14, 19, 24)
EQUAL = 0.9999


def screening_layers(repeats: int) -> list[Comparison]:
    """A unit of rows at each of some layers, and at the last; the time at layer l of n is to be (l + 1) / n + 0.1."""
    model: Any = bridge()
    n_layers = model.cfg.n_layers
    workload = shared_prompts(
        model.tokenizer,
        "24 rows, 64 + 32 to 96 tokens",
        n_prompts=4,
        n_prompt_tokens=64,
        response_lengths=range(32, 97, 12),
    )
    vectors = random_vectors(model)
    rows = [_planned(number, row) for number, row in enumerate(workload.rows)]
    expected = _plain(model, workload.rows, vectors)

    def contestant(layer: int) -> Contestant:
        scorer = ModelScorer(model, [vectors.at(layer)], base="none")

        def run() -> tuple[int, np.ndarray]:
            return layer, np.array([score.response[0] for score in scorer.score(rows)])

        return Contestant(f"layer {layer}", run, model.original_model.get_input_embeddings())

    def agreement(found: tuple[int, np.ndarray]) -> float:
        layer, projections = found
        wanted = expected[:, layer].numpy()
        return float(projections @ wanted / np.linalg.norm(projections) / np.linalg.norm(wanted))

    last = n_layers - 1
    return [
        compare(
            "Screening by layer",
            workload,
            {f"layer {layer}": [contestant(layer)] for layer in (*LAYERS, last)},
            [Claim(f"layer {layer}", f"layer {last}", 1 / ((layer + 1) / n_layers + 0.1)) for layer in LAYERS],
            agreement=agreement,
            minimum=EQUAL,
            repeats=repeats,
        )
    ]


def _planned(number: int, row: Any) -> PlannedRow:
    return PlannedRow(
        Sample(number, "rows", str(number), number + 1, (), ""),
        ChatTokens(tuple(row.prompt), tuple(row.response)),
        wants_base=False,
        cut=False,
        group=number,
        family=number,
    )


@torch.no_grad()
def _plain(model: Any, rows: Any, vectors: Any) -> Tensor:
    """`[row, layer]`: the projection of each row's mean response, one row at a time, by TransformerLens's cache."""
    found = []
    for row in rows:
        tokens = torch.tensor([[*row.prompt, *row.response]])
        _, cache = model.run_with_cache(tokens, names_filter=vectors.hook_names)
        found.append(vectors.project_cache(cache)[:, 0, len(row.prompt) :].mean(dim=-1))
    return torch.stack(found).double()
