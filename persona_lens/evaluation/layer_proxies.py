"""Cheap screens of layers: what can be known of a direction without sampling a single answer under it.

Three are the extraction's own statistics. The fourth steers the model while it reads fixed texts: how much likelier the
texts that show the trait become, against those that do not, per token.
Knows nothing about sampling; whether a screen is worth anything is for the sweep to say.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from persona_lens.chat.batches import ChatTokens
from persona_lens.interventions.hooks import steer
from persona_lens.interventions.positions import NamedPositions
from persona_lens.judges.keep import keep_pairs, pair_rollouts
from persona_lens.judges.likelihood_ratio import intervened_log_likelihoods, mean_log_likelihoods
from persona_lens.judges.scores import read_scores
from persona_lens.models.structure import Model
from persona_lens.rollouts.rows import Rollout, read_rollouts
from persona_lens.traits.trait import Trait
from persona_lens.vectors.persona_vectors import PersonaVectors

SCREENS = ("held_out_auc", "relative_norm", "split_half", "likelihood_ratio_change")


class FixedTexts(NamedTuple):
    """Answers that show the trait and answers that do not."""

    positive: list[Rollout]
    negative: list[Rollout]


def fixed_texts(folder: str | Path, trait: Trait, *, pairs: int = 8) -> FixedTexts | None:
    """The first pairs of an extraction's folder that its judge kept; None where the folder holds no extraction."""
    rollouts, scores = Path(folder) / "rollouts.jsonl", Path(folder) / "scores.jsonl"
    if not (rollouts.exists() and scores.exists()):
        return None
    kept, _ = keep_pairs(pair_rollouts(read_scores(scores, read_rollouts(rollouts))), trait=trait.name, min_pairs=0)
    if not kept:
        return None
    return FixedTexts([one.rollout for one, _ in kept[:pairs]], [other.rollout for _, other in kept[:pairs]])


def screen_layers(
    model: Model,
    vectors: PersonaVectors,
    trait: Trait,
    *,
    layers: Sequence[int],
    coefficient: float,
    texts: FixedTexts | None = None,
    at: NamedPositions = "response",
    allow_other_model: bool = False,
    progress: bool = True,
) -> dict[str, tuple[float | None, ...]]:
    """Every screen of every layer; None where it was not measured."""
    relative = vectors.relative_norms.tolist()
    found: dict[str, tuple[float | None, ...]] = {"relative_norm": _known(relative, layers)}
    if vectors.statistics is not None:
        for name in ("held_out_auc", "split_half"):
            found[name] = _known(getattr(vectors.statistics, name).tolist(), layers)
    if texts is not None:
        changes = likelihood_ratio_changes(
            model,
            vectors,
            trait,
            texts,
            layers=layers,
            coefficient=coefficient,
            at=at,
            allow_other_model=allow_other_model,
            progress=progress,
        )
        found["likelihood_ratio_change"] = tuple(changes)
    return {name: found[name] for name in SCREENS if name in found}


def likelihood_ratio_changes(
    model: Model,
    vectors: PersonaVectors,
    trait: Trait,
    texts: FixedTexts,
    *,
    layers: Sequence[int],
    coefficient: float,
    at: NamedPositions = "response",
    allow_other_model: bool = False,
    progress: bool = True,
) -> list[float]:
    """How much steering each layer raises the mean log-likelihood per token of positive over negative texts, in nats.

    The texts are read after their question under a neutral system prompt, and the ratio without steering is taken off.
    Empty texts are left out; raises ValueError where a side has no others.
    """
    texts = FixedTexts(*([row for row in side if not row.is_empty] for side in texts))
    if not (texts.positive and texts.negative):
        raise ValueError(f"{trait.name}: the likelihood screen needs texts of both sides that are not empty.")
    neutral = trait.system_prompt("neutral", None)
    rows: list[ChatTokens] = [
        each.tokenize(model.tokenizer, system_prompt=neutral) for each in [*texts.positive, *texts.negative]
    ]
    count = len(texts.positive)
    plain = mean_log_likelihoods(model, rows)
    changes: list[float] = []
    for layer in tqdm(layers, desc="screen layers", unit="layer", leave=False, disable=not progress):
        with steer(model, vectors.at(layer), coefficient, at=at, allow_other_model=allow_other_model):
            change = intervened_log_likelihoods(model, rows) - plain
        changes.append(float(change[:count].mean() - change[count:].mean()))
    return changes


def _known(values: list[float], layers: Sequence[int]) -> tuple[float | None, ...]:
    # A NaN is what equals nothing, itself included.
    return tuple(values[layer] if values[layer] == values[layer] else None for layer in layers)
