"""The scores of a unit: projections of the response, of the last prompt token and of the base model's own response.

A sample's projection difference is [a_l(x, y) - a_l(x, y')] . v / |v|, where a_l is the mean over the response's tokens
of the residual stream after block l, y the response and y' what the base model itself answers, greedily
(arXiv:2507.21509, section 6). Blocks above the highest layer that is wanted do not run.
Knows nothing about files: planned rows come in, numbers go out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

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
from persona_lens.screening.batches import UNIT_ROWS, PlannedRow
from persona_lens.vectors.persona_vector import PersonaVector

BaseName = Literal["generate", "given", "proxy", "none"]
Base = BaseName | OpenAIClient
"""Where base responses come from: the model itself, the data, nowhere, or a model on a server."""


class RowScore(NamedTuple):
    """What was measured of a row; projections stand in the order of the vectors."""

    row: int
    response: tuple[float, ...]
    prompt: tuple[float, ...]
    base: tuple[float, ...] | None
    """None where the row has no base response, or an empty one."""
    base_tokens: int | None
    base_response: str | None
    """The base response where it was made here."""


@runtime_checkable
class Scorer(Protocol):
    """Whatever scores units."""

    def score(self, rows: Sequence[PlannedRow]) -> list[RowScore]:
        """The scores of all rows of a unit, in their order."""
        ...


class _BaseAnswer(NamedTuple):
    tokens: ChatTokens
    text: str | None


@dataclass(frozen=True)
class Scoring:
    """How units are scored, whoever does it.

    Attributes:
        vectors: Of any traits and layers.
        base: Where base responses come from.
        max_new_tokens: Their length limit where they are made.
        after: Average only what follows this text.
        token_budget: Padded tokens of a forward pass.
        allow_other_model: Accept vectors of an unrelated model of equal shape.
    """

    vectors: Sequence[PersonaVector]
    base: Base = "generate"
    max_new_tokens: int = 256
    after: str | None = None
    token_budget: int = 2048
    allow_other_model: bool = False

    @property
    def makes_base(self) -> bool:
        """Whether base responses are made here."""
        return self.base not in ("given", "proxy", "none")


class ModelScorer:
    """Scores units with a model; interventions that are attached to it act.

    Raises ValueError for a vector that is not the model's.
    """

    def __init__(self, model: Model, how: Scoring):
        check_vectors(model, how.vectors, allow_other_model=how.allow_other_model)
        self.model, self.how = model, how

    def score(self, rows: Sequence[PlannedRow]) -> list[RowScore]:
        """The scores of all rows of a unit, in their order."""
        answers = self._answers([row for row in rows if row.wants_base])
        asked = list(answers)
        chats = [row.tokens for row in rows] + [answers[row].tokens for row in asked]
        read = self._read(chats)
        based = dict(zip(asked, read[len(rows) :], strict=True))
        scores = []
        for row, found in zip(rows, read, strict=False):
            assert found.response is not None, "a planned row has a token to average"
            answer, base = answers.get(row.row), based.get(row.row)
            scores.append(
                RowScore(
                    row.row,
                    found.response,
                    found.prompt,
                    None if base is None else base.response,
                    None if answer is None else len(answer.tokens.response),
                    None if answer is None else answer.text,
                )
            )
        return scores

    def _read(self, chats: Sequence[ChatTokens]) -> list["_Read"]:
        """The projections of chats: of the last prompt token, and the mean over the averaged ones."""
        once = list(dict.fromkeys(chats))  # rows that share a prompt share the base model's response

        def known(batch: Sequence[int], mask: Bool[Tensor, "batch pos"]) -> KnownPass:
            place = torch.arange(mask.shape[1])
            starts = torch.tensor([[len(once[index].prompt)] for index in batch])
            return KnownPass(prompt=mask & (place < starts), response=mask & (place >= starts - 1))

        found: dict[ChatTokens, _Read] = {}
        ids = [chat.prompt + chat.response for chat in once]
        for index, values in token_projections(
            self.model, ids, self.how.vectors, known=known, token_budget=self.how.token_budget
        ):
            start = len(once[index].prompt)
            said = values[start + once[index].skip :]
            mean = tuple(said.double().mean(dim=0).tolist()) if len(said) else None
            found[once[index]] = _Read(tuple(values[start - 1].tolist()), mean)
        return [found[chat] for chat in chats]

    def _answers(self, rows: Sequence[PlannedRow]) -> dict[int, _BaseAnswer]:
        """The base model's response to each row's prompt, by the row's number; an empty one has no token."""
        if not rows or self.how.base in ("proxy", "none"):
            return {}
        if self.how.base == "given":
            given = {row.row: json.loads(row.text)["base_response"] for row in rows}
            return {row.row: _BaseAnswer(self._written(row, given[row.row]), None) for row in rows}
        # A prompt that stands in a unit many times is answered once.
        prompts = {tuple(row.prompt): row for row in rows}
        if isinstance(self.how.base, OpenAIClient):
            texts = self._served(self.how.base, list(prompts.values()))
            served = dict(zip(prompts, texts, strict=True))
            answered = {row.row: served[tuple(row.prompt)] for row in rows}
            return {row.row: _BaseAnswer(self._written(row, answered[row.row]), answered[row.row]) for row in rows}
        said = generate(
            self.model,
            list(prompts),
            max_new_tokens=self.how.max_new_tokens,
            temperature=0,
            batch_size=UNIT_ROWS,
        )
        texts = [self.model.tokenizer.decode(each.tokens, skip_special_tokens=True) for each in said]
        by_prompt = dict(zip(prompts, zip((each.tokens for each in said), texts, strict=True), strict=True))
        return {row.row: self._sampled(row, *by_prompt[tuple(row.prompt)]) for row in rows}

    def _sampled(self, row: PlannedRow, tokens: tuple[int, ...], text: str) -> _BaseAnswer:
        return _BaseAnswer(self._averaged(ChatTokens(tuple(row.prompt), tokens)), text)

    def _written(self, row: PlannedRow, text: str) -> ChatTokens:
        """A base response that is known as text, as the chat template writes it after the row's messages."""
        return self._averaged(tokenize_chat(self.model.tokenizer, json.loads(row.text)["messages"], text))

    def _averaged(self, chat: ChatTokens) -> ChatTokens:
        # Cut to what the context holds, as the base model itself would have stopped.
        tokens = chat.response[: int(self.model.cfg.n_ctx) - len(chat.prompt)]
        try:
            skip = max(chat.skip, averaged_from(self.model.tokenizer, tokens, self.how.after))
        except UnclosedBlock:
            skip = len(tokens)
        return ChatTokens(chat.prompt, tokens, skip)

    def _served(self, client: OpenAIClient, rows: Sequence[PlannedRow]) -> list[str]:
        requests = [
            ChatRequest(
                tuple(json.loads(row.text)["messages"]), max_tokens=self.how.max_new_tokens, temperature=0.0, seed=0
            )
            for row in rows
        ]
        told = only_reasoning(f"The base model {client.name}", "--base-extra-body")
        found = dict(stop_if_textless(client.complete_each(requests), lambda item: item[1].only_reasoned, told))
        return [found[index].text for index in range(len(rows))]


class _Read(NamedTuple):
    prompt: tuple[float, ...]
    response: tuple[float, ...] | None
