"""The one decode loop, for both model classes: batched, cached, with interventions acting and activations read.

A batch goes through `Decoder` in three stages.

1. Prefill. Prompts that repeat run once, padded on the left so that the last token of each stands in the last column,
   and each row gets a copy of its prompt's keys and values. Where rows have steering coefficients of their own, only
   what is the same for all rows of a prompt may be shared (`prefix_sharing`).
2. Steps. The logits of the last column give one token a row; those tokens are the next pass, one column wide, onto the
   cache. A row that has ended stays in the batch, ignored, until a quarter of the batch has ended: dropping rows copies
   the cache.
3. The last token. A row that ends at the length limit has one token that was sampled and never run. Where someone reads
   activations (`read_up_to`), one more pass runs it, so that every token of a reply is read exactly once.

A row's token at a step is drawn by one uniform number keyed by (seed, row key, step), so its text depends neither on
the batch it ran in nor on a resume.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from persona_lens.activations.prefixes import pad
from persona_lens.chat.batches import Chat, list_of_chats, prompt_tokens, stop_tokens
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
    """A pass of the decode loop, whose last column holds the last token of each prompt or one token of each reply.

    Attributes:
        speaking: The rows of the whole plan that this column belongs to, without those that have ended.
        places: The row of the batch in which each of them runs; rows that share a prompt share its row.
        fed: The token of each of them in the last column.
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
    """Row indices in their order, in batches of at most `batch_size` that are as even as possible.

    They depend on the number of rows alone, so a resume of the same plan forms the same batches.
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

    Interventions that are attached to the model act; row r of a coefficient matrix is for prompt r.

    Args:
        model: Either class.
        prompts: Token ids, one sequence a row.
        max_new_tokens: Length limit of a completion.
        temperature: 0 is greedy.
        top_p: Sample from the most likely tokens that have this share of the probability together.
        seed: Of the sampling.
        keys: Names of the rows for their randomness (default: their index); two rows with one prompt differ only if
            their keys do. Rows that differ in their steering coefficients may have one key.
        batch_size: Rows decoded together.
        progress: Whether to show a bar.
        read_up_to: The highest layer at which hooks read the replies; the token that is sampled last runs up to it too.
        back_off: Whether a batch that does not fit the memory is begun anew in two halves.

    Raises:
        ValueError: An empty prompt, repeated keys, or a prompt that leaves no room in the context.
        DoesNotFit: The memory does not suffice for one row.
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
            else:  # too large for the memory: its two halves come next, so completions stay in the order of the prompts
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
    """One batch in flight: which rows run, their keys and values, and what each has said.

    Two numberings of rows occur: places in this batch (`active`, `said`, `stopped`), and rows of the whole plan
    (`rows`), which is what hooks and coefficient matrices count in.
    """

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
        # The active rows and their rows in the plan. As long as the same rows run this is the same tensor object, by
        # which `Steer` sees that the deltas of the last step still hold.
        self._plan_rows: tuple[Tensor | None, Tensor] = (None, rows)

    def run(self, bar: tqdm, *, may_fail: bool) -> bool:
        """Run the batch to its end; False if it does not fit the memory. One row that does not fit is an error."""
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
        # Outside of `except`, where the exception would still hold the tensors of the pass that failed.
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
                elif not self.stopped[row]:  # a row that has ended is still sampled, and what it says is ignored
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
        # Row-wise steering of the response acts on a prompt's last token already: that one runs in a pass of its own.
        held_back = self.sharing == "all but its last token"
        heads = [prompt[:-1] if held_back else prompt for prompt in self.prompts]
        unique = heads if self.sharing == "nothing" else list(dict.fromkeys(heads))
        place = {head: index for index, head in enumerate(unique)}
        origins = everyone if self.sharing == "nothing" else torch.tensor([place[head] for head in heads])
        tokens, mask = pad(unique, left=True)
        last = torch.zeros_like(mask)
        last[:, -1] = not held_back
        # A shared row serves several rows of the plan, so it has no row of its own: row-wise values refuse such a pass.
        known = KnownPass(self.rows if self.sharing == "nothing" else None, prompt=mask, response=last)
        if not held_back:
            known = self._announced(known, origins, everyone, of_prompt=True)
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
        """Run one token a row onto the cache; the logits that follow it, and the cache that it is in."""
        column, everywhere, known = self._column(tokens, active, of_prompt)
        logits, past_after = forward(self.model, column, everywhere, past=past, last_logits=1, known=known)
        assert logits is not None
        assert past_after is not None
        return logits[:, -1], past_after

    def _read_last(self, tokens: Int[Tensor, " row"], past: Past, active: Int[Tensor, " row"]) -> None:
        """Run the tokens that nothing follows, only as far up as something reads or changes them."""
        assert self.read_up_to is not None
        column, everywhere, known = self._column(tokens, active, False)
        top = max([self.read_up_to, *(layer for attached in attachments(self.model) for layer in attached.layers)])
        forward(self.model, column, everywhere, past=past, stop_after=top, known=known)

    def _column(
        self, tokens: Int[Tensor, " row"], active: Int[Tensor, " row"], of_prompt: bool
    ) -> tuple[Int[Tensor, "row 1"], Bool[Tensor, "row 1"], KnownPass]:
        """A pass over one token a row: its tokens, a mask without padding, and what is announced of it."""
        column = tokens.to(model_device(self.model))[:, None]
        everywhere = torch.ones_like(column).bool()
        if self._plan_rows[0] is not active:
            self._plan_rows = (active, self.rows[active])
        known = KnownPass(self._plan_rows[1], prompt=everywhere if of_prompt else ~everywhere, response=everywhere)
        return column, everywhere, self._announced(known, torch.arange(len(active)), active, of_prompt=of_prompt)

    def _announced(
        self, known: KnownPass, places: Int[Tensor, " row"], active: Int[Tensor, " row"], *, of_prompt: bool
    ) -> KnownPass:
        """The pass as hooks that read replies need it: with the rows and tokens of its last column."""
        if self.read_up_to is None:
            return known
        pairs = zip(places.tolist(), active.tolist(), strict=True)
        running = [(place, row) for place, row in pairs if not self.stopped[row]]
        plan = self.rows.tolist()
        return ReplyPass(
            known.rows,
            known.prompt,
            known.response,
            speaking=tuple(plan[row] for _, row in running),
            places=tuple(place for place, _ in running),
            fed=tuple((self.said[row] or self.prompts[row])[-1] for _, row in running),
            of_prompt=of_prompt,
        )

    def completions(self) -> list[Completion]:
        """What each row has said by now."""
        return [
            Completion(tuple(said), "stop" if stopped else "length")
            for said, stopped in zip(self.said, self.stopped, strict=True)
        ]


@fixed_date()
def generate_text(
    model: Model,
    chats: Sequence[Chat],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
    progress: bool = False,
) -> list[str]:
    """The model's reply to each chat, without special tokens: `generate`, for texts instead of token ids.

    A chat is a string (a user message), a list of messages (`role`, `content`), a `Conversation`, whose own response is
    not used, or a `RenderedPrompt`. Interventions that are attached act. Raises ValueError for a single chat where a
    list is expected, and for what `generate` refuses.
    """
    completions = generate(
        model,
        [_prompt(model, number, chat) for number, chat in enumerate(list_of_chats(chats), start=1)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return [model.tokenizer.decode(each.tokens, skip_special_tokens=True) for each in completions]


def _prompt(model: Model, number: int, chat: Chat) -> tuple[int, ...]:
    try:
        return prompt_tokens(model.tokenizer, chat)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Chat {number}: {error}") from error
