"""Measure capability: multiple choice by the log-probabilities of answer letters, texts by their likelihood.

Letters are read from the logits of the last prompt token, so a question costs one row without a response; texts are
teacher-forced. Every pass announces its prompt and response, so interventions at `response` act as in generation: from
the last prompt token on (arXiv:2507.21509, section 3.2).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from persona_lens.activations.prefixes import length_sorted_batches, prompt_batch
from persona_lens.chat.batches import ChatTokens, Conversation, chat_messages, encode, tokenize_chat
from persona_lens.evaluation.capability_result import (
    AnsweredQuestion,
    Capability,
    Question,
    TextLikelihood,
    mmlu_sample,
)
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.positions import NamedPositions
from persona_lens.interventions.values import Intervention
from persona_lens.judges.likelihood_ratio import intervened_log_likelihoods
from persona_lens.models.adapters import Adapter, adapted, carries_adapter
from persona_lens.models.memory import backing_off
from persona_lens.models.structure import Model
from persona_lens.monitoring.projection import attached_in_words
from persona_lens.storage.text import shown_name
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT

Text = Conversation | tuple[str, str]
"""A conversation, or a question with its answer."""


def measure_capability(
    model: Model,
    questions: Sequence[Question] | None = None,
    *,
    texts: Sequence[Text] = (),
    interventions: Sequence[Intervention] = (),
    at: NamedPositions = "response",
    adapter: Adapter | str | os.PathLike[str] | None = None,
    system_prompt: str = NEUTRAL_SYSTEM_PROMPT,
    token_budget: int = 2048,
    allow_other_model: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Capability:
    """Accuracy on multiple-choice questions by answer letters, and the likelihood of held-out texts.

    Interventions and adapters that are on the model already act too, before those of the arguments.

    Args:
        model: The model, in either class; adapters need a bridge.
        questions: Multiple-choice questions, `mmlu_sample()` by default; `()` for texts only.
        texts: Conversations, or questions with their answers, asked under `system_prompt`; an empty answer has no
            likelihood, and is counted.
        interventions: What acts during the measurement, on the tokens that `at` names.
        at: `all`; `response`, from the last prompt token on, which predicts the letter; `prompt`.
        adapter: A LoRA adapter or its folder, on the model for the measurement only.
        system_prompt: The system prompt of every question.
        token_budget: Padded tokens of a batch of questions.
        allow_other_model: Accept vectors of an unrelated model of equal shape.
        seed: Seed of the bootstrap.
        progress: Whether to show progress bars.

    Raises:
        ImportError: `questions` are the default and lm-eval is not installed.
        ValueError: There is nothing to measure; a prompt or text does not fit the context; a vector or adapter does not
            belong to the model; log-probabilities are not finite.

    Source: arXiv:2507.21509, section 5, which measures MMLU and gives no protocol.
    """
    questions = list(mmlu_sample() if questions is None else questions)
    conversations = [_conversation(text, system_prompt) for text in texts]
    if not questions and not conversations:
        raise ValueError("There is nothing to measure: pass questions or texts, or leave questions out for MMLU's.")
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(adapted(model, adapter))
        if interventions:
            stack.enter_context(intervene(model, *interventions, at=at, allow_other_model=allow_other_model))
        log_probs = _letter_log_probs(model, questions, system_prompt, token_budget, progress)
        likelihoods = _text_likelihoods(model, conversations, progress)
        acting, adapter_name = attached_in_words(model), _adapter_name(model, adapter)
    answers = tuple(AnsweredQuestion(*pair) for pair in zip(questions, log_probs, strict=True))
    name = shown_name(str(getattr(model.cfg, "model_name", "unnamed")))
    return Capability(answers, likelihoods, name, acting, adapter_name, system_prompt, seed)


def _conversation(text: Text, system_prompt: str) -> Conversation:
    if isinstance(text, Conversation):
        return text
    question, answer = text
    return Conversation(tuple(chat_messages(system_prompt, question)), answer, question)


def _letter_log_probs(
    model: Model, questions: Sequence[Question], system_prompt: str, token_budget: int, progress: bool
) -> list[tuple[float, ...]]:
    """Each question's log-probabilities of its letters, in nats, in the order of its choices."""
    tokenizer: Any = model.tokenizer
    prompts = [tokenize_chat(tokenizer, question.messages(system_prompt)).prompt for question in questions]
    letters = {letter: encode(tokenizer, letter) for question in questions for letter in question.letters}
    longest = max(map(len, letters.values()), default=0)
    _refuse_too_long(model, "question", [len(prompt) + longest - 1 for prompt in prompts])
    if longest > 1:
        log_probs = _spelled_log_probs(model, questions, prompts, letters, progress)
    else:
        log_probs = _first_token_log_probs(model, questions, prompts, letters, token_budget, progress)
    _refuse_not_finite("question", [all(map(isfinite, row)) for row in log_probs])
    return log_probs


def _first_token_log_probs(
    model: Model,
    questions: Sequence[Question],
    prompts: Sequence[tuple[int, ...]],
    letters: dict[str, tuple[int, ...]],
    token_budget: int,
    progress: bool,
) -> list[tuple[float, ...]]:
    """For letters of one token each: only the prompts run, and only their last token is unembedded."""
    log_probs: list[tuple[float, ...]] = [()] * len(questions)
    lengths, waiting = [len(prompt) for prompt in prompts], set(range(len(prompts)))

    def attempt(left: list[int], budget: int) -> Iterator[tuple[int, Tensor]]:
        for order in length_sorted_batches([lengths[index] for index in left], budget):
            chunk = [left[place] for place in order]
            logits = prompt_batch(model, [prompts[index] for index in chunk], chunk).run(last_logits=1)
            assert logits is not None
            waiting.difference_update(chunk)
            yield from zip(chunk, _log_softmax(logits[:, -1]), strict=True)

    with tqdm(total=len(questions), desc="questions", unit="row", leave=False, disable=not progress) as bar:
        for index, row in backing_off(model, waiting, lengths, token_budget, attempt):
            log_probs[index] = tuple(row[[letters[letter][0] for letter in questions[index].letters]].tolist())
            bar.update()
    return log_probs


def _log_softmax(logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
    """On the CPU, in float32 at least: bfloat16 has steps of 0.03 nats at the size of a letter's log-probability."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide, dim=-1).cpu()


def _spelled_log_probs(
    model: Model,
    questions: Sequence[Question],
    prompts: Sequence[tuple[int, ...]],
    letters: dict[str, tuple[int, ...]],
    progress: bool,
) -> list[tuple[float, ...]]:
    """For letters of several tokens: each letter is a response, and the whole of it counts."""
    rows = [
        ChatTokens(prompt, letters[letter])
        for question, prompt in zip(questions, prompts, strict=True)
        for letter in question.letters
    ]
    means = iter(intervened_log_likelihoods(model, rows, progress=progress).tolist())
    return [tuple(next(means) * len(letters[letter]) for letter in question.letters) for question in questions]


def _text_likelihoods(model: Model, texts: Sequence[Conversation], progress: bool) -> tuple[TextLikelihood, ...]:
    rows = [text.tokenize(model.tokenizer) for text in texts]
    # An empty response has no likelihood, whatever tokens its blanks are.
    rows = [ChatTokens(row.prompt) if text.is_empty else row for text, row in zip(texts, rows, strict=True)]
    _refuse_too_long(model, "text", list(map(len, rows)))
    means = intervened_log_likelihoods(model, rows, progress=progress).tolist() if rows else []
    _refuse_not_finite("text", [isfinite(mean) or not row.response for row, mean in zip(rows, means, strict=True)])
    return tuple(
        TextLikelihood(mean if row.response else None, len(row.response), text.question)
        for text, row, mean in zip(texts, rows, means, strict=True)
    )


def _refuse_too_long(model: Model, what: str, lengths: Sequence[int]) -> None:
    limit = int(model.cfg.n_ctx)
    if long := [(number, length) for number, length in enumerate(lengths, start=1) if length > limit]:
        raise ValueError(
            f"Expected at most {limit} tokens, the model's context, and {what} {long[0][0]} has {long[0][1]} "
            f"({len(long)} of {len(lengths)} are too long): shorten it or leave it out."
        )


def _refuse_not_finite(what: str, finite: Sequence[bool]) -> None:
    if not all(finite):
        raise ValueError(
            f"The model's log-probabilities are not finite at {what} {finite.index(False) + 1}: load it with a wider "
            "dtype (float32), or steer with a smaller coefficient."
        )


def _adapter_name(model: Model, adapter: Adapter | str | os.PathLike[str] | None) -> str | None:
    if isinstance(adapter, Adapter):
        return "an adapter in memory"
    if adapter is not None:
        return shown_name(adapter)
    return "one that was on the model" if carries_adapter(model) else None
