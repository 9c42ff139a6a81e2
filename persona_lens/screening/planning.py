"""From samples to planned rows: tokenised, filtered, drawn at random, near-duplicates known, and the others counted.

Every random choice is a hash of the seed and of what names the row, so it depends on no other row.
Knows tokenizers; knows nothing about models or units.
"""

import hashlib
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from persona_lens.chat.batches import ChatTokens, Message, UnclosedBlock, tokenize_chat
from persona_lens.chat.encoding import refuse_half_characters
from persona_lens.screening.batches import PlannedRow, spooled
from persona_lens.screening.near_duplicates import Seen
from persona_lens.screening.samples import Kind, Rejection, Sample
from persona_lens.storage.files import JsonLines


@dataclass(frozen=True)
class Choices:
    """Which samples, and what is read of them; see `screen`."""

    first_turn: bool = False
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    sample: int | None = None
    after: str | None = None
    system_prompt: str | None = None
    given_base: bool = False
    base_fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is 1 or more, or None for no limit; got {value}.")
        refuse_half_characters(self.system_prompt or "", "system_prompt")
        if not 0 < self.base_fraction <= 1:
            raise ValueError(f"base_fraction is above 0 and at most 1, got {self.base_fraction}.")


class Room(NamedTuple):
    """How many tokens fit."""

    context: int
    answer: int = 0
    """How many of them a base response may take that is yet to be made."""


class Planner:
    """Turns samples into planned rows and counts what becomes of the others."""

    def __init__(self, tokenizer: Any, room: Room, choices: Choices, rejects: JsonLines):
        self.tokenizer, self.room, self.choices, self.rejects = tokenizer, room, choices, rejects
        self.read = self.cut = self.repeated = 0
        self.rejected: Counter[Kind] = Counter()
        self.left_out: Counter[str] = Counter()
        self.waiting: list[dict[str, Any]] = []

    def planned(self, rows: Iterable[Sample | Rejection], seen: Seen) -> Iterator[PlannedRow]:
        """The samples that are screened."""
        for row in rows:
            self.read += 1
            if isinstance(row, Rejection):
                self.reject(row)
                continue
            first = seen.first_line(row.dataset, row.id, row.line)
            if first != row.line:
                reason = f"the id {row.id!r} stands at line {first} already"
                self.reject(_rejection(row, "duplicate id", reason))
                continue
            found = self._tokenized(row)
            if found is not None:
                yield found

    def _tokenized(self, sample: Sample) -> PlannedRow | None:
        messages, choices = stated(sample.messages, self.choices.system_prompt), self.choices
        try:
            tokens = tokenize_chat(self.tokenizer, messages, sample.response, after=choices.after)
            base = sample.base_response
            base_tokens = None if base is None else tokenize_chat(self.tokenizer, messages, base).response
        except UnclosedBlock:
            return self.reject(_rejection(sample, "no token to average", f"it never says {choices.after!r}"))
        except ValueError as error:
            return self.reject(_rejection(sample, "malformed", str(error)))
        if choices.max_prompt_tokens is not None and len(tokens.prompt) > choices.max_prompt_tokens:
            self.left_out[f"prompt longer than {choices.max_prompt_tokens} tokens"] += 1
            return None
        whole, tokens = tokens, ChatTokens(tokens.prompt, tokens.response[: choices.max_response_tokens], tokens.skip)
        wants_base = draw(choices.seed, sample, "base") < choices.base_fraction
        if len(tokens) > self.room.context:
            reason = f"{len(tokens)} tokens, and the model's context holds {self.room.context}"
            return self.reject(_rejection(sample, "too long", reason))
        if wants_base and len(tokens.prompt) + self.room.answer > self.room.context:
            reason = f"with {self.room.answer} tokens of a base response the prompt passes the context"
            return self.reject(_rejection(sample, "too long", reason))
        if not tokens.n_averaged:
            return self.reject(_rejection(sample, "no token to average", "no token is left of its response"))
        return PlannedRow(
            row=sample.row,
            dataset=sample.dataset,
            id=sample.id,
            line=sample.line,
            prompt=tokens.prompt,
            response=tokens.response,
            skip=tokens.skip,
            base=base_tokens,
            wants_base=wants_base,
            cut=len(tokens) < len(whole),
            group=_number(*map(str, tokens.prompt)) >> 1,
            family=sample.row,
            text=_text(sample, messages),
        )

    def drawn(self, rows: Iterable[PlannedRow], n: int, spool: Path) -> Iterator[PlannedRow]:
        """At most `n` random rows of each data set, in their order."""
        # Of each data set the n rows with the smallest random numbers, the greatest of them on top of its heap.
        smallest: dict[str, list[tuple[float, int]]] = defaultdict(list)

        def note(row: PlannedRow) -> None:
            heap, entry = smallest[row.dataset], (-draw(self.choices.seed, row, "sample"), -row.row)
            if len(heap) < n:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)

        for row in spooled(rows, spool, each=note):
            if (-draw(self.choices.seed, row, "sample"), -row.row) >= smallest[row.dataset][0]:
                yield row
            else:
                self.left_out["not drawn"] += 1

    def with_families(self, rows: Iterable[PlannedRow], seen: Seen) -> Iterator[PlannedRow]:
        """The rows, each with its family; what is screened is counted here."""
        for row in rows:
            family = seen.family(json.loads(row.text)["response"], row.row)
            self.repeated += family != row.row
            self.cut += row.cut
            yield replace(row, family=family)

    def reject(self, row: Rejection) -> None:
        """Count a row that is not screened and keep it in the file of rejects."""
        self.rejected[row.kind] += 1
        self.waiting.append({**asdict(row), "content": _as_json(row.content)})
        if len(self.waiting) == 1000:
            self.flush()

    def flush(self) -> None:
        """Write rejected rows that wait for it."""
        self.rejects.append(self.waiting)
        self.waiting = []

    def counts(self, n_rows: int) -> dict[str, Any]:
        """What became of every row."""
        return {
            "read": self.read,
            "rejected": dict(self.rejected.most_common()),
            "left_out": dict(self.left_out),
            "planned": n_rows,
            "cut": self.cut,
            "repeated": self.repeated,
        }

    def in_words(self) -> str:
        """What became of the rows that are not screened."""
        lost = [f"{count} {what}" for what, count in (*self.rejected.items(), *self.left_out.items())]
        return f"of {self.read} rows {', '.join(lost) or 'none was there'}"


def stated(messages: tuple[Message, ...], system_prompt: str | None) -> list[Message]:
    """The messages with a system turn: their own, or else `system_prompt`; None leaves it to the chat template."""
    if system_prompt is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def draw(seed: int, row: Sample | PlannedRow, purpose: str) -> float:
    """A number from 0 to 1 that depends on the seed, the purpose and what names the row alone."""
    return _number(str(seed), purpose, row.dataset, str(row.line)) / (1 << 64)


def _number(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def _rejection(sample: Sample, kind: Kind, reason: str) -> Rejection:
    return Rejection(sample.dataset, sample.line, kind, reason, {"id": sample.id, "messages": sample.conversation})


def _text(sample: Sample, messages: list[Message]) -> str:
    text: dict[str, Any] = {"messages": list(map(dict, messages)), "response": sample.response}
    if sample.base_response is not None:
        text["base_response"] = sample.base_response
    return json.dumps(text, ensure_ascii=False)


def _as_json(content: Any) -> Any:
    """The row, or how it reads where it is no JSON that can be written."""
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return repr(content)
    return content
