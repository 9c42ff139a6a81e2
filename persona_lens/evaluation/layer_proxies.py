"""Cheap proxies for a layer sweep: what predicts the best layer without sampling an answer.

Three are statistics of the extraction. The fourth steers the model while it reads fixed texts: how much likelier, per
token, the texts that show the trait become than those that do not. The sweep itself says whether a proxy is any good
(`LayerSweep.proxy_correlations`).
"""

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from persona_lens.interventions.hooks import steer
from persona_lens.interventions.positions import NamedPositions
from persona_lens.judges.keep import keep_pairs, pair_rollouts
from persona_lens.judges.likelihood_ratio import intervened_log_likelihoods, mean_log_likelihoods
from persona_lens.judges.scores import read_scores
from persona_lens.models.structure import Model
from persona_lens.rollouts.rows import Rollout, read_rollouts
from persona_lens.traits.trait import Trait
from persona_lens.vectors.persona_vectors import PersonaVectors

PROXIES = ("held_out_auc", "relative_norm", "split_half", "likelihood_ratio_change")


class FixedTexts(NamedTuple):
    """Answers that show the trait and answers that do not."""

    positive: list[Rollout]
    negative: list[Rollout]


def fixed_texts(folder: str | Path, trait: Trait, *, pairs: int = 8) -> FixedTexts | None:
    """The first kept pairs of an extraction's folder; None where the folder holds no extraction."""
    rollouts, scores = Path(folder) / "rollouts.jsonl", Path(folder) / "scores.jsonl"
    if not (rollouts.exists() and scores.exists()):
        return None
    kept, _ = keep_pairs(pair_rollouts(read_scores(scores, read_rollouts(rollouts))), trait=trait.name, min_pairs=0)
    if not kept:
        return None
    return FixedTexts([one.rollout for one, _ in kept[:pairs]], [other.rollout for _, other in kept[:pairs]])


def stored_proxies(vectors: PersonaVectors, layers: Sequence[int]) -> dict[str, tuple[float | None, ...]]:
    """The proxies that the vectors carry with them; None for a layer where one was not measured."""
    statistics = {"relative_norm": vectors.relative_norms}
    if vectors.statistics is not None:
        statistics |= {name: getattr(vectors.statistics, name) for name in ("held_out_auc", "split_half")}
    by_layer = {name: statistics[name].tolist() for name in PROXIES if name in statistics}
    return {
        name: tuple(None if isnan(values[layer]) else values[layer] for layer in layers)
        for name, values in by_layer.items()
    }


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

    The texts are read after their question under a neutral system prompt, and the ratio without steering is subtracted.
    Empty texts are left out; raises ValueError where a side has no others.
    """
    texts = FixedTexts(*([row for row in side if not row.is_empty] for side in texts))
    if not (texts.positive and texts.negative):
        raise ValueError(f"{trait.name}: the likelihood proxy needs texts of both sides that are not empty.")
    neutral = trait.system_prompt("neutral", None)
    rows = [row.tokenize(model.tokenizer, system_prompt=neutral) for row in [*texts.positive, *texts.negative]]
    n_positive = len(texts.positive)
    unsteered = mean_log_likelihoods(model, rows)
    changes: list[float] = []
    for layer in tqdm(layers, desc="likelihood proxy", unit="layer", leave=False, disable=not progress):
        with steer(model, vectors.at(layer), coefficient, at=at, allow_other_model=allow_other_model):
            change = intervened_log_likelihoods(model, rows) - unsteered
        changes.append(float(change[:n_positive].mean() - change[n_positive:].mean()))
    return changes
