"""The rows of a rollouts file: a planned prompt, and the response to it.

A response that was sampled in this process has its token ids; one from a server has its text alone.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from persona_lens.chat.batches import ChatTokens, Conversation, chat_messages, tokenize_chat
from persona_lens.chat.encoding import encode_content
from persona_lens.chat.templates import fixed_date
from persona_lens.storage.files import DAMAGE, JsonLines
from persona_lens.traits.trait import Polarity

REJECTED = "rejected: "
"""The first part of the `finish_reason` of a prompt that a server did not take; the server's message follows."""


@dataclass(frozen=True)
class Prompt:
    """One planned rollout.

    Fields
        instruction   index of the instruction pair; None for the neutral system prompt
        intervention  name of what is done to the model for this row, empty for nothing (see `CellEngine`)
        condition     name of what else sets the row apart in an experiment
        examples      (question, answer) turns that are shown before the question
    """

    trait: str
    polarity: Polarity
    instruction: int | None
    system_prompt: str
    question: str
    sample: int
    intervention: str = ""
    condition: str = ""
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """The row's name in files."""
        return self.randomness + f" | {self.intervention}" * bool(self.intervention)

    @property
    def randomness(self) -> str:
        """The row's name in sampling: the same under every intervention, so that their texts can be compared."""
        condition = f"{self.condition}/" * bool(self.condition)
        return f"{self.trait}/{self.polarity}/{self.instruction}/{condition}{self.sample}/{self.question}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat up to the response."""
        return chat_messages(self.system_prompt, self.question, self.examples)

    def tokenize(self, tokenizer: Any) -> ChatTokens:
        """The rendered prompt as token ids; raises ValueError, naming the row, where that is impossible."""
        try:
            return tokenize_chat(tokenizer, self.messages)
        except ValueError as error:
            raise ValueError(f"Rollout {self.key!a}: {error}") from error


@dataclass(frozen=True)
class Rollout:
    """A response to a `Prompt`, whose fields it repeats. An empty response is kept as a row and never averaged.

    Fields
        response_tokens  None for a server's response, whose text is tokenised when needed
        date             the day, in ISO form, that a chat template which reads the clock was given; empty otherwise
    """

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
    condition: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    date: str = ""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    @property
    def prompt(self) -> Prompt:
        """The prompt."""
        return Prompt(**{field.name: getattr(self, field.name) for field in fields(Prompt)})

    @property
    def key(self) -> str:
        """The row's name in files."""
        return self.prompt.key

    @property
    def is_empty(self) -> bool:
        """Whether the response holds nothing but white space."""
        return not self.response.strip()

    @property
    def rejected(self) -> bool:
        """Whether a server did not take the prompt, for example because it is too long; see `finish_reason`."""
        return self.finish_reason.startswith(REJECTED)

    def tokenize(self, tokenizer: Any, *, system_prompt: str | None = None) -> ChatTokens:
        """The chat as token ids: as it was sampled, or question and response alone under another system prompt.

        Raises ValueError, naming the row, where that is impossible.
        """
        messages = self.prompt.messages if system_prompt is None else chat_messages(system_prompt, self.question)
        try:
            with fixed_date(self.date):
                return tokenize_chat(tokenizer, messages, self.response_tokens or self.response)
        except ValueError as error:
            raise ValueError(f"Rollout {self.key!a}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The row of a file; an empty date is left out."""
        row = asdict(self)
        return row if self.date else {name: value for name, value in row.items() if name != "date"}

    def count_tokens(self, tokenizer: Any) -> int:
        """The length of the response in tokens, by this tokenizer for a server's response."""
        return len(encode_content(tokenizer, self.response) if self.response_tokens is None else self.response_tokens)

    def conversation(self) -> Conversation:
        """The row in the form that extraction takes."""
        messages = tuple(self.prompt.messages)
        response = "" if self.is_empty else self.response_tokens or self.response
        return Conversation(messages, response, self.question, str(self.instruction), self.date)


FIELDS = tuple(field.name for field in fields(Rollout) if field.default is MISSING)
"""The fields of every row of a rollouts file."""


def rollouts_from_rows(rows: Iterable[dict[str, Any]], source: str | Path) -> list[Rollout]:
    """Rollouts from the rows of a JSON-lines file; raises ValueError, naming the line, for a damaged row."""
    rollouts: list[Rollout] = []
    for number, row in enumerate(rows, start=1):
        try:
            # As JSON, because strict pydantic takes an object for a dataclass, and a list for a tuple, only from there.
            rollout = _form().validate_json(json.dumps(row))
            if rollout.date:
                datetime.fromisoformat(rollout.date)
            rollouts.append(rollout)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            reason = f"its {'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r:.40}"
            raise ValueError(f"{source}, line {number}: not a rollout ({reason}).") from error
        except DAMAGE as error:
            raise ValueError(f"{source}, line {number}: not a rollout ({error}).") from error
    return rollouts


@cache
def _form() -> Any:
    return TypeAdapter(Rollout)


def read_rollouts(path: str | Path) -> list[Rollout]:
    """The rollouts of a JSON-lines file that `sample_rollouts` wrote."""
    if not Path(path).exists():
        raise FileNotFoundError(f"No rollouts at {path}: make them with `persona-lens rollouts`.")
    return rollouts_from_rows(JsonLines(path).read(), path)


def longest_response(rollouts: Sequence[Rollout], tokenizer: Any) -> int:
    """The length of the longest response in tokens, at least 1."""
    return max((row.count_tokens(tokenizer) for row in rollouts), default=1) or 1
