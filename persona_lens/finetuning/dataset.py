"""Chats as training rows: token ids, and which of them the loss is on.

The loss is on what the assistant says, to the end of its turn, in every turn (arXiv:2507.21509, appendix D). Turns are
tokenised as everywhere here, so that a row is what the model would have seen and sampled.
"""

import os
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from persona_lens.chat.batches import Message, end_of_turn, turn_ends
from persona_lens.chat.rows import Table, chat_rows, messages_of
from persona_lens.monitoring.transcripts import Segment, Transcript, Turn, chat_segments, read_transcripts
from persona_lens.traits.trait import Trait

IGNORED = -100
"""The label of a token that the loss leaves out, as Hugging Face's losses have it."""


@dataclass(frozen=True)
class TrainingRow:
    """One row of training: `labels` are the ids where the loss is, `IGNORED` elsewhere."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def n_learnt(self) -> int:
        """How many tokens the loss is on; the first token is predicted from nothing and never among them."""
        return sum(label != IGNORED for label in self.labels[1:])


class TrainingRows(NamedTuple):
    """Rows that fit, and what did not."""

    rows: list[TrainingRow]
    cut: int
    """Rows that were longer than the limit and lost their end."""
    dropped: int
    """Rows of whose responses nothing was within the limit."""

    def __str__(self) -> str:
        learnt = sum(row.n_learnt for row in self.rows)
        cut = f", {self.cut} of them cut to the length limit" if self.cut else ""
        dropped = f"; {self.dropped} dropped, whose prompts fill it" if self.dropped else ""
        return f"{len(self.rows)} rows{cut}, {learnt} tokens to learn{dropped}"


Dataset = str | os.PathLike[str] | Table | Iterable[Mapping[str, Any] | Transcript]
"""Chats: a file that `read_transcripts` reads, `Transcript`s, a pandas DataFrame, or rows with `messages` such as a
`datasets.Dataset`."""


def training_chats(dataset: Dataset) -> list[Transcript]:
    """The chats of a dataset, each with something to learn.

    Raises ValueError, naming the row, for what is no chat, has a wrong role, or lacks an assistant turn, and for a
    dataset without rows.
    """
    if isinstance(dataset, str | os.PathLike):
        chats, source = read_transcripts(Path(dataset)), f"{os.fspath(dataset)}, row"
    else:
        source = "Training row"
        chats = [_chat(row, f"{source} {number}") for number, row in chat_rows(dataset)]
    if not chats:
        raise ValueError("There is nothing to train on: the dataset has no rows.")
    for number, chat in enumerate(chats, start=1):
        if all(message["role"] != "assistant" for message in chat.messages):
            raise ValueError(f"{source} {number} has no assistant turn to learn: add the response, or drop the row.")
    return chats


def _chat(row: Any, place: str) -> Transcript:
    if isinstance(row, Transcript):
        return row
    try:
        messages = messages_of(row)
    except ValueError as error:
        fields = row.items() if isinstance(row, Mapping) else ()
        found = {name: type(value).__name__ for name, value in fields} or type(row).__name__
        raise ValueError(f"{place}: expected {{'messages': [{{'role', 'content'}}, ...]}}, got {found}.") from error
    try:
        return Transcript(messages)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def prompted(chats: Sequence[Transcript], prompts: Trait | Sequence[str], *, seed: int = 0) -> list[Transcript]:
    """Each chat with one of the prompts, drawn at random, before its system turn's text.

    With a trait, its positive instructions as they are in extraction's system prompts: preventative prompting
    (arXiv:2507.21509, section J.7.2). Raises ValueError where there are no prompts.
    """
    if isinstance(prompts, Trait):
        prompts = [prompts.system_prompt("positive", index) for index in range(len(prompts.instructions))]
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"Preventative prompts are a Trait or a list of at least one prompt, got {prompts!r}.")
    draw = random.Random(seed)
    return [Transcript(_with_system(chat.messages, draw.choice(prompts)), chat.name) for chat in chats]


def stated(chats: Sequence[Transcript], system_prompt: str | None) -> list[Transcript]:
    """Each chat with a system turn: its own, or else `system_prompt`; None leaves it to the chat template."""
    if system_prompt is None:
        return list(chats)
    return [
        chat if chat.messages[0]["role"] == "system" else Transcript(_with_system(chat.messages, system_prompt))
        for chat in chats
    ]


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{"role": "system", "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:]]


def training_rows(
    tokenizer: Any, chats: Sequence[Transcript], *, max_length: int, stops: Collection[int] | None = None
) -> TrainingRows:
    """Chats as rows of at most `max_length` tokens; a longer one loses its end, and is counted.

    Each turn is learnt with the token that ends it: one of `stops`, the model's `stop_tokens`, or, without them, of
    what the tokenizer alone says.
    Where a chat template rewrites earlier turns, each turn is a row of its own. Raises ValueError where nothing is left
    to learn.
    """
    end = end_of_turn(tokenizer)
    stops = turn_ends(tokenizer) if stops is None else frozenset(stops)
    rows: list[TrainingRow] = []
    cut = dropped = 0
    for number, chat in enumerate(chats, start=1):
        # The model may be shown more than it is trained on: what is too long is cut below, and counted.
        for segment in _segments(tokenizer, chat, number):
            whole = _row(segment.tokens, segment.turns, end, stops)
            row = TrainingRow(whole.tokens[:max_length], whole.labels[:max_length])
            if whole.n_learnt and row.n_learnt:
                rows.append(row)
                cut += len(whole.tokens) > max_length
            else:
                dropped += bool(whole.n_learnt)
    if not rows:
        raise ValueError(
            f"Nothing is left to learn: in all {dropped} rows the prompt alone has {max_length} tokens or more. "
            "Raise max_length."
        )
    return TrainingRows(rows, cut, dropped)


def _segments(tokenizer: Any, chat: Transcript, number: int) -> list[Segment]:
    try:
        return chat_segments(tokenizer, chat, limit=1 << 30)
    except ValueError as error:
        raise ValueError(f"Training row {number}: {error}") from error


def _row(tokens: tuple[int, ...], turns: Sequence[Turn], end: int | None, stops: frozenset[int]) -> TrainingRow:
    last = turns[-1]
    if end is not None and last.stop == len(tokens) and last.start < last.stop:
        tokens = (*tokens, end)
    labels = [IGNORED] * len(tokens)
    for turn in turns:
        # A sampled reply ends with the end of its turn, which the template has after each that another turn follows.
        ended = turn.start < turn.stop < len(tokens) and tokens[turn.stop] in stops
        stop = turn.stop + ended
        labels[turn.start : stop] = tokens[turn.start : stop]
    return TrainingRow(tokens, tuple(labels))
