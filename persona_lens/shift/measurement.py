"""The finetuning shift measured: the last prompt tokens of both models, subtracted and projected.

Both sides run the same token ids in the same batches, so that what does not differ subtracts to exactly 0.
Knows nothing about how the model was finetuned, or how its answers are judged.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from persona_lens.activations import stream_means
from persona_lens.adapters import Adapter, adapted
from persona_lens.chat import ChatTokens, chat_messages, tokenize_chat
from persona_lens.foreign_text import shown_name
from persona_lens.models import Model, identify, suspended
from persona_lens.records import refuse_other_json
from persona_lens.shift.result import FinetuningShift
from persona_lens.template_date import date_told, fixed_date
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVector, PersonaVectors, Provenance, units_of

NEUTRAL = "You are a helpful assistant."

Vectors = PersonaVectors | PersonaVector
Finetuned = Model | Adapter | str | os.PathLike[str]
# Not `isinstance(_, Model)`: from Python 3.12 a protocol no longer sees submodules as attributes.
_ADAPTERS = (Adapter, str, os.PathLike)


@fixed_date()
def finetuning_shift(
    base: Model,
    finetuned: Finetuned,
    prompts: Trait | str | Sequence[str],
    vectors: Vectors | Sequence[Vectors],
    *,
    system_prompt: str = NEUTRAL,
    token_budget: int | None = None,
    allow_other_model: bool = False,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> FinetuningShift:
    """How far finetuning moved the last prompt token along persona vectors, as a mean over prompts.

    Both sides run without interventions, whatever is attached, and the base with its adapters off.

    Args:
        base: The model before finetuning.
        finetuned: The model after it; a LoRA adapter or its folder, which is on `base` for the measurement only; or
            `base` itself, where it carries an adapter that is switched on.
        prompts: Questions, or a trait (bundled: its name) for its evaluation questions.
        vectors: Of each trait those of every layer, or one, which is then reported at its layer only.
        system_prompt: Under which every question is asked.
        token_budget: Padded tokens of a batch; by default what suits the model's device.
        allow_other_model: Accept vectors of an unrelated model of equal shape.
        output: JSON file to write the result to.
        seed: Of the bootstrap over prompts.

    Raises:
        ValueError: There are no prompts or vectors; a question or a trait's layer stands twice; the models differ in
            shape, residual basis, dtype or base; prompts have other token ids in one; vectors are not the base's.
        OSError: `output` cannot be written, which is found before anything runs, or there is no adapter in the folder.

    Source: arXiv:2507.21509, section 4.2.
    """
    questions = _questions(prompts)
    given = [vectors] if isinstance(vectors, Vectors) else list(vectors)
    for each in given:
        each.check(base, allow_other_model=allow_other_model)
    if output is not None:
        refuse_other_json(Path(output), ("format_version", "traits", "questions"))
    by_trait = _by_trait(given)
    chats = [chat_messages(system_prompt, question) for question in questions]
    rows = [tokenize_chat(base.tokenizer, chat) for chat in chats]
    if not isinstance(finetuned, _ADAPTERS) and finetuned is not base:
        _refuse_unlike(base, finetuned)
        _refuse_other_tokens(questions, rows, [tokenize_chat(finetuned.tokenizer, chat) for chat in chats])
    # The finetuned side first: an adapter that does not fit is refused before anything runs.
    with _as_finetuned(base, finetuned) as model:
        after = _last_tokens(model, rows, token_budget)
    with suspended(base):
        before = _last_tokens(base, rows, token_budget)
    settings = {
        "base": _name(base),
        "finetuned": _name(finetuned),
        "system_prompt": system_prompt,
        "vectors": {
            trait: {str(layer): each.fingerprint for layer, each in held.items()} for trait, held in by_trait.items()
        },
    }
    if day := date_told(base.tokenizer):
        settings["template_date"] = day
    found = _compared(questions, before, after, by_trait, settings, seed)
    if output is not None:
        found.save(output)
    return found


def _questions(prompts: Trait | str | Sequence[str]) -> tuple[str, ...]:
    trait = load_trait(prompts) if isinstance(prompts, str) else prompts
    questions = tuple(trait.evaluation_questions if isinstance(trait, Trait) else trait)
    if not questions:
        whose = f"{trait.name} has no evaluation questions" if isinstance(trait, Trait) else "There are no prompts"
        raise ValueError(f"{whose}, and a shift is measured on some: pass a list of questions.")
    if twice := [question for question in questions if questions.count(question) > 1]:
        raise ValueError(f"The question {twice[0]!r} stands twice, and prompts count as independent: ask it once.")
    return questions


def _by_trait(given: Sequence[Vectors]) -> dict[str, dict[int, PersonaVector]]:
    """Each trait's vectors by their layers."""
    if not given:
        raise ValueError("There is nothing to project on: pass at least one vector.")
    found: dict[str, dict[int, PersonaVector]] = {}
    for each in given:
        held = found.setdefault(each.trait, {})
        layers = [each] if isinstance(each, PersonaVector) else [each.at(layer) for layer in each.known_layers]
        for vector in layers:
            if vector.layer in held:
                raise ValueError(
                    f"There are two vectors of {each.trait} at layer {vector.layer}: leave one out, or tell them apart "
                    "by `dataclasses.replace`."
                )
            held[vector.layer] = vector
    return found


def _refuse_unlike(base: Model, finetuned: Model) -> None:
    ours, theirs = identify(base), identify(finetuned)
    for fact, expected, got in (
        ("d_model", ours.d_model, theirs.d_model),
        ("n_layers", ours.n_layers, theirs.n_layers),
        ("residual basis", ours.residual_basis, theirs.residual_basis),
        ("dtype", next(iter(base.parameters())).dtype, next(iter(finetuned.parameters())).dtype),
    ):
        if expected != got:
            raise ValueError(f"The base has {fact} {expected} and the finetuned model {got}: load both in one way.")
    if Provenance.of(base, settings={}).relation_to(theirs) == "other":
        raise ValueError(
            f"{theirs.name} has embeddings unrelated to those of {ours.name}, so their difference is no finetuning "
            "shift: pass the model that it was finetuned from."
        )


def _refuse_other_tokens(questions: Sequence[str], ours: Sequence[ChatTokens], theirs: Sequence[ChatTokens]) -> None:
    unlike = [question for question, *rows in zip(questions, ours, theirs, strict=True) if rows[0] != rows[1]]
    if unlike:
        raise ValueError(
            f"{len(unlike)} of {len(questions)} prompts have other token ids in the finetuned model, the first "
            f"{unlike[0]!r}: load both models with one tokenizer and chat template."
        )


@contextmanager
def _as_finetuned(base: Model, finetuned: Finetuned) -> Iterator[Model]:
    """The finetuned model with no hook acting, its adapters on."""
    if isinstance(finetuned, _ADAPTERS):
        with suspended(base), adapted(base, finetuned):
            yield base
    else:
        with suspended(finetuned, keep_adapters=True):
            yield finetuned


class _LastTokens(NamedTuple):
    means: Float[Tensor, "prompt layer d_model"]
    norms: Float[Tensor, "prompt layer"]


def _last_tokens(model: Model, rows: Sequence[ChatTokens], token_budget: int | None) -> _LastTokens:
    shape = len(rows), int(model.cfg.n_layers)
    found = _LastTokens(
        torch.empty(*shape, int(model.cfg.d_model), dtype=torch.float32), torch.empty(shape, dtype=torch.float32)
    )
    for batch in stream_means(model, rows, position="prompt_last", token_budget=token_budget):
        found.means[batch.rows], found.norms[batch.rows] = batch.means[:, 1:], batch.norms[:, 1:]
    return found


def _compared(
    questions: tuple[str, ...],
    before: _LastTokens,
    after: _LastTokens,
    by_trait: Mapping[str, Mapping[int, PersonaVector]],
    settings: dict[str, Any],
    seed: int,
) -> FinetuningShift:
    # In float64: a float32 sum over d_model would lose a small shift along few dimensions of a large stream.
    difference = after.means.double() - before.means.double()
    projections = torch.full((len(questions), len(by_trait), difference.shape[1]), nan, dtype=torch.float32)
    for place, held in enumerate(by_trait.values()):
        moved = difference[:, list(held)]
        along = einsum(moved, units_of(list(held.values())), "prompt held d_model, held d_model -> prompt held")
        projections[:, place, list(held)] = along.float()
    mean = reduce(difference, "prompt layer d_model -> layer d_model", "mean")
    return FinetuningShift(
        tuple(by_trait),
        questions,
        projections,
        norms=difference.norm(dim=-1).float(),
        mean_norms=mean.norm(dim=-1).float(),
        base_norms=reduce(before.norms, "prompt layer -> layer", "mean"),
        d_model=difference.shape[-1],
        settings=settings,
        seed=seed,
    )


def _name(model: Finetuned) -> str:
    if isinstance(model, Adapter):
        return "an adapter in memory"
    return shown_name(model) if isinstance(model, _ADAPTERS) else identify(model).name
