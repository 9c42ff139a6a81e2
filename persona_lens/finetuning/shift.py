"""The finetuning shift: how far finetuning moved the last prompt token along persona vectors, by layer.

Both models run the same token ids in the same batches, so that what does not differ subtracts to exactly 0. The result
has each prompt's shift, the mean with its interval, and controls (arXiv:2507.21509, section 4).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, isnan, nan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from persona_lens.activations.means import stream_means
from persona_lens.chat.batches import ChatTokens, chat_messages, tokenize_chat
from persona_lens.chat.templates import date_told, fixed_date
from persona_lens.models.adapters import Adapter, adapted
from persona_lens.models.structure import Model, identify, suspended
from persona_lens.statistics import Estimate, mean_estimate
from persona_lens.storage.files import DAMAGE, checked, refuse_other_json, write_json
from persona_lens.storage.text import shown_name
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT, Trait, load_trait
from persona_lens.vectors.persona_vector import PersonaVector, refuse_absent_layer, units_of
from persona_lens.vectors.persona_vectors import PersonaVectors
from persona_lens.vectors.provenance import Provenance

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
_TENSORS = ("projections", "norms", "mean_norms", "base_norms")


@dataclass(frozen=True, eq=False)
class FinetuningShift:
    """How far finetuning moved the last prompt token, at every layer, with what to hold the number against.

    Attributes:
        traits: The traits that were projected on.
        questions: What the prompts asked, one prompt each.
        projections: Scalar projection of each prompt's difference, finetuned minus base, on each trait's unit vector;
            NaN at layers that the trait was given no vector for.
        norms: Euclidean norm of each prompt's difference.
        mean_norms: Euclidean norm of the mean difference over the prompts.
        base_norms: Mean norm of the base's residual stream at those tokens.
        d_model: Width of the residual stream.
        settings: What it was made with: models, system prompt, vectors.
        seed: Seed of the bootstrap.

    Limits: it says where the model stands as it begins to answer, and a finetuned model may turn later on.
    """

    traits: tuple[str, ...]
    questions: tuple[str, ...] = field(repr=False)
    projections: Float[Tensor, "prompt vector layer"] = field(repr=False)
    norms: Float[Tensor, "prompt layer"] = field(repr=False)
    mean_norms: Float[Tensor, " layer"] = field(repr=False)
    base_norms: Float[Tensor, " layer"] = field(repr=False)
    d_model: int
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        layers = list(self.mean_norms.shape)
        for name, expected in (
            ("projections", [len(self.questions), len(self.traits), *layers]),
            ("norms", [len(self.questions), *layers]),
            ("base_norms", layers),
        ):
            if (got := list(getattr(self, name).shape)) != expected:
                raise ValueError(f"A shift of these prompts and traits needs {name} of shape {expected}, got {got}.")

    @property
    def n_layers(self) -> int:
        """How many layers the models have."""
        return self.mean_norms.shape[0]

    @property
    def random_spread(self) -> Float[Tensor, " layer"]:
        """The control: standard deviation of the mean shift along random unit directions, uniform on the sphere.

        In closed form: a fixed vector's projection on such a direction has mean 0 and standard deviation
        |vector| / sqrt(d_model). Its limit: real streams vary more along some directions than along others.
        """
        return self.mean_norms / sqrt(self.d_model)

    def layers(self, trait: str | None = None) -> list[int]:
        """The layers at which there is a vector of the trait, which may be left out where there is one trait only."""
        held = self.projections[0, self._place(trait)].isfinite()
        return [layer for layer in range(self.n_layers) if held[layer]]

    def at(self, layer: int, trait: str | None = None) -> Estimate:
        """The trait's mean shift at a layer, counted from 0, with its interval over prompts.

        Raises ValueError for a layer or trait that was not measured.
        """
        place = self._place(trait)
        refuse_absent_layer(self.traits[place], layer, self.n_layers)
        values = self.projections[:, place, layer].tolist()
        if isnan(values[0]):
            raise ValueError(
                f"{self.traits[place]}: the shift was measured at layers {self.layers(trait)}, got layer {layer}: "
                "measure it with the vectors of every layer."
            )
        return mean_estimate(values, self.questions, seed=self.seed)

    def curve(self, trait: str | None = None) -> "pandas.DataFrame":
        """The trait's shift by layer: `shift`, `low`, `high`, and what to hold it against.

        `norm` is the length of the whole mean difference, `relative` the shift over the base's mean residual norm,
        `cosine` how much of the difference lies along the vector (NaN where nothing moved), `random_spread` the
        control.
        """
        import pandas

        layers = self.layers(trait)
        found = [self.at(layer, trait) for layer in layers]
        index = pandas.Index(layers, name="layer")
        table = pandas.DataFrame({"shift": [each.value for each in found]}, index=index, dtype=float)
        table["low"], table["high"] = ([getattr(each, end) for each in found] for end in ("low", "high"))
        table["norm"] = self.mean_norms[layers].tolist()
        table["relative"] = table["shift"] / self.base_norms[layers].tolist()
        table["cosine"] = table["shift"] / table["norm"]
        table["random_spread"] = self.random_spread[layers].tolist()
        return table.astype(float)

    def table(self) -> "pandas.DataFrame":
        """The curves of all traits under each other, by `trait` and `layer`."""
        import pandas

        return pandas.concat({trait: self.curve(trait) for trait in self.traits}, names=["trait"])

    def summary(self) -> dict[str, Any]:
        """The result as JSON; what is undefined is None."""
        curves = {trait: self.curve(trait).reset_index() for trait in self.traits}
        return {
            "prompts": len(self.questions),
            # pandas writes ten decimals unless told otherwise, and 15 at most.
            "traits": {
                trait: json.loads(curve.to_json(orient="records", double_precision=15) or "[]")
                for trait, curve in curves.items()
            },
        }

    def __str__(self) -> str:
        return "\n".join(self._line(trait) for trait in self.traits)

    def _line(self, trait: str) -> str:
        # Quarters of the depth, so that no layer is chosen by its result.
        layers = self.layers(trait)
        shown = sorted({layers[ceil(len(layers) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)})
        parts = (f"layer {layer} {_decimals(self.at(layer, trait), self.random_spread[layer])}" for layer in shown)
        return f"{trait}, shift over {len(self.questions)} prompts: {'; '.join(parts)}"

    def _place(self, trait: str | None) -> int:
        if trait is None and len(self.traits) == 1:
            return 0
        if trait not in self.traits:
            raise ValueError(
                f"The shift was measured along {', '.join(self.traits)}, got {trait!r}: name one of these."
            )
        return self.traits.index(trait)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, whole or not at all."""
        record = {name: getattr(self, name) for name in ("traits", "questions", "d_model", "settings", "seed")}
        tensors = {name: _listed(getattr(self, name).tolist()) for name in _TENSORS}
        write_json(Path(path), {"format_version": FORMAT_VERSION, **record, "summary": self.summary(), **tensors})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FinetuningShift":
        """What `save` wrote; raises ValueError where the file is damaged or of another format."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {saved['format_version']}, and this reads {FORMAT_VERSION}")
            # numpy takes None for the NaN that it stands for.
            with np.errstate(over="raise"):  # a number that float32 has not
                tensors = {name: torch.from_numpy(np.array(saved[name], dtype=np.float32)) for name in _TENSORS}
            names = {name: tuple(saved[name]) for name in ("traits", "questions")}
            checked(saved["seed"], int, low=0)
            checked(saved["d_model"], int, low=1)
            checked(saved["settings"], dict)
            for each in (*saved["traits"], *saved["questions"]):
                checked(each, str)
            found = cls(**names, **tensors, **{name: saved[name] for name in ("d_model", "settings", "seed")})
            if bare := [trait for trait in found.traits if not found.layers(trait)]:
                raise ValueError(f"no layer of {bare[0]} has a number")
            return found
        except DAMAGE as error:
            raise ValueError(f"{path} is not a finetuning shift ({error}): measure it again.") from error


def _listed(values: Any) -> Any:
    """Nested lists with None for NaN, which JSON has not."""
    if isinstance(values, list):
        return [_listed(value) for value in values]
    return None if isnan(values) else values


def _decimals(found: Estimate, spread: Tensor) -> str:
    interval = "" if found.low is None else f" [{found.low:.3g}, {found.high:.3g}]"
    return f"{found.value:.3g}{interval} (random directions ±{float(spread):.2g})"


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
    system_prompt: str = NEUTRAL_SYSTEM_PROMPT,
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
