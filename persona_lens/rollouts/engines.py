"""Sources of rollouts: what an engine is, and the one that samples from a model in this process.

Knows nothing about files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from persona_lens.captured import CapturedMean, capturing
from persona_lens.chat import chat_messages, render_prompt
from persona_lens.generation import generate
from persona_lens.models import Model, cpu_threads, identify
from persona_lens.rollouts.rows import Prompt, Rollout
from persona_lens.template_date import date_told, fixed_date

_THREADS = re.compile(r", on (\d+) CPU threads?")


def threads_in(name: str) -> int | None:
    """The number of CPU threads that an engine's name states; None where it states none."""
    stated = _THREADS.search(name)
    return None if stated is None else int(stated[1])


def without_threads(name: str) -> str:
    """An engine's name without the number of CPU threads, as versions before 0.2 wrote it."""
    return _THREADS.sub("", name)


@runtime_checkable
class RolloutEngine(Protocol):
    """A source of rollouts: a model in this process, or a server."""

    @property
    def batch_rows(self) -> int:
        """How many prompts it wants at a time."""
        ...

    @property
    def name(self) -> str:
        """What answered, with every setting that shapes the answers; stands in each row, and a resume must match it."""
        ...

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """Answer a batch of prompts, in order."""
        ...


@runtime_checkable
class StreamingEngine(RolloutEngine, Protocol):
    """A source whose answers come one by one, each of them worth keeping as it comes."""

    def answer_each(self, prompts: Sequence[Prompt], *, seed: int) -> Iterator[tuple[int, Rollout]]:
        """(index, answer) of every prompt, in whatever order they come."""
        ...


@runtime_checkable
class CapturingEngine(RolloutEngine, Protocol):
    """A source that can read the mean residual stream of its responses while it samples them."""

    def answer_capturing(
        self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False
    ) -> tuple[list[Rollout], list[CapturedMean | None]]:
        """The answers of `answer`, and the mean over each response's tokens, None for an empty one."""
        ...


@dataclass
class ModelEngine:
    """Samples rollouts from a TransformerLens model with the library's own decode loop."""

    model: Model
    max_new_tokens: int = 1000
    temperature: float = 1.0
    top_p: float = 1.0
    batch_rows: int = 100

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
        """Model, weights, sampling settings and, where a CPU runs it, how many threads it has."""
        threads = cpu_threads(self.model)
        return self._name if threads is None else f"{self._name}, on {threads} CPU thread{'s' * (threads > 1)}"

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """Sample one response a prompt; a row's text depends on its key and the seed, not on its neighbours."""
        return self._answer(prompts, seed, progress)

    def answer_capturing(
        self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False
    ) -> tuple[list[Rollout], list[CapturedMean | None]]:
        """As `answer`, with every response's mean residual stream, read from the passes that sampled it."""
        with capturing(self.model, len(prompts)) as capture:
            answers = self._answer(prompts, seed, progress, read_up_to=int(self.model.cfg.n_layers) - 1)
        return answers, [capture.mean(row) for row in range(len(prompts))]

    def _answer(
        self, prompts: Sequence[Prompt], seed: int, progress: bool, read_up_to: int | None = None
    ) -> list[Rollout]:
        tokenizer = self.model.tokenizer
        with fixed_date():
            date, asked = date_told(tokenizer), [prompt.tokenize(tokenizer).prompt for prompt in prompts]
        completions = generate(
            self.model,
            asked,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            keys=[prompt.randomness for prompt in prompts],
            batch_rows=self.batch_rows,
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
