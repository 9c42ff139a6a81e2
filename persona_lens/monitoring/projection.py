"""The forward passes that monitor chats: a whole chat in one where that is exact, many chats to a batch.

Blocks above the highest layer that is wanted do not run, unless an intervention acts there, and nothing is unembedded.
Source: arXiv:2507.21509, section 3.3.
Knows nothing about tokenizers and files.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from persona_lens.activations.means import NotFinite, attached_projections, check_vectors
from persona_lens.activations.prefixes import length_sorted_batches, pad
from persona_lens.chat.batches import Message
from persona_lens.chat.rows import Table, chat_rows
from persona_lens.chat.templates import date_told, fixed_date
from persona_lens.interventions.hooks import attachments
from persona_lens.models.forward import forward
from persona_lens.models.memory import backing_off
from persona_lens.models.pass_context import KnownPass
from persona_lens.models.structure import Model
from persona_lens.monitoring.result import (
    ChatProjections,
    MonitoredVector,
    Monitoring,
    TokenProjections,
    TurnProjections,
    checked_output,
)
from persona_lens.monitoring.transcripts import (
    ReadChats,
    Segment,
    Transcript,
    Turn,
    chat_segments,
    read_chats,
    text_pieces,
)
from persona_lens.vectors.persona_vector import PersonaVector

Chats = str | os.PathLike[str] | ReadChats | Table | Iterable[Transcript | Sequence[Message] | Mapping[str, Any]]
"""A file of chats, what `read_chats` read, a pandas DataFrame, a `datasets.Dataset`, or transcripts and messages."""


@fixed_date()
def monitor(
    model: Model,
    chats: Chats,
    vectors: PersonaVector | Sequence[PersonaVector],
    *,
    tokens: bool = False,
    window: int | None = None,
    after: str | None = None,
    token_budget: int = 2048,
    allow_other_model: bool = False,
    output: str | Path | None = None,
    progress: bool = True,
) -> Monitoring:
    """The scalar projections of chats on persona vectors: every turn's last prompt token and mean response.

    `chats` are transcripts, lists of messages, a file of them (`read_transcripts`), a pandas DataFrame or a
    `datasets.Dataset` with a column of messages; a chat that ends before the model speaks has a last turn without a
    response. Rows of a file, a table or a data set that are no chats are left out, and stand in the result's `rejected`
    with their numbers and reasons. `vectors` may be of several traits and layers. `tokens=True` keeps
    every token's projection. `window` reads at most so many tokens at once and leaves out the oldest messages, which
    are counted. With `after` (such as `"</think>"`) only what follows it is averaged. Interventions that are attached
    to the model act and are seen; those at `response` or `prompt` treat each turn as they would if the model said it,
    with earlier turns as its prompt. `output` also writes the result (.jsonl or .parquet).

    Source: arXiv:2507.21509, section 3.3. Its limit: on a model that thinks before it answers, the last prompt token
    says little of the answer; there the response `after` its thinking counts.

    Raises:
        ValueError: There are no chats; a list of messages is no chat; a chat does not fit the context or window; a
            vector does not belong to the model; the model's activations are not finite; `output` holds something else
            than results of monitoring.
        OSError: `output` could not be written, which is found before anything runs.
    """
    given = (vectors,) if isinstance(vectors, PersonaVector) else tuple(vectors)
    path = None if output is None else checked_output(output)
    read = _read_chats(chats)
    transcripts = _named_apart(read.chats)
    named = _named(given)
    attached = attachments(model)
    if unlike := [rows for each in attached for rows in each.n_rows if rows != len(transcripts)]:
        raise ValueError(f"Steering has coefficients for {unlike[0]} rows, and there are {len(transcripts)} chats.")
    check_vectors(model, given, allow_other_model=allow_other_model)
    segments = _segments(model, transcripts, window, after)
    turns: list[dict[int, TurnProjections]] = [{} for _ in transcripts]
    n_tokens = sum(len(segment.tokens) for _, segment in segments)
    with tqdm(total=n_tokens, unit="tok", desc="monitor", leave=False, disable=not progress) as bar:
        for place, values in _projected(model, segments, given, token_budget):
            index, segment = segments[place]
            for turn in segment.turns:
                turns[index][turn.message] = _read(model.tokenizer, segment, turn, values, tokens)
            bar.update(len(segment.tokens))
    found = Monitoring(
        named,
        tuple(
            ChatProjections(chat.name, tuple(turn for _, turn in sorted(each.items())))
            for chat, each in zip(transcripts, turns, strict=True)
        ),
        after,
        window,
        tuple(_in_words(attached)),
        date_told(model.tokenizer),
        read.rejected,
    )
    if path is not None:
        found.save(path)
    return found


def _read_chats(chats: Chats) -> ReadChats:
    """The chats, and which rows of a file, a table or a data set are none."""
    if isinstance(chats, ReadChats):
        found = chats
    elif isinstance(chats, str | os.PathLike):
        found = read_chats(chats)
    elif isinstance(chats, Mapping):
        raise ValueError(
            f"chats is a file, a table, or a list of chats, got {type(chats).__name__}: pass one split of a "
            "DatasetDict, or a single chat in brackets."
        )
    else:
        rows = [row if isinstance(row, Mapping) else _transcript(row, number) for number, row in chat_rows(chats)]
        if any(isinstance(row, Mapping) and {"role", "content"} <= set(row) for row in rows):
            raise ValueError("chats is a list of chats, each a list of messages, and got messages: pass [messages].")
        found = read_chats(rows) if rows else ReadChats(())
    if not found.chats:
        raise ValueError("There is nothing to monitor: pass at least one chat.")
    return found


def _named_apart(chats: Sequence[Transcript]) -> list[Transcript]:
    """The chats, each under a name of its own."""
    seen: Counter[str] = Counter()
    named: list[Transcript] = []
    for number, chat in enumerate(chats, start=1):
        name = chat.name or f"chat {number}"
        seen[name] += 1
        named.append(Transcript(chat.messages, f"{name} ({seen[name]})" if seen[name] > 1 else name))
    return named


def _transcript(chat: Transcript | Sequence[Message], number: int) -> Transcript:
    if isinstance(chat, Transcript):
        return chat
    if isinstance(chat, str):
        raise ValueError(f"Chat {number}: expected a list of messages, got text: pass its messages.")
    try:
        return Transcript(chat)
    except ValueError as error:
        raise ValueError(f"Chat {number}: {error}") from error


def _named(vectors: Sequence[PersonaVector]) -> tuple[MonitoredVector, ...]:
    named = tuple(MonitoredVector(each.trait, each.layer, each.fingerprint) for each in vectors)
    if not named:
        raise ValueError("There is nothing to project on: pass at least one vector.")
    name, count = Counter(each.name for each in named).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{count} vectors are called {name}: leave one out, or tell them apart by `dataclasses.replace`."
        )
    return named


def _segments(
    model: Model, transcripts: Sequence[Transcript], window: int | None, after: str | None
) -> list[tuple[int, Segment]]:
    """What is to be run of every chat, beside the chat's index."""
    # Where a token is treated by whether it is of a prompt, an earlier turn's response is prompt to the turns after it.
    shared = all(isinstance(each.at, str) and each.at == "all" for each in attachments(model))
    limit = int(model.cfg.n_ctx)
    segments: list[tuple[int, Segment]] = []
    for index, chat in enumerate(transcripts):
        try:
            cut = chat_segments(model.tokenizer, chat, limit, window, after=after, shared=shared)
        except ValueError as error:
            raise ValueError(f"{chat.name}: {error}") from error
        segments += [(index, segment) for segment in cut]
    return segments


def _projected(
    model: Model,
    segments: Sequence[tuple[int, Segment]],
    vectors: Sequence[PersonaVector],
    token_budget: int,
) -> Iterator[tuple[int, Float[Tensor, "pos vector"]]]:
    """Every segment's place with its tokens' projections, in the order in which they ran."""

    def known(batch: Sequence[int], mask: Bool[Tensor, "batch pos"]) -> KnownPass:
        return _known([segments[place] for place in batch], mask)

    return token_projections(
        model,
        [segment.tokens for _, segment in segments],
        vectors,
        known=known,
        token_budget=token_budget,
    )


def token_projections(
    model: Model,
    rows: Sequence[tuple[int, ...]],
    vectors: Sequence[PersonaVector],
    *,
    known: Callable[[Sequence[int], Bool[Tensor, "batch pos"]], KnownPass],
    token_budget: int = 2048,
) -> Iterator[tuple[int, Float[Tensor, "pos vector"]]]:
    """Every row of token ids, by its index, with its tokens' scalar projections, in the order in which they ran.

    Blocks above the highest layer that is wanted do not run, unless an intervention acts there, and nothing is
    unembedded. `known` says of a batch, given its rows' indices and its mask, what interventions are told of it.
    The vectors are the model's, which `check_vectors` has seen. Where memory does not suffice, fewer rows run at once.
    Raises ValueError for activations that are not finite, DoesNotFit for a row that does not fit the memory alone.
    """
    above = [layer for each in attachments(model) for layer in each.layers]
    lengths = [len(row) for row in rows]
    waiting = set(range(len(rows)))
    with attached_projections(model, vectors) as found:
        # An intervention that never ran would be an error on leaving its context.
        highest = max([*found.layers, *above])

        def attempt(left: list[int], budget: int) -> Iterator[tuple[int, Tensor]]:
            for order in length_sorted_batches([lengths[place] for place in left], budget):
                batch = [left[place] for place in order]
                ids, mask = pad([rows[place] for place in batch], left=False)
                forward(model, ids, mask, stop_after=highest, known=known(batch, mask))
                read = found.read()
                bad = ~read.isfinite() & mask[..., None]
                if bool(bad.any()):
                    layer, row = min((vectors[vector].layer, batch[row]) for row, _, vector in bad.nonzero().tolist())
                    raise NotFinite(row, layer)
                waiting.difference_update(batch)
                for place, values in zip(batch, read, strict=True):
                    yield place, values[: lengths[place]]

        yield from backing_off(model, waiting, lengths, token_budget, attempt)


def _known(segments: Sequence[tuple[int, Segment]], mask: Bool[Tensor, "batch pos"]) -> KnownPass:
    """Which chat each row is and, where every row is one turn, what of it is prompt and response."""
    rows = torch.tensor([index for index, _ in segments])
    if any(len(segment.turns) > 1 for _, segment in segments):
        return KnownPass(rows=rows)
    place = torch.arange(mask.shape[1])
    starts = torch.tensor([segment.turns[0].start for _, segment in segments]).unsqueeze(1)
    return KnownPass(rows=rows, prompt=mask & (place < starts), response=mask & (place >= starts - 1))


def _read(
    tokenizer: Any, segment: Segment, turn: Turn, values: Float[Tensor, "pos vector"], tokens: bool
) -> TurnProjections:
    said = values[turn.averaged : turn.stop]
    pieces = None
    if tokens:
        text = text_pieces(tokenizer, segment.tokens[turn.unread : turn.stop])
        pieces = TokenProjections(
            tuple(text), turn.start - turn.unread, values[turn.unread : turn.stop].float().clone()
        )
    return TurnProjections(
        message=turn.message,
        prompt=tuple(values[turn.last_prompt].tolist()),
        response=tuple(said.double().mean(dim=0).tolist()) if len(said) else None,
        n_tokens=len(said),
        dropped_messages=turn.dropped,
        unclosed=turn.unclosed,
        tokens=pieces,
    )


def _in_words(attached: Sequence[Any]) -> list[str]:
    at = (each.at if isinstance(each.at, str) else "a mask" for each in attached)
    return [f"{value}, at {where}" for each, where in zip(attached, at, strict=True) for value in each.interventions]
