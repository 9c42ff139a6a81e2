"""The paper's judge: another language model reads the rubric and gives a number (arXiv:2507.21509, appendix B).

One user message holds the question and the answer. The score is the expectation over the numbers that the model could
have said first, from its 20 likeliest tokens at temperature 0. Coherence is asked for in a message of its own. How a
server's model writes numbers is detected once, by asking it, and recorded beside every score.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from persona_lens.clients.client import Ask, OpenAIClient
from persona_lens.clients.requests import (
    CallEstimate,
    ChatCompletion,
    ChatRequest,
    MissingLogprobs,
    RejectedRequest,
    ServerError,
    only_reasoning,
    stop_if_textless,
)
from persona_lens.judges.expectation import (
    MIN_MASS,
    Alternatives,
    digit_sequences,
    expectation,
    has_thoughts,
    is_refusal,
    number_tokens,
    read_number,
)
from persona_lens.judges.prompts import coherence_prompt, judge_prompt
from persona_lens.judges.scores import Score
from persona_lens.rollouts.rows import Rollout
from persona_lens.traits.trait import Trait

Scoring = Literal["whole numbers", "digits", "text"]
TEXT_TOKENS = 16
"""Length limit of an answer that is read as text."""
_READING: dict[Scoring, str] = {
    "whole numbers": "expectation over number tokens",
    "digits": "expectation over digit sequences",
    "text": "the number as written, without log-probabilities",
}


class _Judgement(NamedTuple):
    """The reading of one answer: `mass` is None without probabilities, `rejected` the status of a refused request."""

    score: float | None
    mass: float | None
    refused: bool
    reasoned: bool = False
    rejected: int | None = None


class LLMJudge:
    """Judges by asking a language model on a server, with the trait's rubric and a prompt of its own for coherence.

    Args:
        client: The server; the paper's judge is `OpenAIClient("gpt-4.1-mini-2025-04-14")`.
        scoring: How the model's number is read. `whole numbers`: from the first token, as in the paper. `digits`: for a
            tokenizer that splits numbers, by continuing from each likely first digit; the server must continue a given
            beginning, as vLLM and llama.cpp do. `text`: as written, without probabilities. By default one call detects
            it, with `text` where the server gives no log-probabilities or splits numbers and continues no beginning.
        coherence: Whether to ask for coherence too.
        min_mass: A score is missing where integers hold less than this share of the probability.
        batch_size: Rows that `score_rollouts` passes at a time.

    Limits: absolute scores are not portable between judges: compare them with `judge_agreement`. `text` scores are
    whole numbers, mostly round ones.
    """

    def __init__(
        self,
        client: OpenAIClient,
        *,
        scoring: Scoring | None = None,
        coherence: bool = True,
        min_mass: float = MIN_MASS,
        batch_size: int = 1000,
    ):
        self.client, self.coherence, self.min_mass, self.batch_size = client, coherence, min_mass, batch_size
        self._passed: Scoring | None = scoring
        self._scoring: Scoring | None = scoring

    @property
    def reading(self) -> Scoring | None:
        """How the model's numbers are read, None before it is detected; asks nothing."""
        return self._scoring

    def read_as(self, reading: str) -> None:
        """Read numbers as the scores in a file were read; raises ValueError where another way is set."""
        for scoring in _READING:
            if reading == scoring and self._scoring in (None, scoring):
                self._scoring = scoring
                return
        raise ValueError(
            f"The scores in the file were read as {reading!r}, and this judge reads {self._scoring or 'none so'}: "
            f"pass scoring={reading!r}, or choose another output."
        )

    @property
    def scoring(self) -> Scoring:
        """How the model's numbers are read; asks the server the first time unless it was passed."""
        if self._scoring is None:
            ask_once: list[Callable[[Ask], Awaitable[Scoring]]] = [_detect_scoring]
            [(_, self._scoring)] = self.client.run_each(ask_once)
        return self._scoring

    def name(self, trait: Trait) -> str:
        """The model and server, how its numbers are read, and a hash of its prompts; asks nothing.

        If `scoring` is detected, the name says only that, before and after; `reading` and the file of scores record it.
        """
        prompts = trait.rubric + coherence_prompt("", "") * self.coherence
        digest = hashlib.sha256(prompts.encode()).hexdigest()[:8]
        reading = "numbers read as the server allows" if self._passed is None else _READING[self._passed]
        missing = f", missing below {self.min_mass:g}" * (self._passed != "text")
        return f"LLM judge {self.client.name} ({reading}{missing}; prompts {digest})"

    def requests(self, trait: Trait, rollouts: Sequence[Rollout]) -> list[ChatRequest]:
        """The first call of each judgement, for whole numbers and text the only one; none for empty rows.

        May ask the server how its model writes numbers, because the calls depend on it.
        """
        _ = self.scoring  # asks
        return self._requests(trait, rollouts)

    def _requests(self, trait: Trait, rollouts: Sequence[Rollout]) -> list[ChatRequest]:
        return [
            self._request(prompt)
            for rollout in rollouts
            if not rollout.is_empty
            for prompt in self._prompts(trait, rollout)
        ]

    def estimate(self, trait: Trait, rollouts: Sequence[Rollout]) -> CallEstimate:
        """The least cost of judging these rows; asks nothing. Digits take several more calls a judgement."""
        return self.client.estimate(self._requests(trait, rollouts))

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """One score a rollout, in order; see `score_each`."""
        scores = dict(self.score_each(trait, rollouts))
        return [scores[index] for index in range(len(rollouts))]

    def score_each(self, trait: Trait, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Score]]:
        """Yield (index, score) of every rollout as the server answers; an empty response has no score.

        Evidence: `trait_mass` and `coherence_mass`, the probability of integers; `..._refused` where the judge said so;
        `..._reasoned` where an answer ended in the judge's reasoning; `..._rejected`, an HTTP status, where the server
        did not take the request though it takes others. Such a score is missing.

        Raises:
            ServerError: The server could not be asked.
            ValueError: The judge answers with reasoning alone.
        """
        filled = [index for index, rollout in enumerate(rollouts) if not rollout.is_empty]
        yield from ((index, Score(None, None)) for index, rollout in enumerate(rollouts) if rollout.is_empty)
        if not filled:
            return
        jobs = [self._job(self._prompts(trait, rollouts[index])) for index in filled]
        answers = self.client.run_each(jobs)
        message = only_reasoning(f"The judge {self.client.name}", "--judge-extra-body")
        for place, score in stop_if_textless(answers, lambda item: "trait_reasoned" in item[1].evidence, message):
            yield filled[place], score

    def _job(self, prompts: Sequence[str]) -> Callable[[Ask], Awaitable[Score]]:
        read = {"whole numbers": self._whole_number, "digits": self._digits, "text": self._text}[self.scoring]

        async def judge_row(ask: Ask) -> Score:
            calls = (_unless_rejected(read, self._request(prompt), ask) for prompt in prompts)
            # If one of the two calls fails, the other is still awaited, so that its paid answer is cached.
            judgements: list[_Judgement] = []
            for judgement in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(judgement, BaseException):
                    raise judgement
                judgements.append(judgement)
            evidence: dict[str, float] = {}
            for name, judgement in zip(("trait", "coherence"), judgements, strict=False):
                evidence |= {} if judgement.mass is None else {f"{name}_mass": judgement.mass}
                evidence |= {f"{name}_refused": 1.0} if judgement.refused else {}
                evidence |= {} if judgement.rejected is None else {f"{name}_rejected": float(judgement.rejected)}
                evidence |= {f"{name}_reasoned": 1.0} if judgement.reasoned else {}
            return Score(judgements[0].score, judgements[1].score if self.coherence else None, evidence)

        return judge_row

    def _prompts(self, trait: Trait, rollout: Rollout) -> list[str]:
        question, answer = rollout.question, rollout.response
        fills = [trait.rubric_for, *([coherence_prompt] * self.coherence)]
        return [judge_prompt(fill, question, answer) for fill in fills]

    def _request(self, prompt: str) -> ChatRequest:
        from_text = self._scoring == "text"
        return ChatRequest(
            ({"role": "user", "content": prompt},),
            max_tokens=TEXT_TOKENS if from_text else 1,
            temperature=0.0,
            seed=0,
            top_logprobs=None if from_text else 20,
        )

    async def _whole_number(self, request: ChatRequest, ask: Ask) -> _Judgement:
        answer = await ask(request)
        score, mass = expectation(number_tokens(_first_place(answer)), min_mass=self.min_mass)
        return _Judgement(score, mass, _refused(answer, score), _reasoned(answer))

    async def _digits(self, request: ChatRequest, ask: Ask) -> _Judgement:
        first = await ask(request)

        async def alternatives_after(beginning: str) -> Alternatives:
            return _first_place(await ask(replace(request, prefill=beginning)) if beginning else first)

        score, mass = expectation(await digit_sequences(alternatives_after), min_mass=self.min_mass)
        return _Judgement(score, mass, _refused(first, score), _reasoned(first))

    async def _text(self, request: ChatRequest, ask: Ask) -> _Judgement:
        answer = await ask(request)
        score = read_number(answer.text)
        return _Judgement(score, None, _refused(answer, score), answer.only_reasoned)


async def _unless_rejected(
    read: Callable[[ChatRequest, Ask], Awaitable[_Judgement]], request: ChatRequest, ask: Ask
) -> _Judgement:
    """A judgement, a missing one where the server takes other requests but not this one."""
    try:
        return await read(request, ask)
    except RejectedRequest as error:
        return _Judgement(None, None, refused=False, rejected=error.status or 200)


def _first_place(answer: ChatCompletion) -> Alternatives:
    """The alternatives of the first token; for a server that lists none, the token itself, unless it is null."""
    assert answer.tokens is not None  # the client refuses an answer without them
    first = answer.tokens[0]
    return first.alternatives or (() if first.logprob is None else ((first.text, first.logprob),))


def _refused(answer: ChatCompletion, score: float | None) -> bool:
    return score is None and (answer.refusal is not None or is_refusal(answer.text))


def _reasoned(answer: ChatCompletion) -> bool:
    # An answer of one blank token may be text that was cut, so the length limit alone proves nothing here.
    return answer.has_reasoning and answer.only_reasoned


def _refuse_reasoning(answer: ChatCompletion) -> None:
    """Raise ValueError for a judge that reasons: its first token is no number."""
    if answer.has_reasoning or answer.only_reasoned or has_thoughts(answer.text):
        raise ValueError(only_reasoning(f"The judge {answer.model}".rstrip(), "--judge-extra-body"))


async def _detect_scoring(ask: Ask) -> Scoring:
    """Detect how a server's model writes numbers: asked to copy some, it shows whether a token has several digits.

    Raises:
        ValueError: The model does not copy them, or reasons before it answers.
        ServerError: The server could not be asked.
    """
    copy = ({"role": "user", "content": "Copy these numbers: 57, 84, 92, 100"},)
    probe = ChatRequest(copy, max_tokens=32, temperature=0.0, seed=0, top_logprobs=20)
    answer = None
    try:
        answer = await ask(probe)
        _refuse_reasoning(answer)
        if not any(token.alternatives or token.logprob is not None for token in answer.tokens or ()):
            return "text"  # tokens without probabilities
        tokens = [token.text for token in answer.tokens or ()]
        if any(re.search("[0-9]{2}", text) for text in tokens):
            return "whole numbers"
        if not re.search("[0-9]{2}", "".join(tokens)):
            raise ValueError(
                f"Cannot tell how the judge writes numbers: asked to copy some, it said {answer.text!r}. "
                "Pass scoring='whole numbers', 'digits' or 'text'."
            )
        continued = await ask(replace(probe, prefill="57, 84, 9", max_tokens=1))
        continues = max(_first_place(continued), key=lambda place: place[1], default=("", 0.0))[0] == "2"
    except MissingLogprobs:
        continues = False
    except ServerError as error:
        if error.status not in (400, 422):  # a server that does not know the field
            raise
        continues = False
    if answer is None:  # probe as in judging by text, where a judge that reasons gives no number either
        _refuse_reasoning(await ask(replace(probe, max_tokens=TEXT_TOKENS, top_logprobs=None)))
    return "digits" if continues else "text"
