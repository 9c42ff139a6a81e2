"""The one decode loop, for both model classes: batched, cached, and with every row's randomness its own.

A row's token at a step is drawn by one uniform number keyed by (seed, row key, step), through the inverse of the
cumulative distribution softmax(logits / temperature) after top-p; so its text depends neither on the batch it ran in
nor on a resume. Interventions that are attached to the model act, also row by row; prompts that repeat are run once, as
far as their rows are treated alike, and rows that have ended leave the batch.
Knows nothing about traits: prompts as token ids come in, completions go out.

Chats in, texts out: the decode loop for people who read.

Knows nothing about how tokens are drawn.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from persona_lens.activations.prefixes import pad
from persona_lens.chat.batches import Message, stop_tokens, tokenize_chat
from persona_lens.chat.templates import fixed_date
from persona_lens.generation.sampling import row_uniforms, sample
from persona_lens.interventions.hooks import attachments
from persona_lens.models.forward import Past, forward
from persona_lens.models.memory import does_not_fit, is_out_of_memory, release_memory
from persona_lens.models.pass_context import KnownPass
from persona_lens.models.structure import Model, model_device

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ReplyPass(KnownPass):
    """A pass of the decode loop over the last token of prompts, or a token of replies, in its last column.

    Attributes:
        speaking: The row of the whole plan of each prompt or reply; one that has ended is left out.
        places: The row of the batch that runs each of them; rows that share a prompt share its row.
        fed: The token of each of them.
        of_prompt: Whether these tokens are the last ones of prompts.
    """

    speaking: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    fed: tuple[int, ...] = ()
    of_prompt: bool = False


class Completion(NamedTuple):
    """Sampled token ids, without the token that ended the turn, and why sampling ended."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason


def plan_batches(n_rows: int, batch_size: int = 100) -> list[list[int]]:
    """Row indices in batches of at most `batch_size`, as even as can be, cut from the whole plan in its order.

    A resume that cuts the same plan forms the same batches.
    """
    if n_rows < 1:
        return []
    count = -(-n_rows // batch_size)
    edges = np.linspace(0, n_rows, count + 1).round().astype(int)
    return [list(range(start, stop)) for start, stop in pairwise(edges)]


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    batch_size: int = 100,
    progress: bool = False,
    read_up_to: int | None = None,
    back_off: bool = True,
) -> list[Completion]:
    """Sample a completion of every prompt (token ids), `batch_size` rows at a time.

    Temperature 0 is greedy. `keys` name the rows for their randomness (default: their index), so two rows with one
    prompt need different keys to differ. Interventions that are attached to the model act; row r of a coefficient
    matrix is prompt r, and rows that differ only in their coefficients may have one key. `read_up_to` is the highest
    layer at which hooks read the replies: the token that is sampled last, which nothing follows, runs up to it as well.
    Where memory does not suffice for a batch, it is begun anew in two halves, unless `back_off` is False.
    Raises ValueError for an empty prompt, repeated keys, or a prompt that leaves no room in the context,
    DoesNotFit for a row that memory does not suffice for alone.
    """
    keys = [str(index) for index in range(len(prompts))] if keys is None else list(keys)
    check_sampling(model, prompts, keys, max_new_tokens, temperature, top_p)
    sharing = prefix_sharing(model, prompts) if prompts else "nothing"
    completions: list[Completion] = []
    batches = plan_batches(len(prompts), batch_size)
    with tqdm(
        total=len(prompts) * max_new_tokens, unit="tok", desc="generate", leave=False, disable=not progress
    ) as bar:
        while batches:
            batch = batches.pop(0)
            decoder = Decoder(
                model,
                [tuple(prompts[row]) for row in batch],
                torch.tensor(batch),
                row_uniforms(seed, [keys[row] for row in batch], max_new_tokens),
                temperature,
                top_p,
                sharing,
                read_up_to,
            )
            if decoder.run(bar, may_fail=back_off):
                completions.extend(decoder.completions())
            else:
                middle = len(batch) // 2
                batches[:0] = [batch[:middle], batch[middle:]]
            bar.update(len(completions) * max_new_tokens - bar.n)
    return completions


def check_sampling(
    model: Model, prompts: Sequence[Sequence[int]], keys: Sequence[str], steps: int, temperature: float, top_p: float
) -> None:
    """Raise ValueError for what cannot be sampled, or not under the interventions that are attached."""
    if steps < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"Sampling needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, "
            f"got {steps}, {temperature} and {top_p}."
        )
    row_wise = [count for attached in attachments(model) for count in attached.n_rows]
    if unlike := [count for count in row_wise if count != len(prompts)]:
        raise ValueError(f"Steering has coefficients for {unlike[0]} rows, and there are {len(prompts)} prompts.")
    if len(keys) != len(prompts) or (len(set(keys)) != len(prompts) and not row_wise):
        raise ValueError(f"Sampling needs one distinct key a row, got {len(set(keys))} keys for {len(prompts)} rows.")
    room = int(model.cfg.n_ctx) - steps
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"Prompt {index} has {len(prompt)} tokens; with {steps} new ones the context allows 1 to {room}. "
                "Shorten the prompt or lower max_new_tokens."
            )


PrefixSharing = Literal["whole prompt", "all but its last token", "nothing"]


def prefix_sharing(model: Model, prompts: Sequence[Sequence[int]]) -> PrefixSharing:
    """How much of a prompt is the same for all rows that have it, under the interventions that are attached."""
    row_wise = [attached.at for attached in attachments(model) if attached.n_rows]
    if not row_wise:
        return "whole prompt"
    only_response = all(isinstance(at, str) and at == "response" for at in row_wise)
    return "all but its last token" if only_response and min(map(len, prompts)) > 1 else "nothing"


class Decoder:
    """One batch in flight: the rows that still speak, their past, and what each has said."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[tuple[int, ...]],
        rows: Int[Tensor, " row"],
        uniforms: Float[Tensor, "row step"],
        temperature: float,
        top_p: float,
        sharing: PrefixSharing,
        read_up_to: int | None = None,
    ):
        self.model, self.prompts, self.rows, self.uniforms = model, prompts, rows, uniforms
        self.temperature, self.top_p, self.sharing, self.read_up_to = temperature, top_p, sharing, read_up_to
        self.stops = stop_tokens(model)
        self.said: list[list[int]] = [[] for _ in prompts]
        self.stopped = [False] * len(prompts)
        self.running: tuple[Tensor | None, Tensor] = (None, rows)  # one tensor for as long as the same rows run

    def run(self, bar: tqdm, *, may_fail: bool) -> bool:
        """Run the batch to its end; False where memory does not suffice: an error for one row or if it may not fail."""
        try:
            for _ in self.steps():
                bar.update(len(self.prompts))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(self.prompts) == 1:
                raise does_not_fit(self.model, len(self.prompts[0]) + self.uniforms.shape[1]) from error
            if not may_fail:
                raise
        else:
            return True
        release_memory(self.model)
        return False

    def steps(self) -> Iterator[None]:
        """Run the batch, pausing after each sampled token."""
        active, past, logits = self._prefill()
        limit = self.uniforms.shape[1]
        for step in range(limit):
            tokens = sample(logits, self.uniforms[active, step], temperature=self.temperature, top_p=self.top_p)
            for row, token in zip(active.tolist(), tokens.tolist(), strict=True):
                if token in self.stops:
                    self.stopped[row] = True
                elif not self.stopped[row]:
                    self.said[row].append(token)
            yield
            alive = torch.tensor([not self.stopped[row] for row in active.tolist()])
            if not bool(alive.any()) or (step + 1 == limit and self.read_up_to is None):
                return
            # Dropping rows copies the cache, which pays once a quarter of the batch has ended.
            if alive.float().mean() <= 0.75:
                past, active, tokens = past.select(alive.nonzero()[:, 0]), active[alive], tokens.cpu()[alive]
            if step + 1 == limit:
                self._read_last(tokens, past, active)
                return
            logits, past = self._advance(tokens, past, active)

    def _prefill(self) -> tuple[Int[Tensor, " row"], Past, Float[Tensor, "row d_vocab"]]:
        """Every row's keys and values of its prompt, and the logits of the prompt's last token."""
        everyone = torch.arange(len(self.prompts))
        held_back = self.sharing == "all but its last token"
        heads = [prompt[:-1] if held_back else prompt for prompt in self.prompts]
        unique = heads if self.sharing == "nothing" else list(dict.fromkeys(heads))
        tokens, mask = pad(unique, left=True)
        last = torch.zeros_like(mask)
        last[:, -1] = not held_back
        place = {head: index for index, head in enumerate(unique)}
        origins = everyone if self.sharing == "nothing" else torch.tensor([place[head] for head in heads])
        known = KnownPass(self.rows if self.sharing == "nothing" else None, prompt=mask, response=last)
        if not held_back:
            known = self._named(known, origins, everyone, of_prompt=True)
        logits, past = forward(self.model, tokens, mask, keep_past=True, last_logits=0 if held_back else 1, known=known)
        assert past is not None
        if self.sharing != "nothing":
            past = past.select(origins)
        if held_back:
            tokens = torch.tensor([prompt[-1] for prompt in self.prompts])
            logits, past = self._advance(tokens, past, everyone, of_prompt=True)
            return everyone, past, logits
        assert logits is not None
        return everyone, past, logits[origins.to(logits.device), -1]

    def _advance(
        self, tokens: Int[Tensor, " row"], past: Past, active: Int[Tensor, " row"], *, of_prompt: bool = False
    ) -> tuple[Float[Tensor, "row d_vocab"], Past]:
        column, everywhere, known = self._column(tokens, active, of_prompt)
        logits, past_after = forward(self.model, column, everywhere, past=past, last_logits=1, known=known)
        assert logits is not None
        assert past_after is not None
        return logits[:, -1], past_after

    def _read_last(self, tokens: Int[Tensor, " row"], past: Past, active: Int[Tensor, " row"]) -> None:
        """Run the tokens that nothing follows, as far up as anything may read or change them."""
        assert self.read_up_to is not None
        column, everywhere, known = self._column(tokens, active, False)
        top = max([self.read_up_to, *(layer for attached in attachments(self.model) for layer in attached.layers)])
        forward(self.model, column, everywhere, past=past, stop_after=top, known=known)

    def _column(
        self, tokens: Int[Tensor, " row"], active: Int[Tensor, " row"], of_prompt: bool
    ) -> tuple[Int[Tensor, "row 1"], Bool[Tensor, "row 1"], KnownPass]:
        column = tokens.to(model_device(self.model))[:, None]
        everywhere = torch.ones_like(column).bool()
        if self.running[0] is not active:
            self.running = (active, self.rows[active])
        known = KnownPass(self.running[1], prompt=everywhere if of_prompt else ~everywhere, response=everywhere)
        return column, everywhere, self._named(known, torch.arange(len(active)), active, of_prompt=of_prompt)

    def _named(
        self, known: KnownPass, places: Int[Tensor, " row"], active: Int[Tensor, " row"], *, of_prompt: bool
    ) -> KnownPass:
        """The pass with what speaks in its last column, where anyone reads that."""
        if self.read_up_to is None:
            return known
        here = [pair for pair in zip(places.tolist(), active.tolist(), strict=True) if not self.stopped[pair[1]]]
        plan = self.rows.tolist()
        speaking = tuple(plan[row] for _, row in here)
        fed = tuple((self.said[row] or self.prompts[row])[-1] for _, row in here)
        spoken_at = tuple(place for place, _ in here)
        return ReplyPass(known.rows, known.prompt, known.response, speaking, spoken_at, fed, of_prompt)

    def completions(self) -> list[Completion]:
        """What each row has said by now."""
        return [
            Completion(tuple(said), "stop" if stopped else "length")
            for said, stopped in zip(self.said, self.stopped, strict=True)
        ]


@fixed_date()
def generate_text(
    model: Model,
    chats: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
    progress: bool = False,
) -> list[str]:
    """The model's reply to each chat, without special tokens: `generate`, for texts instead of token ids.

    A chat is what a user says, or messages (`role`, `content`) that the tokenizer's chat template takes. Interventions
    that are attached act. Raises ValueError for one chat where a list is expected, and for what `generate` refuses.
    """
    if isinstance(chats, str) or any(isinstance(chat, Mapping) for chat in chats):
        raise ValueError("chats is a list of chats, got a single one: put it into brackets, [chat].")
    messages = [[{"role": "user", "content": chat}] if isinstance(chat, str) else chat for chat in chats]
    completions = generate(
        model,
        [_prompt(model, number, chat) for number, chat in enumerate(messages, start=1)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return [model.tokenizer.decode(each.tokens, skip_special_tokens=True) for each in completions]


def _prompt(model: Model, number: int, chat: Sequence[Message]) -> tuple[int, ...]:
    try:
        return tokenize_chat(model.tokenizer, chat).prompt
    except ValueError as error:
        raise ValueError(f"Chat {number}: {error}") from error
