"""Replies with their projections: many at once as `generate` gives them, or one token by token.

The projection of token t is read in the pass that runs it, which is the one that predicts token t + 1; the token that
is sampled last runs as well. What ends a turn is no part of the reply and has no projection.
Knows nothing about hooks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.chat.batches import Message, tokenize_chat
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
from persona_lens.monitoring.watch import Alert, Safeguard, Watch, spell
from persona_lens.vectors.persona_vector import PersonaVector


@dataclass(frozen=True, eq=False)
class WatchedReply:
    """A reply with the projections of its tokens.

    Attributes:
        key: The key of its row.
        tokens: Its token ids, without the token that ended the turn.
        text: Their text, without special tokens.
        finish_reason: Why sampling ended.
        vectors: The vector of each column of the projections.
        prompt_projection: That of the prompt's last token, from which the first token is predicted.
        projections: Those of its tokens.
        counted: Which of its tokens may raise an alert: those after the closing marker, where one was named.
        alerts: Of the safeguards that fired, in the order in which they did.
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
        index: Of the reply's tokens, counted from 0; -1 is the last token of the prompt, which comes first.
        token: Its id.
        text: What it adds to the reply's text: nothing for a character that it does not complete, nor for the prompt's.
        projections: Its projection on each vector.
        counted: Whether it may raise an alert.
        alerts: Those that it raised.
    """

    index: int
    token: int
    text: str
    projections: Float[Tensor, " vector"]
    counted: bool
    alerts: tuple[Alert, ...]


def generate_watched(
    model: Model,
    prompts: Sequence[Sequence[int]],
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
    audit: str | Path | None = None,
    allow_other_model: bool = False,
    progress: bool = False,
) -> list[WatchedReply]:
    """`generate`, with the projection of every token on every vector read from the passes that generate.

    The tokens are those of `generate` with the same seed and keys until a safeguard's intervention acts, and then only
    that reply changes (others at most by rounding, where it leaves the batch at another step). A projection is the
    scalar a . v / |v| at the output of the vector's block, in float32 (float64 for a float64 model); interventions that
    are attached have acted there, the safeguards' own act after it is read. A safeguard's vector that is not among
    `vectors` is watched too, in a column after theirs. Safeguards that fired act in the order in which they are given.

    With `after` (such as `"</think>"`) tokens up to that text are marked as not counted and raise no alerts, nor does
    the prompt's last token, unless the prompt ends with that text. With `audit` every alert is on the disk, one JSON
    line each, before its intervention acts. Source: arXiv:2507.21509, section 3.3.

    Raises ValueError where nothing is to be watched, a vector or an intervention does not belong to the model, or for
    what `generate` refuses.
    """
    keys = [str(index) for index in range(len(prompts))] if keys is None else list(keys)
    check_sampling(model, prompts, keys, max_new_tokens, temperature, top_p)
    watch = Watch(
        model,
        prompts,
        keys,
        vectors,
        safeguards=safeguards,
        after=after,
        audit=audit,
        allow_other_model=allow_other_model,
    )
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
            back_off=False,  # alerts are on record already
        )
    return [
        WatchedReply(
            key=row.key,
            tokens=completion.tokens,
            text=spell(model.tokenizer, completion.tokens),
            finish_reason=completion.finish_reason,
            vectors=watch.vectors,
            prompt_projection=read[0],
            projections=read[1:],
            counted=torch.tensor(row.counted[1:], dtype=torch.bool),
            alerts=tuple(row.alerts),
        )
        for row, completion, read in zip(watch.rows, completions, watch.projections(), strict=True)
    ]


def stream_watched(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    vectors: Vectors,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    key: str = "0",
    safeguards: Sequence[Safeguard] = (),
    after: str | None = None,
    audit: str | Path | None = None,
    allow_other_model: bool = False,
) -> Iterator[WatchedToken]:
    """One reply of `generate_watched`, token by token: to messages, to rendered text, or to token ids.

    First comes the last token of the prompt, with index -1 and no text; the texts join to the reply's. The model
    carries hooks only while it computes a token, so whoever stops asking leaves it as it was.
    """
    ids = _token_ids(model, prompt)
    check_sampling(model, [ids], [key], max_new_tokens, temperature, top_p)
    watch = Watch(
        model,
        [ids],
        [key],
        vectors,
        safeguards=safeguards,
        after=after,
        audit=audit,
        allow_other_model=allow_other_model,
    )
    uniforms = row_uniforms(seed, [key], max_new_tokens)
    sharing = prefix_sharing(model, [ids])
    decoder = Decoder(model, [ids], torch.tensor([0]), uniforms, temperature, top_p, sharing, watch.top)
    return _stream(decoder, watch)


def _token_ids(model: Model, prompt: str | Sequence[Message] | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        return tuple(int(token) for token in prompt if isinstance(token, int))
    chat = prompt if isinstance(prompt, str) else [turn for turn in prompt if not isinstance(turn, int)]
    return tokenize_chat(model.tokenizer, chat).prompt


def _stream(decoder: Decoder, watch: Watch) -> Iterator[WatchedToken]:
    steps, row = decoder.steps(), watch.rows[0]
    spelt, n_read, n_alerts, ended = "", 0, 0, False
    while not ended:
        with watch.attached():
            ended = next(steps, "ended") == "ended" or decoder.stopped[0]
        if len(row.counted) == n_read:
            return
        n_read += 1
        text = spell(watch.model.tokenizer, row.tokens)
        # The replacement character ends a text whose last character still lacks some of its bytes.
        piece = "" if text.endswith("\N{REPLACEMENT CHARACTER}") and not ended else text[len(spelt) :]
        spelt += piece
        yield WatchedToken(
            index=n_read - 2,
            token=row.tokens[-1] if row.tokens else decoder.prompts[0][-1],
            text=piece,
            projections=watch.latest(),
            counted=row.counted[-1],
            alerts=tuple(row.alerts[n_alerts:]),
        )
        n_alerts = len(row.alerts)
