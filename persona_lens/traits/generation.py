"""The call that writes a trait, its one repair, and the preview that a researcher reads before using it.

A draft that fails the checks goes back in the same conversation with the whole list of problems; a second failure is an
error that carries the draft.
Knows nothing about how servers are reached: requests go to a client, completions come back.
"""

import json
import random
import re
from dataclasses import replace

from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import ChatCompletion, ChatRequest, only_reasoning
from persona_lens.traits.drafts import Draft, read_draft
from persona_lens.traits.requests import SYSTEM, Wanted, repair_text, request_text, schema, template_rubric
from persona_lens.traits.trait import InstructionPair, Trait


class TraitGenerationError(ValueError):
    """No usable trait came, in one sentence.

    Fields
        problems  everything that was wrong with the last draft
        draft     the last draft, as the LLM wrote it
    """

    def __init__(self, message: str, *, problems: tuple[str, ...] = (), draft: str = ""):
        super().__init__(message)
        self.problems, self.draft = problems, draft


def generate_trait(
    name: str,
    description: str,
    client: OpenAIClient,
    *,
    n_pairs: int = 5,
    n_questions: int = 40,
    monitoring_prompts: bool = True,
    rubric: str | None = None,
    temperature: float = 1.0,
    max_tokens: int = 8000,
    seed: int = 0,
) -> Trait:
    """A trait that an LLM writes from a name and a description, checked; read its `preview_trait` before using it.

    One call writes everything, and a second one repairs a draft that has problems. With a cache in the client, the same
    arguments cost nothing again. A whole trait is some 5,000 tokens: give the client a timeout of minutes.

    Args:
        name: The trait in a word or two; it names files.
        description: One sentence on what the trait is.
        client: The LLM that writes; the paper used Claude 3.7 Sonnet.
        n_pairs: Pairs of contrastive instructions.
        n_questions: Questions; a shuffle by `seed` gives half of them to extraction, and the odd one too.
        monitoring_prompts: Whether to ask for the eight system prompts from discouraging to encouraging.
        rubric: The judge's prompt, such as `template_rubric(name, description)`; None asks the LLM for one.
        temperature: Sampling temperature.
        max_tokens: Length limit of each call.
        seed: Sent to the server, and the seed of the division into two sets of questions.

    Raises:
        ValueError: The name, the description or the rubric is none, before anything is asked.
        TraitGenerationError: The repaired draft cannot be used either, or the answer was refused or cut.
        ServerError: The server could not be asked, or does not take JSON schemas.

    Source: arXiv:2507.21509, section 2.1 and appendix A.
    """
    request = trait_request(
        name,
        description,
        n_pairs=n_pairs,
        n_questions=n_questions,
        monitoring_prompts=monitoring_prompts,
        rubric=rubric,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
    )
    wanted = Wanted(n_pairs, n_questions, monitoring_prompts, rubric is None)
    completion = client.complete(request)
    draft, problems = _read(name, completion, wanted, max_tokens)
    if draft is None or problems:
        request = replace(request, messages=(*request.messages, *_repair(completion.text, problems)))
        completion = client.complete(request)
        draft, problems = _read(name, completion, wanted, max_tokens)
    if draft is None or problems:
        raise TraitGenerationError(
            f"{name}: the draft cannot be used after one repair ({'; '.join(problems)}). "
            "Pass another seed, or ask a stronger model.",
            problems=problems,
            draft=completion.text,
        )
    return _assemble(name.strip(), description.strip(), draft, rubric, seed)


def trait_request(
    name: str,
    description: str,
    *,
    n_pairs: int = 5,
    n_questions: int = 40,
    monitoring_prompts: bool = True,
    rubric: str | None = None,
    temperature: float = 1.0,
    max_tokens: int = 8000,
    seed: int = 0,
) -> ChatRequest:
    """The first call of `generate_trait` with these arguments: what `client.estimate([request])` prices.

    Raises ValueError as `generate_trait` does before it asks.
    """
    if n_pairs < 1 or n_questions < 1:
        raise ValueError(f"A trait needs at least one pair and one question, got {n_pairs} and {n_questions}.")
    name, description = name.strip(), description.strip()
    placeholder = Draft("a", "b", (InstructionPair("a", "b"),), ("a",))
    _assemble(name, description, placeholder, rubric or template_rubric(name, description), seed)  # before it is paid
    wanted = Wanted(n_pairs, n_questions, monitoring_prompts, rubric is None)
    return ChatRequest(
        messages=(
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": request_text(name, description, wanted)},
        ),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        json_schema=schema(wanted),
    )


def _repair(written: str, problems: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    return {"role": "assistant", "content": written}, {"role": "user", "content": repair_text(problems)}


def _read(
    name: str, completion: ChatCompletion, wanted: Wanted, max_tokens: int
) -> tuple[Draft | None, tuple[str, ...]]:
    """The draft in an answer, None where it is no JSON, and its problems; raises where asking again is no help."""
    if completion.refusal or completion.finish_reason == "content_filter":
        said = completion.refusal or "its filter stopped the answer"
        remedy = "describe the trait in other words, or ask another model"
        raise TraitGenerationError(f"{name}: {completion.model} refused ({said}): {remedy}.", draft=completion.text)
    if completion.only_reasoned:
        told = only_reasoning(f"{name}: within max_tokens={max_tokens}, {completion.model}", "--writer-extra-body")
        raise TraitGenerationError(told, problems=("the answer has no text",))
    try:
        return read_draft(completion.text, wanted)
    except json.JSONDecodeError as error:
        if completion.finish_reason == "length":
            raise TraitGenerationError(
                f"{name}: the answer was cut at max_tokens={max_tokens}, in the middle of its JSON: raise max_tokens, "
                "or ask for fewer questions.",
                problems=("the answer was cut",),
                draft=completion.text,
            ) from None
        return None, (f"the answer is not JSON ({error})",)


def _assemble(name: str, description: str, draft: Draft, rubric: str | None, seed: int) -> Trait:
    """The trait of a draft that was checked, its questions divided by a seeded shuffle."""
    questions = list(draft.questions)
    random.Random(seed).shuffle(questions)
    half = (len(questions) + 1) // 2
    return Trait(
        name=name,
        description=description,
        positive_adjective=draft.positive_adjective,
        negative_adjective=draft.negative_adjective,
        instructions=draft.instructions,
        extraction_questions=tuple(questions[:half]),
        evaluation_questions=tuple(questions[half:]),
        monitoring_prompts=draft.monitoring_prompts,
        rubric=draft.rubric if rubric is None else rubric,
    )


def preview_trait(trait: Trait) -> str:
    """The whole trait as Markdown for a human eye: what a researcher reads before anything is sampled with it."""
    adjectives = f"positive: {trait.positive_adjective}; negative: {trait.negative_adjective}"
    parts = [f"# {trait.name}", trait.description, f"Adjectives: {adjectives}", "## Instructions"]
    for number, pair in enumerate(trait.instructions, start=1):
        parts.append(f"{number}. positive: {pair.positive}\n\n   negative: {pair.negative}")
    for title, questions in (
        ("Extraction questions", trait.extraction_questions),
        ("Evaluation questions", trait.evaluation_questions),
    ):
        parts += [f"## {title} ({len(questions)})", _numbered(questions)]
    if trait.monitoring_prompts:
        parts += ["## Monitoring prompts, from discouraging to encouraging", _numbered(trait.monitoring_prompts)]
    # A fence longer than any in the rubric, so that none there ends it.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", trait.rubric)), 3)
    parts += ["## Rubric", f"{fence}\n{trait.rubric}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _numbered(texts: tuple[str, ...]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
