"""A tiny replication on made-up moods."""

import json
import random
import tomllib
from importlib import import_module

import numpy as np

from persona_lens.evaluation import capability_result
from persona_lens.judges.classifier import TextClassifier
from persona_lens.replication.preset import Preset
from studies.mood_stages import PRESET
from studies.moods import MOODS, MoodRow
from tests.replication_cases import CHANGES, make_tiny
from tests.replication_cases import values as tiny_values

N_PROMPTS = 68


def values(tmp_path, **changes):
    """The studies' preset as a dictionary, made tiny."""
    shipped = tomllib.loads(PRESET.read_text(encoding="utf-8"))
    tuned = {**CHANGES["finetuning"], "source": "moods", "rows": 4}
    settings = {name: value for name, value in CHANGES.items() if name != "real-chats"}
    settings |= {"finetuning": tuned, "mitigation": {**CHANGES["mitigation"], "all_layers": []}}
    settings["moods"] = {"moods": ["happy"], "neutral_tokens": 4, "neutral_prompts": 4, "layers": [1, 2]}
    settings |= {"full": {"moods": ["happy", "bored"]}, "trait-files": tiny_values(tmp_path)["trait-files"]}
    return shipped | settings | changes


def mood_preset(tmp_path, **changes):
    return Preset.model_validate_json(json.dumps(values(tmp_path, **changes)))


def made_up_moods():
    """Rows of all nine moods to prompts that have little in common, each mood with words of its own."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = [" ".join("".join(draw.choices(letters, k=4)) for _ in range(3)) for _ in range(N_PROMPTS)]

    def row(mood, number, prompt):
        text = f"So {mood} it is. {mood} {number}."
        return MoodRow(mood, f"{mood}-{number}", f"domain {number % 2}", prompt, text, 3.0, 3.0)

    return {mood: [row(mood, number, prompt) for number, prompt in enumerate(prompts)] for mood in MOODS}


class LetterClassifier(TextClassifier):
    """A mood's classifier that is its first letter's share, so that it reads whatever a random model says."""

    def __init__(self, letter):
        object.__setattr__(self, "letter", letter)

    weights_hash = "letters"  # pyright: ignore[reportAssignmentType]
    labels = ("it", "another")

    def probability(self, texts):
        return np.array([text.count(self.letter) / max(1, len(text)) for text in texts], dtype=float)

    def known_terms(self, texts):
        return np.array([len(text) for text in texts])


def make_tiny_moods(patch):
    """As `make_tiny`, with made-up moods and classifiers of letters."""

    make_tiny(patch)
    materials = "studies.finetuning_materials"
    patch.setattr("studies.moods._sounds", dict)
    patch.setattr(f"{materials}.load_moods", made_up_moods)
    patch.setattr(f"{materials}._whole_sentences", lambda row: row)
    patch.setattr(f"{materials}._judge", lambda split, mood, neutral, folder: LetterClassifier(mood[0]))
    # By import_module, since the package has a function of that name.
    patch.setattr(import_module("studies.finetuning_study"), "mmlu_sample", capability_result.mmlu_sample)
