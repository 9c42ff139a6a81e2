"""Generation under steering on SmolLM2-135M-Instruct: what it costs, and what mixing the cells of a sweep saves.

Texts are greedy, so that ways to do the same work can be held to the same texts. Directions are random ones of about
the norm that persona vectors of this model have.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.comparison import Claim, Comparison, compare
from benchmarks.extraction import bridge
from benchmarks.texts import Workload
from benchmarks.timing import Contestant
from persona_lens import PersonaVectors, load_trait, steer
from persona_lens.chat.batches import ChatTokens
from persona_lens.generation.decoding import generate
from persona_lens.rollouts.collection import plan_rollouts
from persona_lens.rollouts.engines import Cell, CellEngine, ModelEngine
from persona_lens.rollouts.rows import Prompt

Texts = list[tuple[int, ...]]

OVERHEAD_GOAL = 1 / 1.03
SWEEP_GOAL = 4.0
EQUAL_ROWS = 0.98
"""Greedy texts may part where two tokens are all but equally likely, since batch shapes round differently."""
UNFELT = 1e-6
"""A coefficient that costs what any other costs and changes no text."""


def steering_overhead(repeats: int) -> list[Comparison]:
    """The same greedy texts without steering, with one layer steered, and with a coefficient a row and layer."""
    model, prompts = bridge(), rollout_prompts(8, 4)
    ids = [prompt.tokenize(model.tokenizer) for prompt in prompts]
    vectors = random_vectors(model)
    everywhere = torch.full((len(ids), vectors.n_layers), UNFELT)

    def plain() -> Texts:
        return [done.tokens for done in generate(model, [row.prompt for row in ids], max_new_tokens=32, temperature=0)]

    def under(vector: Any, coefficient: Any) -> Callable[[], Texts]:
        def run() -> Texts:
            with steer(model, vector, coefficient, at="response"):
                return plain()

        return run

    contestants = {
        "unsteered": [contestant("no steering", plain)],
        "one layer": [contestant("one layer", under(vectors.at(19), UNFELT))],
        "matrix": [contestant("row x layer coefficients, 30 layers", under(vectors, everywhere))],
    }
    claims = [Claim(each, "unsteered", OVERHEAD_GOAL) for each in ("one layer", "matrix")]
    name = f"{len(ids)} rows, 8 prompts, 32 new tokens"
    return [compare_texts("Generation under steering", name, ids, 32, contestants, claims, plain(), repeats)]


def layer_sweep(repeats: int) -> list[Comparison]:
    """30 layers x 3 coefficients x 4 questions: rows of all cells mixed, against a call for each cell.

    One round, since a call for each cell takes minutes.
    """
    model, prompts, new_tokens = bridge(), rollout_prompts(4, 1), 24
    ids = [prompt.tokenize(model.tokenizer) for prompt in prompts]
    vectors = random_vectors(model)
    cells = [Cell(vectors.at(layer), amount) for layer in range(vectors.n_layers) for amount in (1.0, 2.0, 4.0)]

    def one_call_a_cell() -> Texts:
        found: list[Texts] = []
        for cell in cells:
            with steer(model, cell.vector, cell.coefficient, at="response"):
                done = generate(model, [row.prompt for row in ids], max_new_tokens=new_tokens, temperature=0)
            found.append([each.tokens for each in done])
        return [texts[question] for question in range(len(ids)) for texts in found]

    def mixed() -> Texts:
        engine = CellEngine(ModelEngine(model, new_tokens, temperature=0, batch_size=120), {c.name: c for c in cells})
        planned = [replace(prompt, intervention=cell.name) for prompt in prompts for cell in cells]
        return [row.response_tokens or () for row in engine.answer(planned, seed=0)]

    contestants = {
        "a call a cell": [contestant("a generate call for each cell", one_call_a_cell)],
        "mixed": [contestant("rows of all cells mixed, 120 at a time", mixed)],
    }
    name = f"{len(cells)} cells x {len(ids)} questions, {new_tokens} new tokens"
    claims = [Claim("mixed", "a call a cell", SWEEP_GOAL)]
    rows = ids * len(cells)
    return [
        compare_texts("Layer sweep", name, rows, new_tokens, contestants, claims, one_call_a_cell(), min(repeats, 1))
    ]


def compare_texts(
    name: str,
    workload: str,
    rows: Sequence[ChatTokens],
    new_tokens: int,
    contestants: dict[str, list[Contestant]],
    claims: list[Claim],
    expected: Texts,
    repeats: int,
    minimum: float = EQUAL_ROWS,
) -> Comparison:
    def equal_rows(found: Texts) -> float:
        return sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)

    generated = tuple(ChatTokens(row.prompt, (0,) * new_tokens) for row in rows)
    work = Workload(workload, generated, (True,) * len(generated))
    return compare(name, work, contestants, claims, agreement=equal_rows, minimum=minimum, repeats=repeats)


def rollout_prompts(n_questions: int, per_question: int) -> list[Prompt]:
    trait = load_trait("optimistic")
    return plan_rollouts(
        trait, polarities=["neutral"], questions=trait.extraction_questions[:n_questions], per_question=per_question
    )


def random_vectors(model: Any) -> PersonaVectors:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(int(model.cfg.n_layers), int(model.cfg.d_model), generator=generator)
    norms = torch.logspace(0.3, 2.0, len(directions))[:, None]
    return PersonaVectors.from_directions(norms * directions / directions.norm(dim=1, keepdim=True), trait="random")


def contestant(name: str, run: Callable[[], Texts]) -> Contestant:
    model: Any = bridge()
    return Contestant(name, run, model.original_model.get_input_embeddings())
