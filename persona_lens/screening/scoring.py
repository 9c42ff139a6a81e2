"""The scores of a unit: projections of the response, of the last prompt token and of the base model's own response.

A sample's projection difference is [a_l(x, y) - a_l(x, y')] . v / |v|, where a_l is the mean over the response's tokens
of the residual stream after block l, y the response and y' what the base model itself answers, greedily
(arXiv:2507.21509, section 6). Blocks above the highest layer that is wanted do not run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from persona_lens.activations.means import check_vectors
from persona_lens.chat.batches import ChatTokens, UnclosedBlock, averaged_from, tokenize_chat
from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import ChatRequest, only_reasoning, stop_if_textless
from persona_lens.generation.decoding import generate
from persona_lens.models.pass_context import KnownPass
from persona_lens.models.structure import Model
from persona_lens.monitoring.projection import token_projections
from persona_lens.screening.batches import UNIT_ROWS, PlannedRow, RowScore
from persona_lens.vectors.persona_vector import PersonaVector

BaseName = Literal["generate", "given", "proxy", "none"]
Base = BaseName | OpenAIClient
"""Where base responses come from: the model itself, the data, nowhere, or a model on a server."""


class _Answer(NamedTuple):
    """The base model's response to a prompt; its text where it was generated here."""

    chat: ChatTokens
    text: str | None


class _Projections(NamedTuple):
    """Of the last prompt token, and the mean over the averaged tokens; None where there is none of these."""

    prompt: tuple[float, ...]
    response: tuple[float, ...] | None


@dataclass(frozen=True)
class ModelScorer:
    """Scores units with a model; interventions that are attached to it act.

    The attributes are arguments of `screen`. Raises ValueError for a vector that is not the model's.
    """

    model: Model
    vectors: Sequence[PersonaVector]
    base: Base = "generate"
    max_new_tokens: int = 256
    after: str | None = None
    token_budget: int = 2048
    allow_other_model: bool = False

    def __post_init__(self) -> None:
        check_vectors(self.model, self.vectors, allow_other_model=self.allow_other_model)

    def score(self, rows: Sequence[PlannedRow]) -> list[RowScore]:
        """The scores of all rows of a unit, in their order."""
        answers = self._answers([row for row in rows if row.wants_base])
        projections = self._project([*(row.chat for row in rows), *(answer.chat for answer in answers.values())])
        scores = []
        for row in rows:
            own = projections[row.chat]
            assert own.response is not None, "a planned row has a token to average"
            if (answer := answers.get(row.sample.row)) is None:
                scores.append(RowScore(own.response, own.prompt))
                continue
            base = projections[answer.chat].response
            scores.append(RowScore(own.response, own.prompt, base, len(answer.chat.response), answer.text))
        return scores

    def _project(self, chats: Iterable[ChatTokens]) -> dict[ChatTokens, _Projections]:
        """The projections of chats; a chat that is there twice, as rows share a base response, is run once."""
        once = list(dict.fromkeys(chats))

        def known(batch: Sequence[int], mask: Bool[Tensor, "batch pos"]) -> KnownPass:
            place = torch.arange(mask.shape[1])
            starts = torch.tensor([[len(once[index].prompt)] for index in batch])
            # The last prompt token belongs to both: it decides the response's first token.
            return KnownPass(prompt=mask & (place < starts), response=mask & (place >= starts - 1))

        projections: dict[ChatTokens, _Projections] = {}
        ids = [chat.prompt + chat.response for chat in once]
        for index, values in token_projections(
            self.model, ids, self.vectors, known=known, token_budget=self.token_budget
        ):
            start = len(once[index].prompt)
            averaged = values[start + once[index].skip :]
            mean = tuple(averaged.double().mean(dim=0).tolist()) if len(averaged) else None
            projections[once[index]] = _Projections(tuple(values[start - 1].tolist()), mean)
        return projections

    def _answers(self, rows: Sequence[PlannedRow]) -> dict[int, _Answer]:
        """The base model's response to each row's prompt, by the row's number; an empty one has no token."""
        if not rows or self.base in ("proxy", "none"):
            return {}
        if self.base == "given":
            return {row.sample.row: _Answer(self._written(row, row.sample.base_response or ""), None) for row in rows}
        # A prompt that stands in a unit many times is answered once.
        prompts = {row.chat.prompt: row for row in rows}
        if isinstance(self.base, OpenAIClient):
            texts = dict(zip(prompts, self._served(self.base, list(prompts.values())), strict=True))
            served = [(row, texts[row.chat.prompt]) for row in rows]
            return {row.sample.row: _Answer(self._written(row, text), text) for row, text in served}
        sampled = generate(
            self.model, list(prompts), max_new_tokens=self.max_new_tokens, temperature=0, batch_size=UNIT_ROWS
        )
        generated = {
            prompt: _Answer(
                self._averaged(ChatTokens(prompt, sample.tokens)),
                self.model.tokenizer.decode(sample.tokens, skip_special_tokens=True),
            )
            for prompt, sample in zip(prompts, sampled, strict=True)
        }
        return {row.sample.row: generated[row.chat.prompt] for row in rows}

    def _written(self, row: PlannedRow, text: str) -> ChatTokens:
        """A base response that is known as text, as the chat template writes it after the row's messages."""
        return self._averaged(tokenize_chat(self.model.tokenizer, row.sample.messages, text))

    def _averaged(self, chat: ChatTokens) -> ChatTokens:
        """A base response cut to what the context holds, as the base model itself would have stopped."""
        tokens = chat.response[: int(self.model.cfg.n_ctx) - len(chat.prompt)]
        try:
            skip = max(chat.skip, averaged_from(self.model.tokenizer, tokens, self.after))
        except UnclosedBlock:
            skip = len(tokens)
        return ChatTokens(chat.prompt, tokens, skip)

    def _served(self, client: OpenAIClient, rows: Sequence[PlannedRow]) -> list[str]:
        requests = [
            ChatRequest(row.sample.messages, max_tokens=self.max_new_tokens, temperature=0.0, seed=0) for row in rows
        ]
        message = only_reasoning(f"The base model {client.name}", "--base-extra-body")
        replies = dict(stop_if_textless(client.complete_each(requests), lambda item: item[1].only_reasoned, message))
        return [replies[index].text for index in range(len(rows))]
