"""What every stage of a running replication shares: model, preset, judge, folders, and what earlier stages left.

Knows nothing about what the stages are.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from persona_lens.clients.client import OpenAIClient
from persona_lens.evaluation.layer_selection import LayerSweep
from persona_lens.extraction.pipeline import calibrate
from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
from persona_lens.judges.llm import LLMJudge
from persona_lens.judges.scores import Judge
from persona_lens.models.structure import Model, ModelIdentity
from persona_lens.replication.brought import Brought
from persona_lens.replication.preset import Preset
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.storage.files import read_json, write_json
from persona_lens.traits.trait import Trait
from persona_lens.vectors.persona_vector import PersonaVector
from persona_lens.vectors.persona_vectors import PersonaVectors


class NotYet(ValueError):
    """An earlier stage has not made what is needed."""


@dataclass
class Context:
    """A running replication.

    Attributes:
        model: The model.
        preset: Every setting.
        folder: Where everything is kept.
        there: What the user brought.
        progress: Whether bars are shown.
        judge: Who scores, where that is not the preset's judge.
    """

    model: Model
    preset: Preset
    folder: Path
    there: dict[str, Brought] = field(default_factory=dict)
    progress: bool = True
    judge: Judge | None = None

    def trait_folder(self, name: str) -> Path:
        """Where a trait's rollouts, vectors, sweep and doses are: the folder of a run, as `extract` leaves one."""
        return trait_folder(self.folder, name)

    def trait(self, name: str) -> Trait:
        """One of the preset's traits."""
        return self.preset.trait(name)

    @cached_property
    def unfitted_judge(self) -> Judge:
        """The judge, before it is calibrated for any trait."""
        how = self.preset.judge
        if self.judge is not None:
            return self.judge
        if how.kind == "openai":
            cache = self.folder / "calls.sqlite"
            where = {"base_url": how.url or None, "aliases": how.aliases or ()}
            return LLMJudge(OpenAIClient(how.model, **where, concurrency=how.concurrency, cache=cache))
        return LikelihoodRatioJudge(
            self.model,
            calibration_questions=how.calibration_questions,
            neutral_samples=how.neutral_samples,
            contrast_pairs=how.contrast_pairs,
        )

    def judge_of(self, trait: Trait) -> Judge:
        """The judge, calibrated for the trait where it needs that."""
        engine = ModelEngine(self.model, self.preset.extraction.max_new_tokens)
        calibrate(
            self.unfitted_judge,
            trait,
            engine,
            folder=self.trait_folder(trait.name),
            seed=self.preset.seed,
            progress=self.progress,
        )
        return self.unfitted_judge

    def vectors(self, name: str) -> PersonaVectors:
        """A trait's vectors; raises NotYet where they were not extracted."""
        path = self.trait_folder(name) / "vectors.safetensors"
        if not (path.exists() and (path.parent / "summary.json").exists()):
            raise NotYet(f"{path} is not there: run the stage extraction first.")
        return PersonaVectors.load(path)

    def layer(self, name: str) -> int:
        """The layer at which a trait is used; raises NotYet where none was selected."""
        return selected_layer(self.folder, name, self.preset)

    def vector(self, name: str) -> PersonaVector:
        """A trait's direction at its layer."""
        return self.vectors(name).at(self.layer(name))

    @property
    def sampling(self) -> dict[str, Any]:
        """What all calls share."""
        return {"seed": self.preset.seed, "progress": self.progress}


def trait_folder(folder: Path, name: str) -> Path:
    """Where a trait's part of a replication is."""
    return folder / "traits" / name


def selected_layer(folder: Path, name: str, preset: Preset) -> int:
    """The layer of the sweep's best coherent cell, or of the best of all where none is coherent enough."""
    here = trait_folder(folder, name)
    if not (here / "layer_sweep.json").exists():
        raise NotYet(f"{here / 'layer_sweep.json'} is not there: run the stage layers first.")
    sweep = LayerSweep.load(here)
    try:
        return sweep.best(preset.layers.min_coherence).layer
    except ValueError:
        return sweep.best(None).layer


def refuse_other_settings(
    path: Path, settings: Mapping[str, Any], model: ModelIdentity, *, growing: Collection[str] = ()
) -> None:
    """Write the settings down, or raise ValueError where the folder was made with others or by another model.

    Lists that may be `growing` differ without harm: what they hold now is added to what they held.
    """
    wanted = json.loads(json.dumps({"model": model.name, "weights_hash": model.weights_hash, **settings}))
    if not path.exists():
        write_json(path, wanted)
        return
    kept = read_json(path)
    for name in growing:
        wanted[name] = [*kept[name], *(each for each in wanted[name] if each not in kept[name])]
    grown = {name: wanted[name] for name in growing if wanted[name] != kept[name]}
    for name, value in wanted.items():
        if name not in growing and kept.get(name) != value:
            raise ValueError(
                f"{path.parent} holds a study with another {name} ({kept.get(name)}, now {value}): "
                "choose another folder."
            )
    if grown:
        write_json(path, kept | grown)


def rounded(value: Any) -> Any:
    """Floats to six significant digits, so that records stay small and hold no more than they mean."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
