"""Monitor chats: project every turn's last prompt token and its mean response on persona vectors.

A whole chat runs in one pass where that is exact, many chats to a batch. Blocks above the highest layer that is read do
not run, unless an intervention acts there, and nothing is unembedded. Source: arXiv:2507.21509, section 3.3.
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
from persona_lens.chat.batches import Conversation, Message, RenderedPrompt
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

Chat = str | Conversation | Transcript | Sequence[Message] | Mapping[str, Any]
"""A user message, a conversation, a transcript, a list of messages, or a row of a data set with messages."""
Chats = str | os.PathLike[str] | ReadChats | Table | Iterable[Chat]
"""A file of chats, what `read_chats` read, a pandas DataFrame, a `datasets.Dataset`, or any chats."""


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
    output_file: str | Path | None = None,
    progress: bool = True,
) -> Monitoring:
    """Project chats on persona vectors: every turn's last prompt token and mean response.

    Interventions that are attached to the model act and are seen; those at `response` or `prompt` treat each turn as if
    the model were saying it, with earlier turns as its prompt.

    Args:
        model: Reads the chats.
        chats: Chats (a string is a user message), a file of them (see `read_transcripts`), or a table with a column of
            messages. Rows of a file or table that are no chats are left out and listed in `rejected`. A chat that ends
            before the model speaks has a last turn without a response.
        vectors: May be of several traits and layers.
        tokens: Keep every token's projection.
        window: Tokens that are read at once at most; beyond it the oldest messages are left out and counted.
        after: Average only what follows this text, such as `"</think>"`.
        token_budget: Padded tokens of a batch.
        allow_other_model: Accept vectors of an unrelated model of equal shape.
        output_file: Also write the result there (.jsonl or .parquet).
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no chats; a list of messages is no chat; a chat does not fit the context or window; a
            vector does not belong to the model; activations are not finite; `output_file` holds something else.
        OSError: `output_file` cannot be written, which is checked before anything runs.

    Source: arXiv:2507.21509, section 3.3. Limit: where a model thinks before it answers, the last prompt token says
    little about the answer; use the response `after` its thinking there.
    """
    vectors = (vectors,) if isinstance(vectors, PersonaVector) else tuple(vectors)
    path = None if output_file is None else checked_output(output_file)
    contents = _read(chats)
    transcripts, names = _distinct(contents.chats), _named(vectors)
    attached = attachments(model)
    if wrong := [rows for attachment in attached for rows in attachment.n_rows if rows != len(transcripts)]:
        raise ValueError(f"Steering has coefficients for {wrong[0]} rows, and there are {len(transcripts)} chats.")
    check_vectors(model, vectors, allow_other_model=allow_other_model)
    segments = _segments(model, transcripts, window, after)
    projected = token_projections(
        model,
        [segment.tokens for _, segment in segments],
        vectors,
        known=lambda batch, mask: _known_pass([segments[place] for place in batch], mask),
        token_budget=token_budget,
    )
    turns: list[dict[int, TurnProjections]] = [{} for _ in transcripts]
    n_tokens = sum(len(segment.tokens) for _, segment in segments)
    with tqdm(total=n_tokens, unit="tok", desc="monitor", leave=False, disable=not progress) as bar:
        for place, values in projected:
            index, segment = segments[place]
            for turn in segment.turns:
                turns[index][turn.message] = _turn_projections(model.tokenizer, segment, turn, values, tokens)
            bar.update(len(segment.tokens))
    monitoring = Monitoring(
        names,
        tuple(
            ChatProjections(chat.name, tuple(turn for _, turn in sorted(by_message.items())))
            for chat, by_message in zip(transcripts, turns, strict=True)
        ),
        after,
        window,
        attached_in_words(model),
        date_told(model.tokenizer),
        contents.rejected,
    )
    if path is not None:
        monitoring.save(path)
    return monitoring


def _read(chats: Chats) -> ReadChats:
    """The chats, and which rows of a file, a table or a data set are none."""
    if isinstance(chats, Mapping):
        raise ValueError(
            f"chats is a file, a table, or a list of chats, got {type(chats).__name__}: pass one split of a "
            "DatasetDict, or a single chat in brackets."
        )
    if isinstance(chats, ReadChats):
        contents = chats
    elif isinstance(chats, str | os.PathLike):
        contents = read_chats(chats)
    else:
        rows = [row if isinstance(row, Mapping) else _transcript(row, number) for number, row in chat_rows(chats)]
        if any(isinstance(row, Mapping) and {"role", "content"} <= set(row) for row in rows):
            raise ValueError("chats is a list of chats, each a list of messages, and got messages: pass [messages].")
        contents = read_chats(rows) if rows else ReadChats(())
    if not contents.chats:
        raise ValueError("There is nothing to monitor: pass at least one chat.")
    return contents


def _transcript(chat: Any, number: int) -> Transcript:
    if isinstance(chat, Transcript):
        return chat
    if isinstance(chat, str):
        chat = [{"role": "user", "content": chat}]
    if isinstance(chat, Conversation | RenderedPrompt):
        if isinstance(chat, RenderedPrompt) or isinstance(chat.prompt, str) or not isinstance(chat.response, str):
            raise ValueError(f"Chat {number}: expected messages, got rendered text or token ids: pass its messages.")
        chat = [*chat.prompt, *([{"role": "assistant", "content": chat.response}] if chat.response else [])]
    try:
        return Transcript(chat)
    except ValueError as error:
        raise ValueError(f"Chat {number}: {error}") from error


def _distinct(chats: Sequence[Transcript]) -> list[Transcript]:
    """The chats, each under a name of its own."""
    seen: Counter[str] = Counter()
    renamed: list[Transcript] = []
    for number, chat in enumerate(chats, start=1):
        name = chat.name or f"chat {number}"
        seen[name] += 1
        renamed.append(Transcript(chat.messages, f"{name} ({seen[name]})" if seen[name] > 1 else name))
    return renamed


def _named(vectors: Sequence[PersonaVector]) -> tuple[MonitoredVector, ...]:
    names = tuple(MonitoredVector(vector.trait, vector.layer, vector.fingerprint) for vector in vectors)
    if not names:
        raise ValueError("There is nothing to project on: pass at least one vector.")
    name, count = Counter(vector.name for vector in names).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{count} vectors are called {name}: leave one out, or tell them apart by `dataclasses.replace`."
        )
    return names


def _segments(
    model: Model, transcripts: Sequence[Transcript], window: int | None, after: str | None
) -> list[tuple[int, Segment]]:
    """The passes of every chat, each with the chat's index."""
    # An earlier turn's response is prompt to the turns after it. So turns may share a pass only where no intervention
    # treats prompt and response differently.
    shared = all(isinstance(attachment.at, str) and attachment.at == "all" for attachment in attachments(model))
    segments: list[tuple[int, Segment]] = []
    for index, chat in enumerate(transcripts):
        try:
            passes = chat_segments(model.tokenizer, chat, int(model.cfg.n_ctx), window, after=after, shared=shared)
        except ValueError as error:
            raise ValueError(f"{chat.name}: {error}") from error
        segments += [(index, segment) for segment in passes]
    return segments


def token_projections(
    model: Model,
    rows: Sequence[tuple[int, ...]],
    vectors: Sequence[PersonaVector],
    *,
    known: Callable[[Sequence[int], Bool[Tensor, "batch pos"]], KnownPass],
    token_budget: int = 2048,
) -> Iterator[tuple[int, Float[Tensor, "pos vector"]]]:
    """Each row's index with the scalar projections of its tokens, in the order in which rows ran.

    `known` makes, from a batch's row indices and its mask, what interventions are told of the pass. Check the vectors
    with `check_vectors` before. Where memory does not suffice, fewer rows run at once. Raises ValueError for
    activations that are not finite, DoesNotFit for a row that does not fit the memory alone.
    """
    acting = [layer for attachment in attachments(model) for layer in attachment.layers]
    lengths = [len(row) for row in rows]
    waiting = set(range(len(rows)))
    with attached_projections(model, vectors) as projections:
        # Interventions above the layers that are read run as well: one that never ran is an error at its exit.
        highest = max([*projections.layers, *acting])

        def attempt(left: list[int], budget: int) -> Iterator[tuple[int, Tensor]]:
            for order in length_sorted_batches([lengths[place] for place in left], budget):
                batch = [left[place] for place in order]
                ids, mask = pad([rows[place] for place in batch], left=False)
                forward(model, ids, mask, stop_after=highest, known=known(batch, mask))
                values = projections.read()
                bad = ~values.isfinite() & mask[..., None]
                if bool(bad.any()):
                    layer, row = min((vectors[vector].layer, batch[row]) for row, _, vector in bad.nonzero().tolist())
                    raise NotFinite(row, layer)
                waiting.difference_update(batch)
                for place, row_values in zip(batch, values, strict=True):
                    yield place, row_values[: lengths[place]]

        yield from backing_off(model, waiting, lengths, token_budget, attempt)


def _known_pass(segments: Sequence[tuple[int, Segment]], mask: Bool[Tensor, "batch pos"]) -> KnownPass:
    """Each row's chat and, where every row is a single turn, what of it is prompt and response."""
    rows = torch.tensor([index for index, _ in segments])
    if any(len(segment.turns) > 1 for _, segment in segments):
        return KnownPass(rows=rows)
    place = torch.arange(mask.shape[1])
    starts = torch.tensor([segment.turns[0].start for _, segment in segments]).unsqueeze(1)
    return KnownPass(rows=rows, prompt=mask & (place < starts), response=mask & (place >= starts - 1))


def _turn_projections(
    tokenizer: Any, segment: Segment, turn: Turn, values: Float[Tensor, "pos vector"], tokens: bool
) -> TurnProjections:
    response, new = values[turn.averaged : turn.stop], slice(turn.unread, turn.stop)
    by_token = None
    if tokens:
        pieces = tuple(text_pieces(tokenizer, segment.tokens[new]))
        by_token = TokenProjections(pieces, turn.start - turn.unread, values[new].float().clone())
    return TurnProjections(
        message=turn.message,
        prompt=tuple(values[turn.last_prompt].tolist()),
        response=tuple(response.double().mean(dim=0).tolist()) if len(response) else None,
        n_tokens=len(response),
        dropped_messages=turn.dropped,
        unclosed=turn.unclosed,
        tokens=by_token,
    )


def attached_in_words(model: Model) -> tuple[str, ...]:
    """Every intervention that is attached to the model, outermost first."""
    return tuple(
        f"{intervention}, at {attachment.at if isinstance(attachment.at, str) else 'a mask'}"
        for attachment in attachments(model)
        for intervention in attachment.interventions
    )
