"""Rollouts: the model's answers to a trait's questions under positive, negative and neutral system prompts.

Every extraction question is asked under every instruction, several times, at temperature 1 (arXiv:2507.21509, section
2.2); rows go straight to an append-only JSON-lines file, and a run that was interrupted goes on to the same rows.
Knows nothing about scores or activations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm.auto import tqdm

from persona_lens.chat import ChatTokens, Conversation, chat_messages, render_prompt, tokenize_chat
from persona_lens.generation import generate, plan_batches
from persona_lens.models import Model, identify
from persona_lens.records import JsonLines, ensure_writable
from persona_lens.traits import Polarity, Trait


@dataclass(frozen=True)
class Prompt:
    """One planned rollout: who is asked what, for which time. `instruction` is None for the neutral system prompt.

    `intervention` names what is done to the model for this row, empty for nothing (see `CellEngine`).
    """

    trait: str
    polarity: Polarity
    instruction: int | None
    system_prompt: str
    question: str
    sample: int
    intervention: str = ""

    @property
    def key(self) -> str:
        """What names the row in files."""
        return self.randomness + f" | {self.intervention}" * bool(self.intervention)

    @property
    def randomness(self) -> str:
        """What names the row in sampling: the same under every intervention, so that their texts can be compared."""
        return f"{self.trait}/{self.polarity}/{self.instruction}/{self.sample}/{self.question}"

    def tokenize(self, tokenizer: Any) -> ChatTokens:
        """The rendered prompt as token ids."""
        return tokenize_chat(tokenizer, chat_messages(self.system_prompt, self.question))


@dataclass(frozen=True)
class Rollout:
    """A model's answer. It knows nothing about scores; an empty response is kept as a row and never averaged."""

    trait: str
    polarity: Polarity
    instruction: int | None
    system_prompt: str
    question: str
    sample: int
    response: str
    response_tokens: tuple[int, ...] | None
    finish_reason: str
    engine: str
    seed: int
    intervention: str = ""

    @property
    def prompt(self) -> Prompt:
        """What was asked."""
        return Prompt(**{each.name: getattr(self, each.name) for each in fields(Prompt)})

    @property
    def key(self) -> str:
        """What names the row; see `Prompt.key`."""
        return self.prompt.key

    @property
    def is_empty(self) -> bool:
        """Whether the response holds nothing but white space."""
        return not self.response.strip()

    def tokenize(self, tokenizer: Any, *, system_prompt: str | None = None) -> ChatTokens:
        """The chat as token ids, by default under the system prompt it was sampled with."""
        messages = chat_messages(system_prompt or self.system_prompt, self.question)
        return tokenize_chat(tokenizer, messages, self.response_tokens or self.response)

    def conversation(self) -> Conversation:
        """The row as what extraction takes."""
        messages = tuple(chat_messages(self.system_prompt, self.question))
        response = "" if self.is_empty else self.response_tokens or self.response
        return Conversation(messages, response, self.question, str(self.instruction))


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
        """Model, weights and sampling settings."""
        return self._name

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """Sample one response a prompt; a row's text depends on its key and the seed, not on its neighbours."""
        tokenizer = self.model.tokenizer
        completions = generate(
            self.model,
            [prompt.tokenize(tokenizer).prompt for prompt in prompts],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            keys=[prompt.randomness for prompt in prompts],
            batch_rows=self.batch_rows,
            progress=progress,
        )
        return [
            Rollout(
                **asdict(prompt),
                response=tokenizer.decode(completion.tokens, skip_special_tokens=True),
                response_tokens=completion.tokens,
                finish_reason=completion.finish_reason,
                engine=self.name,
                seed=seed,
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def plan_rollouts(
    trait: Trait,
    *,
    polarities: Sequence[Polarity] = ("positive", "negative"),
    questions: Sequence[str] | None = None,
    per_question: int = 10,
) -> list[Prompt]:
    """Every question under every instruction of each polarity, `per_question` times (neutral has one instruction).

    Questions default to the trait's extraction questions. Source: arXiv:2507.21509, section 2.2.
    """
    if per_question < 1:
        raise ValueError(f"per_question must be at least 1, got {per_question}.")
    asked = list(trait.extraction_questions if questions is None else questions)
    if len(set(asked)) < len(asked):
        raise ValueError(f"{trait.name}: {len(asked) - len(set(asked))} questions are repeated: ask each once.")
    return [
        Prompt(trait.name, polarity, instruction, trait.system_prompt(polarity, instruction), question, sample)
        for question in asked
        for polarity in polarities
        for instruction in ([None] if polarity == "neutral" else range(len(trait.instructions)))
        for sample in range(per_question)
    ]


def collect_rollouts(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    output: str | Path | None = None,
    progress: bool = True,
) -> list[Rollout]:
    """Answers to all prompts, in their order, from `output` where they stand already and from the engine otherwise.

    Batches are cut from the whole plan and written as they finish; one that was interrupted is answered again whole, so
    a resumed run has the rows that an uninterrupted one has. Rows of `output` that belong to other prompts stay there
    untouched. Raises ValueError where `output` holds rows of these prompts made with other settings.
    """
    file = None if output is None else JsonLines(output)
    if file is not None:
        ensure_writable(file.path)
    done = {} if file is None else _resume(file, prompts, engine.name, seed)
    with tqdm(total=len(prompts), desc="rollouts", unit="row", disable=not progress) as bar:
        for batch in plan_batches(len(prompts), engine.batch_rows):
            wanted = [prompts[row] for row in batch]
            missing = [prompt for prompt in wanted if prompt.key not in done]
            if missing:
                answers = {rollout.key: rollout for rollout in engine.answer(wanted, seed=seed, progress=progress)}
                fresh = [answers[prompt.key] for prompt in missing]
                if file is not None:
                    file.append(map(asdict, fresh))
                done.update((rollout.key, rollout) for rollout in fresh)
            bar.update(len(wanted))
    return [done[prompt.key] for prompt in prompts]


def _resume(file: JsonLines, prompts: Sequence[Prompt], engine: str, seed: int) -> dict[str, Rollout]:
    """The rollouts that are in the file already, by key; refused where they were made otherwise."""
    planned = {prompt.key: prompt for prompt in prompts}
    done = {rollout.key: rollout for rollout in rollouts_from_rows(file.resume(), file.path) if rollout.key in planned}
    for key, rollout in done.items():
        for what, had, has in (
            ("engine", rollout.engine, engine),
            ("seed", rollout.seed, seed),
            ("system prompt", rollout.system_prompt, planned[key].system_prompt),
        ):
            if had != has:
                raise ValueError(
                    f"{file.path} holds rollouts made with another {what} ({had!r}, now {has!r}). "
                    "Choose another output, or move that file away."
                )
    return done


def sample_rollouts(
    model: Model,
    trait: Trait,
    *,
    polarities: Sequence[Polarity] = ("positive", "negative"),
    questions: Sequence[str] | None = None,
    per_question: int = 10,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    output: str | Path | None = None,
    batch_rows: int = 100,
    progress: bool = True,
) -> list[Rollout]:
    """Sample the trait's rollouts from a model; `plan_rollouts` and `collect_rollouts` with a `ModelEngine`.

    Interventions that are attached to the model act. Source: arXiv:2507.21509, section 2.2.
    """
    engine = ModelEngine(model, max_new_tokens, temperature, top_p, batch_rows)
    prompts = plan_rollouts(trait, polarities=polarities, questions=questions, per_question=per_question)
    return collect_rollouts(engine, prompts, seed=seed, output=output, progress=progress)


def rollouts_from_rows(rows: Iterable[dict[str, Any]], source: str | Path) -> list[Rollout]:
    """Rollouts from the rows of a JSON-lines file; raises ValueError naming the line that lacks a field."""
    rollouts: list[Rollout] = []
    for number, row in enumerate(rows, start=1):
        try:
            tokens = row["response_tokens"]
            rollouts.append(Rollout(**{**row, "response_tokens": None if tokens is None else tuple(tokens)}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source}, line {number}: not a rollout ({error}).") from error
    return rollouts


def read_rollouts(path: str | Path) -> list[Rollout]:
    """The rollouts of a JSON-lines file that `sample_rollouts` wrote."""
    if not Path(path).exists():
        raise FileNotFoundError(f"No rollouts at {path}: make them with `persona-lens rollouts`.")
    return rollouts_from_rows(JsonLines(path).read(), path)
