"""Small persona vectors with everything that may be known of them, and the toy models that they may belong to.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import math
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

N_LAYERS, D_MODEL = 4, 6
SEEDS = st.integers(0, 2**16)
FACTORS = st.floats(-100, 100).filter(lambda factor: abs(factor) > 0.01)


class ToyModel(nn.Module):
    """As much of a HookedTransformer as a model's identity is made from."""

    def __init__(self, n_layers=N_LAYERS, d_model=D_MODEL, seed=0, normalization="RMS", centred=False):
        super().__init__()
        embedding = random_tensor(64, d_model, seed=seed)
        self.W_E = nn.Parameter(embedding - embedding.mean(dim=-1, keepdim=True) if centred else embedding)
        self.blocks = nn.ModuleList(nn.LayerNorm(1) for _ in range(n_layers))
        self.tokenizer = None
        self.cfg = SimpleNamespace(
            n_layers=n_layers, d_model=d_model, model_name=f"toy-{seed}", normalization_type=normalization
        )

    @torch.no_grad()
    def finetuned(self):
        for parameter in self.parameters():
            parameter += 0.05 * random_tensor(*parameter.shape, seed=99)
        return self

    @torch.no_grad()
    def with_changed_blocks(self):
        for parameter in self.blocks.parameters():
            parameter += 0.5
        return self


class OtherClassOfToyModel(ToyModel):
    """The same weights under other names, as a bridge has them."""

    def __init__(self):
        super().__init__()
        self.wrapped = self.blocks
        self.extra = nn.Parameter(torch.zeros(1))


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_vectors(trait="evil", *, seed=0, **parts) -> Any:
    from persona_lens.vectors.persona_vectors import PersonaVectors

    parts = {"embedding": random_tensor(D_MODEL, seed=seed + 1), "counts": {"positive": 5, "negative": 4}} | parts
    return PersonaVectors(
        trait, random_tensor(N_LAYERS, D_MODEL, seed=seed), random_tensor(N_LAYERS, seed=seed + 2).abs() + 1, **parts
    )


def make_provenance(model: Any = None, **parts) -> Any:
    from persona_lens.vectors.provenance import Provenance

    provenance = Provenance.of(model or ToyModel(), settings={"per_question": 10}, template_hash="abc")
    return replace(provenance, **parts)


def make_statistics(*, n_layers=N_LAYERS, embedding=True) -> Any:
    """One undefined number among the layers, and one in the embedding row."""
    from persona_lens.vectors.direction_statistics import LayerStatistics

    names = [field.name for field in fields(LayerStatistics)][:9]
    by_layer = {name: random_tensor(n_layers, seed=seed).sigmoid() for seed, name in enumerate(names)}
    by_layer["split_half"][2] = math.nan
    row = dict.fromkeys(names, 0.1) | {"split_half": math.nan}
    return LayerStatistics(**by_layer, n_questions=3, n_rows=9, seed=7, embedding=row if embedding else None)


def slow_projection(activation, direction):
    length = math.sqrt(sum(float(x) ** 2 for x in direction))
    return sum(float(a) * float(x) for a, x in zip(activation, direction, strict=True)) / length


def assert_same_bits(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert left.numpy().tobytes() == right.numpy().tobytes()


def balanced_design(n_questions=8, n_instructions=2, n_samples=3) -> Any:
    from persona_lens.vectors.direction_statistics import Design

    rows = [
        (f"q{question}", f"i{instruction}", side)
        for question in range(n_questions)
        for instruction in range(n_instructions)
        for side in (True, False)
        for _ in range(n_samples)
    ]
    return Design(*map(tuple, zip(*rows, strict=True)))


def planted_rows(design, strength, seed=0):
    """Noise, plus `strength` along the first axis where a row is positive."""
    rows = np.random.default_rng(seed).normal(size=(len(design.positive), 8))
    rows[:, 0] += strength * np.array(design.positive)
    return rows
