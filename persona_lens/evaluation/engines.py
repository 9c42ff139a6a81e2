"""Sources of rollouts under interventions: the same for every row, or each row steered in its own way.

Knows nothing about judging.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from persona_lens.interventions import Intervention, NamedPositions, Steer, intervene
from persona_lens.rollouts import ModelEngine, Prompt, Rollout
from persona_lens.vectors import PersonaVector


@dataclass
class IntervenedEngine:
    """Samples rollouts from a model under interventions that are the same for every row."""

    engine: ModelEngine
    interventions: tuple[Intervention, ...]
    at: NamedPositions = "response"
    allow_other_model: bool = False

    @property
    def batch_rows(self) -> int:
        """Rows that are decoded together."""
        return self.engine.batch_rows

    @property
    def name(self) -> str:
        """Model, sampling settings and interventions."""
        done = "; ".join(f"{each} [{each.fingerprint}]" for each in self.interventions)
        return f"{self.engine.name}; {done}, on {self.at} tokens"

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """Sample one response a prompt."""
        with intervene(self.engine.model, *self.interventions, at=self.at, allow_other_model=self.allow_other_model):
            answers = self.engine.answer(prompts, seed=seed, progress=progress)
        return [replace(answer, engine=self.name) for answer in answers]


class Cell(NamedTuple):
    """A vector with the coefficient that it steers by."""

    vector: PersonaVector
    coefficient: float

    @property
    def name(self) -> str:
        """What names the cell in files: trait, layer, the vector's fingerprint and the coefficient."""
        vector = self.vector
        return f"{vector.trait} at layer {vector.layer} [{vector.fingerprint}] x {self.coefficient}"


@dataclass
class CellEngine:
    """Samples rollouts whose rows are steered each in its own way, mixed in batches.

    A row is steered by the cell that its prompt's `intervention` names, an empty name being none. Rows of one question
    run its prompt once, and a row's text is the one that it has when sampled under its cell alone.
    """

    engine: ModelEngine
    cells: Mapping[str, Cell]
    at: NamedPositions = "response"
    allow_other_model: bool = False

    @property
    def batch_rows(self) -> int:
        """Rows that are decoded together."""
        return self.engine.batch_rows

    @property
    def name(self) -> str:
        """Model and sampling settings; the cell stands in each row."""
        return f"{self.engine.name}; steered on {self.at} tokens"

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """Sample one response a prompt."""
        steered = [(row, self.cells[prompt.intervention]) for row, prompt in enumerate(prompts) if prompt.intervention]
        vectors = {cell.vector.fingerprint: cell.vector for _, cell in steered}
        column = {fingerprint: index for index, fingerprint in enumerate(vectors)}
        coefficients = torch.zeros(len(prompts), len(vectors), dtype=torch.float32)
        for row, cell in steered:
            coefficients[row, column[cell.vector.fingerprint]] = cell.coefficient
        with ExitStack() as stack:
            if vectors:
                value = Steer(list(vectors.values()), coefficients)
                context = intervene(self.engine.model, value, at=self.at, allow_other_model=self.allow_other_model)
                stack.enter_context(context)
            answers = self.engine.answer(prompts, seed=seed, progress=progress)
        return [replace(answer, engine=self.name) for answer in answers]
