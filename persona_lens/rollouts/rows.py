"""Rows: what is asked for one rollout, what was answered, and the JSON-lines file that holds the answers.

An answer that was sampled in this process has its token ids; one that came from a server has its text alone.
Knows nothing about who answers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from persona_lens.chat.batches import ChatTokens, Conversation, chat_messages, tokenize_chat
from persona_lens.chat.encoding import encode_content
from persona_lens.chat.templates import fixed_date
from persona_lens.storage.files import DAMAGE, JsonLines
from persona_lens.traits.trait import Polarity

REJECTED = "rejected: "
"""How the `finish_reason` of a prompt begins that a server did not take; the server's message follows."""


@dataclass(frozen=True)
class Prompt:
    """One planned rollout: who is asked what, for which time. `instruction` is None for the neutral system prompt.

    `intervention` names what is done to the model for this row, empty for nothing (see `CellEngine`). `condition` names
    what else sets the row apart in an experiment, such as `examples`, questions with answers that are shown before.
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
        """What names the row in files."""
        return self.randomness + f" | {self.intervention}" * bool(self.intervention)

    @property
    def randomness(self) -> str:
        """What names the row in sampling: the same under every intervention, so that their texts can be compared."""
        named = f"{self.condition}/" * bool(self.condition)
        return f"{self.trait}/{self.polarity}/{self.instruction}/{named}{self.sample}/{self.question}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the model is shown."""
        return chat_messages(self.system_prompt, self.question, self.examples)

    def tokenize(self, tokenizer: Any) -> ChatTokens:
        """The rendered prompt as token ids. Raises ValueError that names the row for what cannot be tokenised."""
        try:
            return tokenize_chat(tokenizer, self.messages)
        except ValueError as error:
            raise ValueError(f"Rollout {self.key!a}: {error}") from error


@dataclass(frozen=True)
class Rollout:
    """A model's answer. It knows nothing about scores; an empty response is kept as a row and never averaged.

    `response_tokens` is None where a server answered: then the text is tokenised when it is needed. `date` is the day,
    in ISO form, that a chat template which reads the clock was told; empty where it reads none, and on a server.
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

    @property
    def rejected(self) -> bool:
        """Whether a server did not take the prompt, such as one too long for it; `finish_reason` says why."""
        return self.finish_reason.startswith(REJECTED)

    def tokenize(self, tokenizer: Any, *, system_prompt: str | None = None) -> ChatTokens:
        """The chat as token ids, as it was sampled, or its question and answer alone under another system prompt.

        Raises ValueError that names the row for what cannot be tokenised.
        """
        messages = self.prompt.messages if system_prompt is None else chat_messages(system_prompt, self.question)
        try:
            with fixed_date(self.date):
                return tokenize_chat(tokenizer, messages, self.response_tokens or self.response)
        except ValueError as error:
            raise ValueError(f"Rollout {self.key!a}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The row of a file, without a date where there is none."""
        row = asdict(self)
        return row if self.date else {name: value for name, value in row.items() if name != "date"}

    def count_tokens(self, tokenizer: Any) -> int:
        """How many tokens the response has, by this tokenizer where they were not kept."""
        return len(encode_content(tokenizer, self.response) if self.response_tokens is None else self.response_tokens)

    def conversation(self) -> Conversation:
        """The row as what extraction takes."""
        messages = tuple(self.prompt.messages)
        response = "" if self.is_empty else self.response_tokens or self.response
        return Conversation(messages, response, self.question, str(self.instruction), self.date)


FIELDS = tuple(each.name for each in fields(Rollout) if each.default is MISSING)
"""What every row of a file of rollouts has."""


def rollouts_from_rows(rows: Iterable[dict[str, Any]], source: str | Path) -> list[Rollout]:
    """Rollouts from the rows of a JSON-lines file; raises ValueError naming the line that lacks a field."""
    rollouts: list[Rollout] = []
    for number, row in enumerate(rows, start=1):
        try:
            tokens, examples = row["response_tokens"], tuple(map(tuple, row.get("examples", ())))
            tokens = None if tokens is None else tuple(tokens)
            made = Rollout(**{**row, "response_tokens": tokens, "examples": examples})
            _refuse_other_types(made)
            rollouts.append(made)
        except DAMAGE as error:
            raise ValueError(f"{source}, line {number}: not a rollout ({error}).") from error
    return rollouts


_TEXTS = ("trait", "polarity", "system_prompt", "question", "response", "finish_reason", "engine", "intervention")


def _refuse_other_types(made: Rollout) -> None:
    """Raise TypeError where a field is not of its type, as in a file that something else wrote."""
    if wrong := [name for name in (*_TEXTS, "condition", "date") if not isinstance(getattr(made, name), str)]:
        raise TypeError(f"its {wrong[0]} should be text, got {getattr(made, wrong[0])!r:.40}")
    numbers = [made.sample, made.seed, *(() if made.instruction is None else [made.instruction])]
    if not all(type(number) is int for number in (*numbers, *(made.response_tokens or ()))):
        raise TypeError("its sample, seed, instruction and tokens should be whole numbers")
    if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in made.examples):
        raise TypeError("its examples should be pairs of texts")
    if made.date:
        datetime.fromisoformat(made.date)
    if made.polarity not in get_args(Polarity):
        raise ValueError(f"its polarity should be one of {get_args(Polarity)}, got {made.polarity!r:.40}")


def read_rollouts(path: str | Path) -> list[Rollout]:
    """The rollouts of a JSON-lines file that `sample_rollouts` wrote."""
    if not Path(path).exists():
        raise FileNotFoundError(f"No rollouts at {path}: make them with `persona-lens rollouts`.")
    return rollouts_from_rows(JsonLines(path).read(), path)


def longest_response(rollouts: Sequence[Rollout], tokenizer: Any) -> int:
    """Tokens of the longest response, at least 1; a text without token ids is counted by this tokenizer."""
    return max((row.count_tokens(tokenizer) for row in rollouts), default=1) or 1
