"""Engines, the sources of rollouts: a TransformerLens model, plain or steered."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from persona_lens.chat.batches import chat_messages, render_prompt
from persona_lens.chat.templates import date_told, fixed_date
from persona_lens.generation.capture import CapturedMean, capturing
from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.positions import NamedPositions
from persona_lens.interventions.values import Intervention, Steer
from persona_lens.models.structure import Model, cpu_threads, identify
from persona_lens.rollouts.rows import Prompt, Rollout
from persona_lens.vectors.persona_vector import PersonaVector

_THREADS = re.compile(r", on (\d+) CPU threads?")


def threads_in(name: str) -> int | None:
    """The number of CPU threads in an engine's name, None without one."""
    match = _THREADS.search(name)
    return None if match is None else int(match[1])


def without_threads(name: str) -> str:
    """An engine's name without the number of CPU threads, which versions before 0.2 did not write."""
    return _THREADS.sub("", name)


@runtime_checkable
class RolloutEngine(Protocol):
    """A source of rollouts: a model in this process, or a server."""

    @property
    def batch_size(self) -> int:
        """Prompts per batch."""
        ...

    @property
    def name(self) -> str:
        """The engine and every setting that shapes responses; each row records it, and a resume must match it."""
        ...

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """One response a prompt, in order."""
        ...


@runtime_checkable
class StreamingEngine(RolloutEngine, Protocol):
    """An engine whose responses come one by one, each of them worth keeping as it comes."""

    def answer_each(self, prompts: Sequence[Prompt], *, seed: int) -> Iterator[tuple[int, Rollout]]:
        """Yield (index, response) of every prompt, in the order in which they come."""
        ...


@runtime_checkable
class CapturingEngine(RolloutEngine, Protocol):
    """An engine that can read the mean residual stream of its responses while it samples them."""

    def answer_capturing(
        self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False
    ) -> tuple[list[Rollout], list[CapturedMean | None]]:
        """As `answer`, with the mean over each response's tokens, None for an empty one."""
        ...


@dataclass
class ModelEngine:
    """Samples rollouts from a TransformerLens model with the library's own decode loop."""

    model: Model
    max_new_tokens: int = 1000
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 100

    def __post_init__(self) -> None:
        identity = identify(self.model)
        folded = render_prompt(self.model.tokenizer, chat_messages("Be kind.", "Who are you?")).system_folded
        self._name = (
            f"{identity.name} ({identity.model_class}, weights {identity.weights_hash}), temperature "
            f"{self.temperature:g}, top_p {self.top_p:g}, at most {self.max_new_tokens} tokens"
            + ", system prompt put before the first user turn (the template has no system turn)"
            * folded
        )

    @property
    def name(self) -> str:
        """Model, weights, sampling settings and, on a CPU, the number of threads."""
        threads = cpu_threads(self.model)
        return self._name if threads is None else f"{self._name}, on {threads} CPU thread{'s' * (threads > 1)}"

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """One response a prompt; a row's text depends on its key and the seed, not on its batch."""
        return self._answer(prompts, seed, progress)

    def answer_capturing(
        self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False
    ) -> tuple[list[Rollout], list[CapturedMean | None]]:
        """As `answer`, with the mean residual stream of each response, read from the passes that sampled it."""
        with capturing(self.model, len(prompts)) as capture:
            answers = self._answer(prompts, seed, progress, read_up_to=int(self.model.cfg.n_layers) - 1)
        return answers, [capture.mean(row) for row in range(len(prompts))]

    def _answer(
        self, prompts: Sequence[Prompt], seed: int, progress: bool, read_up_to: int | None = None
    ) -> list[Rollout]:
        tokenizer = self.model.tokenizer
        with fixed_date():
            date, token_ids = date_told(tokenizer), [prompt.tokenize(tokenizer).prompt for prompt in prompts]
        completions = generate(
            self.model,
            token_ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            keys=[prompt.randomness for prompt in prompts],
            batch_size=self.batch_size,
            progress=progress,
            read_up_to=read_up_to,
        )
        return [
            Rollout(
                **asdict(prompt),
                response=tokenizer.decode(completion.tokens, skip_special_tokens=True),
                response_tokens=completion.tokens,
                finish_reason=completion.finish_reason,
                engine=self.name,
                seed=seed,
                date=date,
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


@dataclass
class _SteeredEngine:
    engine: ModelEngine

    @property
    def batch_size(self) -> int:
        """Rows that are decoded together."""
        return self.engine.batch_size


@dataclass
class IntervenedEngine(_SteeredEngine):
    """Samples rollouts from a model under interventions that are the same for every row."""

    interventions: tuple[Intervention, ...]
    at: NamedPositions = "response"
    allow_other_model: bool = False

    @property
    def name(self) -> str:
        """Model, sampling settings and interventions."""
        interventions = "; ".join(f"{value} [{value.fingerprint}]" for value in self.interventions)
        return f"{self.engine.name}; {interventions}, on {self.at} tokens"

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """One response a prompt, in order."""
        with intervene(self.engine.model, *self.interventions, at=self.at, allow_other_model=self.allow_other_model):
            rows = self.engine.answer(prompts, seed=seed, progress=progress)
        return [replace(row, engine=self.name) for row in rows]


class Cell(NamedTuple):
    """A vector with its steering coefficient."""

    vector: PersonaVector
    coefficient: float

    @property
    def name(self) -> str:
        """The cell's name in files: trait, layer, the vector's fingerprint and the coefficient."""
        vector = self.vector
        return f"{vector.trait} at layer {vector.layer} [{vector.fingerprint}] x {self.coefficient}"


@dataclass
class CellEngine(_SteeredEngine):
    """Samples rollouts whose rows are steered differently, mixed in batches.

    A prompt's `intervention` names the cell that steers its row; an empty name is none. Rows of one question share one
    run of its prompt, and a row's text is the one that it has when sampled under its cell alone.
    """

    cells: Mapping[str, Cell]
    at: NamedPositions = "response"
    allow_other_model: bool = False

    @property
    def name(self) -> str:
        """Model and sampling settings; the cell is in each row."""
        return f"{self.engine.name}; steered on {self.at} tokens"

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """One response a prompt, in order."""
        steered = [(row, self.cells[prompt.intervention]) for row, prompt in enumerate(prompts) if prompt.intervention]
        vectors = {cell.vector.fingerprint: cell.vector for _, cell in steered}
        # One Steer with a column a vector: a row's coefficient is 0 for every vector but its own.
        columns = {fingerprint: column for column, fingerprint in enumerate(vectors)}
        coefficients = torch.zeros(len(prompts), len(vectors), dtype=torch.float32)
        for row, cell in steered:
            coefficients[row, columns[cell.vector.fingerprint]] = cell.coefficient
        with ExitStack() as stack:
            if vectors:
                value = Steer(list(vectors.values()), coefficients)
                context = intervene(self.engine.model, value, at=self.at, allow_other_model=self.allow_other_model)
                stack.enter_context(context)
            rows = self.engine.answer(prompts, seed=seed, progress=progress)
        return [replace(row, engine=self.name) for row in rows]
