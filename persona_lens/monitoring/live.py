"""Generate replies and project their tokens at the same time: many at once, or one token by token.

The projection of token t is read in the pass that runs it, which is the one that predicts token t + 1; the last sampled
token is run for its projection too. The token that ends the turn is no part of the reply and has no projection.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.chat.batches import Conversation, Message, RenderedPrompt, tokenize_chat
from persona_lens.chat.templates import fixed_date
from persona_lens.generation.decoding import (
    Decoder,
    FinishReason,
    check_sampling,
    generate,
    prefix_sharing,
    row_uniforms,
)
from persona_lens.interventions.directions import Vectors
from persona_lens.models.structure import Model
from persona_lens.monitoring.watch import Alert, ReplyWatch, Safeguard, spell
from persona_lens.vectors.persona_vector import PersonaVector

Chat = str | Sequence[Message] | Conversation | RenderedPrompt | Sequence[int]
"""A user message, messages, a conversation, rendered text, or token ids."""


@dataclass(frozen=True, eq=False)
class WatchedReply:
    """A reply with the projections of its tokens.

    Attributes:
        key: The key of its row.
        tokens: Its token ids, without the token that ended the turn.
        text: Their text, without special tokens.
        finish_reason: Why sampling ended.
        vectors: The vector of each column of the projections.
        prompt_projection: Projection of the prompt's last token, from which the first token is predicted.
        projections: Projections of the reply's tokens.
        counted: Which tokens may raise an alert: all, or those after the text that `after` names.
        alerts: Alerts of the safeguards that fired, in their order.
    """

    key: str
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    vectors: tuple[PersonaVector, ...]
    prompt_projection: Float[Tensor, " vector"]
    projections: Float[Tensor, "token vector"]
    counted: Bool[Tensor, " token"]
    alerts: tuple[Alert, ...]

    @property
    def mean_projection(self) -> Float[Tensor, " vector"] | None:
        """Mean over the counted tokens; None where there are none."""
        return self.projections[self.counted].mean(dim=0) if bool(self.counted.any()) else None


@dataclass(frozen=True, eq=False)
class WatchedToken:
    """A token of a reply that is being generated.

    Attributes:
        index: Its index in the reply, from 0; -1 is the last token of the prompt, which comes first.
        token: Its id.
        text: What it adds to the reply's text: nothing for the prompt's token or an incomplete character.
        projections: Its projection on each vector.
        counted: Whether it may raise an alert.
        alerts: The alerts that it raised.
    """

    index: int
    token: int
    text: str
    projections: Float[Tensor, " vector"]
    counted: bool
    alerts: tuple[Alert, ...]


@fixed_date()
def generate_watched(
    model: Model,
    chats: Sequence[Chat],
    vectors: Vectors,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    batch_size: int = 100,
    safeguards: Sequence[Safeguard] = (),
    after: str | None = None,
    audit_file: str | Path | None = None,
    allow_other_model: bool = False,
    progress: bool = True,
) -> list[WatchedReply]:
    """The model's reply to each chat, with every token's projection on every vector, read while it is generated.

    The tokens are those of `generate` with the same seed and keys until a safeguard's intervention acts, which changes
    that reply alone (others at most by rounding, where it leaves the batch at another step). A projection is the scalar
    a . v / |v| at the output of the vector's block, in float32 (float64 for a float64 model): after the interventions
    that are attached, before those of safeguards. Vectors of safeguards that are not among `vectors` get a column after
    them. With `after` (such as `"</think>"`) tokens up to that text do not count and raise no alerts, nor does the
    prompt's last token, unless the prompt ends with the text. `audit_file` gets a JSON line for every alert before its
    intervention acts.

    Raises ValueError where there is nothing to watch, a vector or an intervention does not belong to the model, or for
    what `generate` refuses. Source: arXiv:2507.21509, section 3.3.
    """
    if isinstance(chats, str) or any(isinstance(chat, Mapping) for chat in chats):
        raise ValueError("chats is a list of chats, got a single one: put it into brackets, [chat].")
    prompts = [_prompt_tokens(model, chat) for chat in chats]
    keys = [str(index) for index in range(len(prompts))] if keys is None else list(keys)
    check_sampling(model, prompts, keys, max_new_tokens, temperature, top_p)
    watch = ReplyWatch(model, prompts, keys, vectors, safeguards, after, audit_file, allow_other_model)
    with watch.attached():
        completions = generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            keys=keys,
            batch_size=batch_size,
            progress=progress,
            read_up_to=watch.top,
            back_off=False,  # a second try would raise, and record, its alerts again
        )
    return [
        WatchedReply(
            key=row.key,
            tokens=completion.tokens,
            text=spell(model.tokenizer, completion.tokens),
            finish_reason=completion.finish_reason,
            vectors=watch.vectors,
            prompt_projection=projections[0],
            projections=projections[1:],
            counted=torch.tensor(row.counted[1:], dtype=torch.bool),
            alerts=tuple(row.alerts),
        )
        for row, completion, projections in zip(watch.rows, completions, watch.projections(), strict=True)
    ]


@fixed_date()
def stream_watched(
    model: Model,
    chat: Chat,
    vectors: Vectors,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    key: str = "0",
    safeguards: Sequence[Safeguard] = (),
    after: str | None = None,
    audit_file: str | Path | None = None,
    allow_other_model: bool = False,
) -> Iterator[WatchedToken]:
    """One reply of `generate_watched`, token by token.

    First comes the last token of the prompt, with index -1 and no text; the texts join to the reply's. The model
    carries hooks only while it computes a token, so a stream that is abandoned leaves nothing behind.
    """
    prompt = _prompt_tokens(model, chat)
    check_sampling(model, [prompt], [key], max_new_tokens, temperature, top_p)
    watch = ReplyWatch(model, [prompt], [key], vectors, safeguards, after, audit_file, allow_other_model)
    uniforms, sharing = row_uniforms(seed, [key], max_new_tokens), prefix_sharing(model, [prompt])
    decoder = Decoder(model, [prompt], torch.tensor([0]), uniforms, temperature, top_p, sharing, watch.top)
    return _stream(decoder, watch)


def _prompt_tokens(model: Model, chat: Chat) -> tuple[int, ...]:
    if isinstance(chat, str):
        return tokenize_chat(model.tokenizer, [{"role": "user", "content": chat}]).prompt
    if isinstance(chat, RenderedPrompt):
        return tokenize_chat(model.tokenizer, chat.text).prompt
    if isinstance(chat, Conversation):
        return tokenize_chat(model.tokenizer, chat.prompt).prompt
    token_ids = tuple(int(token) for token in chat if isinstance(token, int))
    return token_ids or tokenize_chat(model.tokenizer, [turn for turn in chat if not isinstance(turn, int)]).prompt


def _stream(decoder: Decoder, watch: ReplyWatch) -> Iterator[WatchedToken]:
    steps, row = decoder.steps(), watch.rows[0]
    text, n_read, n_alerts, ended = "", 0, 0, False
    while not ended:
        with watch.attached():
            ended = next(steps, "ended") == "ended" or decoder.stopped[0]
        if len(row.counted) == n_read:
            return
        n_read += 1
        whole = spell(watch.model.tokenizer, row.tokens)
        # A text that ends with the replacement character lacks bytes of its last character: wait for the next token.
        piece = "" if whole.endswith("\N{REPLACEMENT CHARACTER}") and not ended else whole[len(text) :]
        text += piece
        yield WatchedToken(
            index=n_read - 2,
            token=row.tokens[-1] if row.tokens else decoder.prompts[0][-1],
            text=piece,
            projections=watch.latest(),
            counted=row.counted[-1],
            alerts=tuple(row.alerts[n_alerts:]),
        )
        n_alerts = len(row.alerts)
