"""Made-up vectors for the tiny models, and how tests of interventions read the residual stream.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

from typing import Any

import torch

from tests import naive, tiny
from tests.vector_cases import random_tensor

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-10}
IDS = [[5, 17, 100, 33, 8, 250, 61], [9, 9, 40, 41, 42, 7, 300]]
TOKENS = torch.tensor(IDS)


def some_vectors(model, /, trait="evil", seed=0, **parts) -> Any:
    """Random directions of about the size of the tiny models' residual stream."""
    from persona_lens.vectors.persona_vectors import PersonaVectors

    parts = {"embedding": random_tensor(model.cfg.d_model, seed=99)} | parts
    directions = random_tensor(model.cfg.n_layers, model.cfg.d_model, seed=seed)
    return PersonaVectors.from_directions(directions, trait=trait, **parts)


def logits(model, tokens=TOKENS) -> Any:
    with torch.no_grad():
        return model(tokens)


def stream(model, tokens=TOKENS) -> Any:
    """`[layer, batch, pos, d_model]`, read at the hook points by TransformerLens's own hooks, which come after ours."""
    from persona_lens.models.structure import resid_post_name

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return torch.stack([cache[resid_post_name(layer)] for layer in range(model.cfg.n_layers)])


def projections(model, vectors) -> Any:
    """`[layer, batch, pos]`: the stream along each layer's unit vector, in float64."""
    unit = vectors.directions.double() / vectors.directions.double().norm(dim=-1, keepdim=True)
    return torch.einsum("lbpd,ld->lbp", stream(model), unit)


def hooks(model) -> Any:
    """All hooks of the model's modules, also those that run before them."""
    modules = {*model.modules(), *getattr(model, "original_model", model).modules()}
    return tiny.hook_counts(model), sum(len(module._forward_pre_hooks) for module in modules)


def steered_greedy(hf_model, prompt, steps, stops, vectors, coefficients, at) -> list[int]:
    """The text of one row by the reference's rule, decoded without a cache on the plain Hugging Face model.

    `response` is the last prompt token and every later one, `prompt` the prompt's tokens.
    """
    places = {"all": slice(None), "response": slice(len(prompt) - 1, None), "prompt": slice(len(prompt))}[at]
    additions = {
        layer: coefficient * row.double()
        for layer, (row, coefficient) in enumerate(zip(vectors.directions, coefficients, strict=True))
    }
    with naive.added_at(hf_model, additions, places):
        return naive.greedy(hf_model, prompt, steps, stops)
