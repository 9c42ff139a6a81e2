"""Responses that were made elsewhere: the reference code's judged CSV files, and JSON-lines of messages.

The reference writes a positive and a negative file whose rows pair in order (it stores no sample index), with the
prompt as rendered text, which is used verbatim (arXiv:2507.21509, section 2.2 and its reference code).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_lens.chat.batches import Conversation
from persona_lens.chat.rows import Unreadable, json_lines, messages_of
from persona_lens.judges.agreement import read_score
from persona_lens.storage.files import DAMAGE

_MISSING = ("", "nan", "none", "refusal")
"""What the reference code's tables hold where there is no score."""


@dataclass(frozen=True)
class JudgedResponse:
    """A response that somebody else sampled and judged."""

    conversation: Conversation
    trait_score: float | None
    coherence: float | None

    @property
    def is_empty(self) -> bool:
        """Whether there is no response."""
        return self.conversation.is_empty


def read_reference_csv(path: str | Path, trait: str) -> list[JudgedResponse]:
    """Rows of a CSV in the reference's form: `question, prompt, answer, question_id, {trait}, coherence`.

    An empty score is missing, never 0. Raises ValueError for a column that is absent or a score out of range.
    """
    import pandas as pd

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No file {path}.")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file that can be read: {error}.") from error
    needed = ["question", "prompt", "answer", "question_id", trait, "coherence"]
    if absent := [name for name in needed if name not in table.columns]:
        raise ValueError(f"{path} has no column {absent[0]!r}; expected {needed}, got {list(table.columns)}.")
    return [
        JudgedResponse(
            Conversation(row["prompt"], row["answer"], row["question"], _instruction(row["question_id"])),
            read_score(row[trait], f"{path}, row {number}, column {trait!r}", missing=_MISSING),
            read_score(row["coherence"], f"{path}, row {number}, column 'coherence'", missing=_MISSING),
        )
        for number, row in enumerate(table.to_dict("records"), start=1)
    ]


def _instruction(question_id: str) -> str:
    """The instruction's number in an id such as `evil_3_pos_1` (trait, question, side, instruction)."""
    match = re.search(r"_(?:pos|neg)_(\d+)$", question_id)
    return match.group(1) if match else ""


def pair_by_row(
    positive: Sequence[JudgedResponse], negative: Sequence[JudgedResponse]
) -> list[tuple[JudgedResponse | None, JudgedResponse | None]]:
    """Rows of both sides paired in order. Raises ValueError where lengths or questions do not match."""
    if len(positive) != len(negative):
        raise ValueError(
            f"The sides do not match: {len(positive)} positive and {len(negative)} negative rows. They pair by row, so "
            "both files must hold the same questions in the same order."
        )
    for number, (one, other) in enumerate(zip(positive, negative, strict=True), start=1):
        if one.conversation.question != other.conversation.question:
            raise ValueError(
                f"The sides do not match: row {number} asks {one.conversation.question!r} on the positive side and "
                f"{other.conversation.question!r} on the negative one."
            )
    return list(zip(positive, negative, strict=True))


def read_messages(path: str | Path) -> list[Conversation]:
    """Conversations from JSON-lines whose rows have `messages`, the last of them the assistant's.

    Raises ValueError that names the line.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"No file {path}.")
    conversations: list[Conversation] = []
    for number, row in json_lines(Path(path)):
        if not isinstance(row, dict):
            got = row.text[:60] if isinstance(row, Unreadable) else type(row).__name__
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {got!r}.")
        try:
            conversations.append(Conversation.from_messages(messages_of(row)))
        except DAMAGE as error:
            raise ValueError(
                f"{path}, line {number}: expected {{'messages': [{{'role', 'content'}}, ...]}} ending with the "
                f"assistant's turn ({error})."
            ) from error
    return conversations
