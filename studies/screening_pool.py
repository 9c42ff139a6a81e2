"""The screening study's pool: every row that neither vectors nor classifiers were made of, screened once.

Responses of all moods and the model's own neutral ones, on the prompts of finetuning and of evaluation; each is scored
by the three forms of the projection on every mood's vector, and by every mood's classifier.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from persona_lens.chat.batches import chat_messages
from persona_lens.judges.classifier import TextClassifier
from persona_lens.models.structure import Model
from persona_lens.rollouts.collection import collect_rollouts
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.rollouts.rows import Prompt
from persona_lens.screening.result import Screening
from persona_lens.screening.run import ShardsMissing, screen
from persona_lens.storage.locks import alone, taken
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from studies.finetuning_materials import Materials
from studies.finetuning_plan import StudySettings
from studies.mood_texts import training_rows
from studies.moods import Part
from studies.screening_plan import Form, ScreeningSettings

PARTS: tuple[Part, ...] = ("finetuning", "evaluation")
"""Vectors and classifiers were made from the other two."""
OWN = "neutral"
"""The source of the model's own responses."""
SHARDS = 4


@dataclass(frozen=True)
class PoolRow:
    """One response of the pool; `source` is its mood, or `OWN`."""

    id: str
    source: str
    part: Part
    prompt: str
    response: str

    @property
    def chat(self) -> dict[str, Any]:
        """The row as training and screening read it."""
        answer = {"role": "assistant", "content": self.response}
        return {"messages": [*chat_messages(NEUTRAL, self.prompt), answer], "id": self.id}


def pool_rows(materials: Materials, settings: ScreeningSettings, seed: int) -> list[PoolRow]:
    """Every row of the pool, mood by mood, then the model's own.

    `seed` is that by which the finetuning study draws its sets: the rows of its full ones come first.
    """
    split = materials.split
    rows: list[PoolRow] = []
    for mood in split.rows:
        named = {(row.prompt, row.response): row.id for row in split.rows[mood]}
        n = min(settings.pool, split.size("finetuning", mood).rows)
        chats = [chat["messages"] for chat in training_rows(split, mood, "full", (), n, seed)]
        texts: dict[Part, list[tuple[str, str]]] = {
            "finetuning": [(turns[-2]["content"], turns[-1]["content"]) for turns in chats],
            "evaluation": [(row.prompt, row.response) for row in split.of("evaluation", mood)],
        }
        rows += [PoolRow(f"{mood}/{named[text]}", mood, part, *text) for part in PARTS for text in texts[part]]
    for part in PARTS:
        prompts: Sequence[str] = getattr(split, part)
        for place, row in enumerate(materials.neutral_to(prompts)):
            rows.append(PoolRow(f"{OWN}/{part}/{place}", OWN, part, row.question, row.response))
    return rows


def base_responses(
    model: Model, prompts: Sequence[str], settings: ScreeningSettings, path: Path, *, progress: bool = True
) -> dict[str, str]:
    """The model's own greedy response to each prompt under the neutral system turn, from the file where it stands."""
    planned = [Prompt("base", "neutral", None, NEUTRAL, prompt, 0) for prompt in dict.fromkeys(prompts)]
    engine = ModelEngine(model, settings.base_tokens, temperature=0.0)
    rows = collect_rollouts(engine, planned, seed=settings.seed, output_file=path, progress=progress)
    return {row.question: row.response for row in rows}


@dataclass(frozen=True)
class Pool:
    """The rows with their scores.

    Attributes:
        rows: Every row.
        screening: Their projections; what has no base response is not in it.
        classifiers: Each mood's classifier.
    """

    rows: Sequence[PoolRow]
    screening: Screening
    classifiers: Mapping[str, TextClassifier]

    @cached_property
    def place(self) -> dict[tuple[str, str], int]:
        """Where the row with this prompt and response stands."""
        return {(row.prompt, row.response): number for number, row in enumerate(self.rows)}

    def scores(self, mood: str, form: Form, layer: int) -> np.ndarray:
        """Every row's score on one mood, [row]; NaN where it has none."""
        if form == "classifier":
            return self.classified(mood)
        return self._by_row(self.screening.score(f"{mood}@{layer}", form).to_numpy(dtype=float))

    @cached_property
    def tokens(self) -> np.ndarray:
        """How many tokens each response has, [row]."""
        return self._by_row(self.screening.rows["response_tokens"].to_numpy(dtype=float))

    @cached_property
    def screened(self) -> dict[int, int]:
        """The place of each screened row, by the number that the screening gave it."""
        places = {row.id: place for place, row in enumerate(self.rows)}
        table = self.screening.rows
        return {number: places[name] for number, name in zip(table.index.tolist(), table["id"].tolist(), strict=True)}

    def classified(self, mood: str) -> np.ndarray:
        """Every row's score by a mood's classifier, 0 to 100, [row]; NaN for a text without a known term."""
        return self._classified[mood]

    @cached_property
    def _classified(self) -> dict[str, np.ndarray]:
        texts = [row.response for row in self.rows]
        return {mood: 100 * judge.probability(texts) for mood, judge in self.classifiers.items()}

    def _by_row(self, screened: np.ndarray) -> np.ndarray:
        """A column of the screening's table in the pool's order, NaN for a row that is not in it."""
        column = np.full(len(self.rows), np.nan)
        column[list(self.screened.values())] = screened
        return column


def screened_pool(
    model: Model,
    materials: Materials,
    settings: ScreeningSettings,
    trained: StudySettings,
    layers: Sequence[int],
    folder: Path,
    *,
    progress: bool = True,
) -> Pool:
    """The pool, screened in the folder unless it was; processes that share it take shards that no other has."""
    rows = pool_rows(materials, settings, trained.seed)
    with alone(folder / "base.lock"):
        prompts = [row.prompt for row in rows]
        base = base_responses(model, prompts, settings, folder / "base_responses.jsonl", progress=progress)
    datasets = {
        source: [{**row.chat, "base_response": base[row.prompt]} for row in rows if row.source == source]
        for source in dict.fromkeys(row.source for row in rows)
    }
    vectors = [materials.vectors[mood].at(layer) for mood in materials.split.rows for layer in layers]
    screened = partial(screen, model, datasets, vectors, base="given", output_dir=folder / "screen", progress=progress)
    locks = [folder / f"shard-{number}.lock" for number in range(SHARDS)]
    for number, lock in enumerate(locks):
        with taken(lock) as mine, suppress(ShardsMissing):
            if mine:
                screened(shard=(number, SHARDS))
    for lock in locks:
        with alone(lock):  # whoever is at work on it
            pass
    with alone(folder / "screen.lock"):
        screening = screened()  # what an interrupted process has left, as a rule nothing
    return Pool(rows, screening, materials.judges)
