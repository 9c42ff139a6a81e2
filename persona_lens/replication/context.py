"""A running replication: its folder, what earlier stages left there, and what a stage may ask of the model.

Stages act through these methods alone, so that `Counting` can price a stage by running it: it has the same methods, and
counts instead of calling the model. The library is imported as a method needs it: an estimate loads no torch.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.replication.preset import Preset
from persona_lens.replication.user_data import UserData
from persona_lens.storage.files import JsonLines, read_json, write_json
from persona_lens.traits.trait import Trait

if TYPE_CHECKING:
    from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
    from persona_lens.interventions.intervention import Intervention
    from persona_lens.judges.scores import Judge
    from persona_lens.models.adapters import Adapter
    from persona_lens.models.structure import Model, ModelIdentity
    from persona_lens.rollouts.rows import Prompt
    from persona_lens.vectors.persona_vector import PersonaVector
    from persona_lens.vectors.persona_vectors import PersonaVectors

FORMAT_VERSION = 1
CHOICES = ("high", "random", "low")
"""Which samples of real chats are trained on, by their projection difference."""
KINDS = ("system-prompts", "many-shot")
"""Of monitoring: under the trait's eight system prompts, and after examples in context."""
Method = tuple[str, float]
"""A way to hold a trait down, and its dose."""


class NotYet(ValueError):
    """An earlier stage has not made what is needed."""


class Trained(NamedTuple):
    """A finished finetuning: its adapter, how many rows it saw, and its losses by column."""

    adapter: Any
    rows: int
    losses: dict[str, Any]


@dataclass
class Context:
    """A running replication.

    Attributes:
        model: The model.
        preset: Every setting.
        folder: Where everything is kept.
        user_data: What the user brought.
        progress: Whether bars are shown.
        judge: Who scores, where that is not the preset's judge.
    """

    model: "Model"
    preset: Preset
    folder: Path
    user_data: dict[str, UserData] = field(default_factory=dict)
    progress: bool = True
    judge: "Judge | None" = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Seed and progress, which all calls share."""
        return {"seed": self.preset.seed, "progress": self.progress}

    def once(self, path: Path, make: Callable[[], dict[str, Any]]) -> None:
        """Write a piece's file, unless it is there."""
        if not path.exists():
            write_json(path, rounded({"format_version": FORMAT_VERSION, **make()}))

    # Traits, and what earlier stages left of them

    def trait_folder(self, name: str) -> Path:
        """Where a trait's rollouts, vectors, sweep and doses are: the folder of a run, as `extract` leaves one."""
        return trait_folder(self.folder, name)

    def vectors(self, name: str) -> "PersonaVectors":
        """A trait's vectors; raises NotYet where they were not extracted."""
        from persona_lens.vectors.persona_vectors import PersonaVectors

        path = self.trait_folder(name) / "vectors.safetensors"
        if not (path.exists() and (path.parent / "summary.json").exists()):
            raise NotYet(f"{path} is not there: run the stage extraction first.")
        return PersonaVectors.load(path)

    def vector(self, name: str) -> "PersonaVector":
        """A trait's direction at its layer; raises NotYet where none was selected."""
        return self.vectors(name).at(selected_layer(self.folder, name, self.preset))

    @cached_property
    def unfitted_judge(self) -> "Judge":
        """The judge, before it is calibrated for any trait."""
        how = self.preset.judge
        if self.judge is not None:
            return self.judge
        if how.kind == "openai":
            from persona_lens.clients.client import OpenAIClient
            from persona_lens.judges.llm import LLMJudge

            server: dict[str, Any] = {"base_url": how.url or None, "aliases": how.aliases or ()}
            cache = self.folder / "calls.sqlite"
            return LLMJudge(OpenAIClient(how.model, **server, concurrency=how.concurrency, cache=cache))
        from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge

        settings = how.model_dump(include={"calibration_questions", "neutral_samples", "contrast_pairs"})
        return LikelihoodRatioJudge(self.model, **settings)

    def judge_of(self, trait: Trait) -> "Judge":
        """The judge, calibrated for the trait where it needs that."""
        from persona_lens.extraction.pipeline import calibrate
        from persona_lens.rollouts.engines import ModelEngine

        engine = ModelEngine(self.model, self.preset.extraction.max_new_tokens)
        calibrate(self.unfitted_judge, trait, engine, folder=self.trait_folder(trait.name), **self.sampling)
        return self.unfitted_judge

    def questions(self, name: str, count: int) -> list[str]:
        """The first evaluation questions of a trait that its judge may score."""
        from persona_lens.judges.scores import scorable_questions

        trait = self.preset.trait(name)
        return scorable_questions(self.judge_of(trait), trait, trait.evaluation_questions)[:count]

    # What stages ask of the model; each call resumes, and one that is finished does nothing

    def extract(self, name: str) -> None:
        """Rollouts, scores, kept pairs, vectors."""
        from persona_lens.extraction.pipeline import extract_persona_vectors
        from persona_lens.rollouts.engines import ModelEngine

        folder, how, trait = self.trait_folder(name), self.preset.extraction, self.preset.trait(name)
        if (folder / "summary.json").exists():
            return
        extract_persona_vectors(
            self.model,
            trait,
            judge=self.unfitted_judge,
            engine=ModelEngine(self.model, how.max_new_tokens),
            questions=trait.extraction_questions[: how.questions],
            output_dir=folder,
            **how.keywords("threshold", "min_coherence", "min_pairs"),
            **self.sampling,
        )

    def sweep_layers(self, name: str) -> None:
        """Every layer at the same coefficients."""
        from persona_lens.evaluation.layer_selection import select_layer

        folder, how, trait = self.trait_folder(name), self.preset.layers, self.preset.trait(name)
        if (folder / "layer_sweep.json").exists():
            return
        select_layer(
            self.model,
            self.vectors(name),
            trait,
            judge=self.judge_of(trait),
            layers=how.layers or None,
            questions=trait.extraction_questions[: how.questions],
            likelihood_proxy=False,
            output_dir=folder,
            **how.keywords("coefficients"),
            **self.sampling,
        )

    def measure_doses(self, name: str) -> None:
        """The direction at its layer, and random ones of its norm, on questions that it has not seen."""
        from persona_lens.evaluation.dose_response import dose_response

        folder, how, trait = self.trait_folder(name), self.preset.dose_response, self.preset.trait(name)
        if (folder / "dose_response.json").exists():
            return
        dose_response(
            self.model,
            self.vector(name),
            trait,
            judge=self.judge_of(trait),
            questions=self.questions(name, how.questions),
            output_dir=folder,
            **how.keywords("coefficients", "random"),
            **self.sampling,
        )

    def monitor(self, name: str, kind: str) -> None:
        """Answers under every condition, and the projection of each prompt's last token."""
        from persona_lens.monitoring.experiment import monitoring_experiment

        folder, trait = self.folder / "monitoring" / f"{name}_{kind}", self.preset.trait(name)
        if (folder / "experiment.json").exists():
            return
        monitoring_experiment(
            self.model,
            self.vectors(name),
            trait,
            self._conditions(trait, kind),
            judge=self.judge_of(trait),
            layer=selected_layer(self.folder, name, self.preset),
            max_new_tokens=self.preset.monitoring.max_new_tokens,
            output_dir=folder,
            **self.sampling,
        )

    def _conditions(self, trait: Trait, kind: str) -> "list[Prompt]":
        from persona_lens.monitoring.experiment import judged_examples, many_shot, system_prompts

        how = self.preset.monitoring
        questions = self.questions(trait.name, how.questions)
        if kind == "system-prompts":
            return system_prompts(trait, questions, per_question=how.per_question)
        examples = judged_examples(self.trait_folder(trait.name), threshold=self.preset.extraction.threshold)
        settings: dict[str, Any] = {"per_question": how.per_question, "seed": self.preset.seed}
        return many_shot(trait, questions, examples, shots=how.shots, **settings)

    def interventions(self, trait: str, method: Method) -> "list[Intervention]":
        """What acts under a method, in training or while the model answers."""
        from persona_lens.interventions.values import Ablate, Steer

        match method:
            case ("preventative" | "post-hoc", dose):
                return [Steer(self.vector(trait), dose)]
            case ("preventative, all layers", dose):
                return [Steer(self.vectors(trait).incremental(), dose)]
            case ("CAFT", _):
                return [Ablate(self.vectors(trait))]
        return []

    def train(
        self, rows: Path, output: Path, during: "Sequence[Intervention]" = (), *, at_most: int | None = None
    ) -> Trained:
        """Finetune on a file of chats, or on so many random ones of it where it has more."""
        from persona_lens.finetuning.finetune import finetune

        how = self.preset.finetuning
        some: Any = rows
        if at_most is not None and len(chats := JsonLines(rows).read()) > at_most:
            some = random.Random(self.preset.seed).sample(chats, at_most)
        tuned = finetune(
            self.model,
            some,
            during=during,
            output=output,
            **how.model_dump(exclude={"source", "rows", "questions", "per_question", "max_new_tokens"}),
            **self.sampling,
        )
        return Trained(tuned.adapter, tuned.rows["trained"], tuned.loss_curve().reset_index().to_dict("list"))

    def answer(
        self, adapter: "Adapter | None", name: str, output: Path, acting: "Sequence[Intervention]" = ()
    ) -> dict[str, Any]:
        """The estimates of score and coherence of a trait's answers with the adapter on."""
        from persona_lens.evaluation.evaluate import evaluate
        from persona_lens.models.adapters import adapted

        how, trait = self.preset.finetuning, self.preset.trait(name)
        # Before the adapter is on: the judge is calibrated on the base model.
        judge, questions = self.judge_of(trait), self.questions(name, how.questions)
        with ExitStack() as stack:
            if adapter is not None:
                stack.enter_context(adapted(self.model, adapter))
            evaluation = evaluate(
                self.model,
                trait,
                judge=judge,
                interventions=acting,
                questions=questions,
                output_dir=output,
                **how.keywords(),
                **self.sampling,
            )
        return {"score": evaluation.trait_score._asdict(), "coherence": evaluation.coherence._asdict()}

    def shifts(self, adapter: "Adapter | None", name: str) -> dict[str, float]:
        """The finetuning shift on a trait's questions along every trait's direction; 0 for the base model itself."""
        from persona_lens.finetuning.shift import finetuning_shift

        if adapter is None:
            return dict.fromkeys(self.preset.traits, 0.0)
        vectors = [self.vector(trait) for trait in self.preset.traits]
        shift = finetuning_shift(self.model, adapter, self.questions(name, self.preset.finetuning.questions), vectors)
        values = {vector.trait: shift.at(vector.layer, vector.trait).value for vector in vectors}
        return {trait: value for trait, value in values.items() if value is not None}

    def capability(
        self, questions: Path | int, adapter: "Adapter | None", acting: "Sequence[Intervention]" = ()
    ) -> dict[str, Any]:
        """The estimate of accuracy on a file of questions, or on so many of MMLU's, evenly over its subjects."""
        from persona_lens.evaluation.capability import measure_capability
        from persona_lens.evaluation.capability_result import mmlu_sample, read_questions

        if isinstance(questions, int):
            every = mmlu_sample()
            rows = [every[place * len(every) // questions] for place in range(min(questions, len(every)))]
        else:
            rows = read_questions(questions)
        able = measure_capability(self.model, rows, interventions=acting, adapter=adapter, progress=self.progress)
        return able.summary()["accuracy"]

    def screen(self, name: str, chats: Path, output: Path, traits: Sequence[str], sample: int, **options: Any) -> None:
        """A file of chats screened against the base model's own greedy responses."""
        from persona_lens.screening.plan import RowChoice
        from persona_lens.screening.run import screen

        if not (output / "summary.json").exists():
            vectors = [self.vector(trait) for trait in traits]
            screen(
                self.model,
                {name: chats},
                vectors,
                output_dir=output,
                max_new_tokens=self.preset.projection_difference.base_tokens,
                rows=RowChoice(sample=sample, seed=self.preset.seed, **options),
                progress=self.progress,
            )

    def split(self, screened: Path, output: Path, count: int) -> dict[str, Path]:
        """The samples of highest, random and lowest projection difference, as files of chats."""
        from persona_lens.screening.filtering import write_split
        from persona_lens.screening.result import Screening

        return write_split(Screening.load(screened), output, count, by="difference", seed=self.preset.seed)


def trait_folder(folder: Path, name: str) -> Path:
    """Where a trait's part of a replication is."""
    return folder / "traits" / name


def selected_layer(folder: Path, name: str, preset: Preset) -> int:
    """The layer at which a trait is used; raises NotYet where none was selected."""
    from persona_lens.evaluation.layer_selection import LayerSweep

    here = trait_folder(folder, name)
    if not (here / "layer_sweep.json").exists():
        raise NotYet(f"{here / 'layer_sweep.json'} is not there: run the stage layers first.")
    return best_cell(LayerSweep.load(here), preset).layer


def best_cell(sweep: "LayerSweep", preset: Preset) -> "LayerChoice":
    """The sweep's best coherent cell, or the best of all where none is coherent enough."""
    try:
        return sweep.best(preset.layers.min_coherence)
    except ValueError:
        return sweep.best(None)


def refuse_other_settings(path: Path, settings: Mapping[str, Any], model: "ModelIdentity") -> None:
    """Write the settings down, or raise ValueError where the folder was made with others or by another model."""
    wanted = json.loads(json.dumps({"model": model.name, "weights_hash": model.weights_hash, **settings}))
    kept = read_json(path) if path.exists() else {}
    for name, value in wanted.items():
        if kept and kept.get(name) != value:
            raise ValueError(
                f"{path.parent} holds a study with another {name} ({kept.get(name)}, now {value}): "
                "choose another folder."
            )
    if not kept:
        write_json(path, wanted)


def rounded(value: Any) -> Any:
    """Floats to six significant digits, so that records stay small and claim no more precision than they have."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
