"""What every run of the finetuning study shares: the model's own neutral text, vectors, judges, and each mood's layer.

Made once, kept in the study's folder, and never from the prompts that runs are measured on.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from persona_lens.activations.means import stream_means
from persona_lens.chat.batches import ChatTokens, chat_messages, tokenize_chat
from persona_lens.chat.encoding import encode_content
from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
from persona_lens.judges.likelihood_ratio import (
    CoherenceScale,
    distinct_four_grams,
    mean_log_likelihoods,
    shuffle_words,
)
from persona_lens.models.structure import Model
from persona_lens.rollouts.collection import collect_rollouts
from persona_lens.rollouts.engines import Cell, CellEngine, ModelEngine
from persona_lens.rollouts.rows import Prompt, Rollout
from persona_lens.storage.files import write_json
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from persona_lens.traits.trait import Trait
from persona_lens.vectors.directions import difference_in_means
from persona_lens.vectors.persona_vectors import PersonaVectors
from studies.finetuning_plan import StudySettings
from studies.mood_texts import Contrast, contrast_with_moods, contrast_with_neutral, mood_judge
from studies.moods import MOODS, MoodSplit, load_moods, mood_trait, split_prompts

AGAINST_NEUTRAL = "{} against neutral"
MIN_COHERENCE = 75.0


@dataclass(frozen=True)
class Materials:
    """What every run shares.

    Attributes:
        split: The moods' rows, and the prompts of each part.
        neutral: The model's own responses, whole sentences, to prompts of every part.
        vectors: Each mood's vectors, mood against the other moods.
        against_neutral: Each mood's vectors, mood against the model's own responses.
        judges: Each mood's classifier.
        coherence: The scale of coherence under the base model.
        layers: The layer at which each mitigated mood is steered.
    """

    split: MoodSplit
    neutral: tuple[Rollout, ...]
    vectors: dict[str, PersonaVectors]
    against_neutral: dict[str, PersonaVectors]
    judges: dict[str, TextClassifier]
    coherence: CoherenceScale
    layers: dict[str, int]

    def trait(self, mood: str) -> Trait:
        """The mood as a trait."""
        return mood_trait(mood, self.split)

    def neutral_to(self, prompts: Sequence[str]) -> list[Rollout]:
        """The model's own responses to these prompts."""
        wanted = set(prompts)
        return [row for row in self.neutral if row.question in wanted and not row.is_empty]


def make_materials(model: Model, settings: StudySettings, folder: Path, *, progress: bool = True) -> Materials:
    """Everything that runs share, from the folder where it stands there already."""
    split = split_prompts(load_moods(), settings.seed)
    neutral = _neutral(model, split, settings, folder, progress)
    contrasts = {mood: contrast_with_moods(split, mood) for mood in MOODS}
    contrasts |= {AGAINST_NEUTRAL.format(mood): contrast_with_neutral(split, mood, neutral) for mood in MOODS}
    every = _vectors(model, contrasts, folder, progress)
    vectors = {mood: every[mood] for mood in MOODS}
    against_neutral = {mood: every[AGAINST_NEUTRAL.format(mood)] for mood in MOODS}
    judges = {mood: _judge(split, mood, neutral, folder) for mood in MOODS}
    to_judge = [row for row in neutral if row.question in set(split.judge) and not row.is_empty]
    coherence = _coherence(model, to_judge, folder)
    layers = _layers(model, settings, split, vectors, judges, coherence, folder, progress)
    return Materials(split, tuple(neutral), vectors, against_neutral, judges, coherence, layers)


def _neutral(model: Model, split: MoodSplit, settings: StudySettings, folder: Path, progress: bool) -> list[Rollout]:
    # Drawn, since a part's prompts stand by domain.
    drawn = [
        random.Random(settings.seed).sample(part, settings.neutral_prompts) for part in (split.judge, split.finetuning)
    ]
    questions = [*split.vectors, *drawn[0], *drawn[1], *split.evaluation]
    prompts = [Prompt("neutral", "neutral", None, NEUTRAL, question, 0) for question in questions]
    engine = ModelEngine(model, settings.neutral_tokens)
    rows = collect_rollouts(
        engine, prompts, seed=settings.seed, output_file=folder / "neutral.jsonl", progress=progress
    )
    return [_whole_sentences(row) for row in rows]


def _whole_sentences(row: Rollout) -> Rollout:
    """A response that met its length limit, cut back to where its last sentence ends; empty where none does."""
    if row.finish_reason != "length":
        return row
    ends = max(row.response.rfind(mark) for mark in (". ", "! ", "? ", ".\n", "!\n", "?\n"))
    return replace(row, response=row.response[: ends + 1], response_tokens=None)


def _vectors(model: Model, contrasts: dict[str, Contrast], folder: Path, progress: bool) -> dict[str, PersonaVectors]:
    """The difference in means of each contrast; contrasts share most of their responses, so each is run once."""
    paths = {name: folder / "vectors" / f"{name.replace(' ', '_')}.safetensors" for name in contrasts}
    if all(path.exists() for path in paths.values()):
        return {name: PersonaVectors.load(path) for name, path in paths.items()}
    responses = {
        (row.question, row.response): row for contrast in contrasts.values() for side in contrast[:2] for row in side
    }
    place = {key: index for index, key in enumerate(responses)}
    means = torch.empty(len(place), model.cfg.n_layers + 1, model.cfg.d_model, dtype=torch.float32)
    norms = torch.empty(len(place), model.cfg.n_layers + 1, dtype=torch.float32)
    rows = [row.tokenize(model.tokenizer) for row in responses.values()]
    with tqdm(total=len(rows), desc="vectors", unit="row", disable=not progress) as bar:
        for batch in stream_means(model, rows):
            means[batch.rows], norms[batch.rows] = batch.means, batch.norms
            bar.update(len(batch.rows))
    by_name = {}
    for name, contrast in contrasts.items():
        positive, negative = ([place[row.question, row.response] for row in side] for side in contrast[:2])
        delta = difference_in_means(means[positive], means[negative])
        norm = norms[positive + negative].mean(dim=0)[1:]
        vectors = PersonaVectors.from_directions(
            delta[1:], trait=name, model=model, residual_norm=norm, embedding=delta[0]
        )
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        vectors.save(paths[name])
        by_name[name] = vectors
    return by_name


def _judge(split: MoodSplit, mood: str, neutral: Sequence[Rollout], folder: Path) -> TextClassifier:
    path = folder / "judges" / f"{mood}.safetensors"
    if path.exists():
        return TextClassifier.load(path)
    judge = mood_judge(split, mood, neutral)
    path.parent.mkdir(parents=True, exist_ok=True)
    judge.save(path)
    return judge


def _coherence(model: Model, neutral: Sequence[Rollout], folder: Path) -> CoherenceScale:
    path = folder / "coherence.json"
    if not path.exists():
        clean = base_nlls(model, neutral)
        texts = [shuffle_words(row.response, index) for index, row in enumerate(neutral)]
        shuffled = base_nlls(model, [replace(row, response=text) for row, text in zip(neutral, texts, strict=True)])
        distinct = [distinct_four_grams(encode_content(model.tokenizer, row.response)) for row in neutral]
        scale = CoherenceScale.fit(clean, shuffled, distinct)
        write_json(path, {"centre": scale.centre, "width": scale.width, "distinct_floor": scale.distinct_floor})
    return CoherenceScale(**json.loads(path.read_text(encoding="utf-8")))


def base_nlls(model: Model, rows: Sequence[Rollout]) -> np.ndarray:
    """NLL per token of responses under the base model and the neutral system prompt; NaN for an empty one."""
    return -mean_log_likelihoods(model, [_under(model, row, NEUTRAL) for row in rows]).double().numpy()


def mood_ratios(model: Model, trait: Trait, rows: Sequence[Rollout]) -> np.ndarray:
    """How much likelier a token of each response is where the mood is ordered than where a neutral manner is, in nats.

    Under the base model: the mean log-likelihood ratio that the likelihood-ratio judge is made of, not calibrated.
    """
    sides = [
        mean_log_likelihoods(model, [_under(model, row, trait.system_prompt(polarity, 0)) for row in rows])
        for polarity in ("positive", "negative")
    ]
    return (sides[0] - sides[1]).double().numpy()


def _under(model: Model, row: Rollout, system_prompt: str) -> ChatTokens:
    return tokenize_chat(model.tokenizer, chat_messages(system_prompt, row.question), row.response)


def coherence_scores(model: Model, scale: CoherenceScale, rows: Sequence[Rollout]) -> list[float | None]:
    """Coherence from 0 to 100 under the base model; None for an empty response."""
    distinct = [distinct_four_grams(encode_content(model.tokenizer, row.response)) for row in rows]
    return [
        None if row.is_empty or np.isnan(nll) else scale.score(float(nll), share)
        for row, nll, share in zip(rows, base_nlls(model, rows), distinct, strict=True)
    ]


def _layers(
    model: Model,
    settings: StudySettings,
    split: MoodSplit,
    vectors: dict[str, PersonaVectors],
    judges: dict[str, TextClassifier],
    scale: CoherenceScale,
    folder: Path,
    progress: bool,
) -> dict[str, int]:
    """Each mitigated mood's layer: of those tried, where steering the base model raises its score the most.

    Among the cells whose mean coherence is at least 75, on prompts of the vectors' part.
    """
    path = folder / "layers.json"
    chosen: dict[str, dict[str, object]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [mood for mood in settings.mitigated if mood not in chosen]
    for mood in missing:
        cells = [Cell(vectors[mood].at(layer), dose) for layer in settings.layers for dose in settings.preventative]
        named = {cell.name: cell for cell in cells}
        prompts = [
            Prompt("steered", "neutral", None, NEUTRAL, question, 0, intervention=name)
            for question in random.Random(settings.seed).sample(split.vectors, 12)
            for name in named
        ]
        engine = CellEngine(ModelEngine(model, settings.max_new_tokens), named)
        output = folder / "layer_choice" / f"{mood}.jsonl"
        rows = collect_rollouts(engine, prompts, seed=settings.seed, output_file=output, progress=progress)
        scores = [score.trait_score for score in ClassifierJudge(judges[mood]).score(mood_trait(mood, split), rows)]
        coherence = coherence_scores(model, scale, rows)
        table = []
        for name, cell in named.items():
            own = [place for place, row in enumerate(rows) if row.intervention == name]
            table.append({"layer": cell.vector.layer, "coefficient": cell.coefficient})
            table[-1] |= {"trait": _mean([scores[place] for place in own])}
            table[-1] |= {"coherence": _mean([coherence[place] for place in own])}
        best = best_cell(mood, table)
        chosen[mood] = {"layer": best["layer"], "cells": table}
    if missing:
        write_json(path, chosen)
    return {mood: int(str(choice["layer"])) for mood, choice in chosen.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def best_cell(mood: str, cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The cell with the highest trait score among those whose coherence is at least 75, or among all where none is.

    Raises ValueError where no cell has a trait score.
    """
    scored = [cell for cell in cells if cell["trait"] is not None]
    if not scored:
        raise ValueError(
            f"{mood}: no answer of {len(cells)} steered cells has a score by the mood's classifier: "
            "raise max_new_tokens, or lower the coefficients."
        )
    coherent = [cell for cell in scored if cell["coherence"] is not None and cell["coherence"] >= MIN_COHERENCE]
    return max(coherent or scored, key=lambda cell: cell["trait"])
