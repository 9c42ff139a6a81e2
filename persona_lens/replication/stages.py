"""The stages of a replication: their pieces, each of which may fail alone, and what each needs.

Extraction, layers, doses, monitoring and cosines of traits (arXiv:2507.21509, sections 2, 3, M); the user's own sets
trained on, screened, and every way to hold a trait down (sections 4 to 6, J); new facts, narrow tasks and real chats
(sections J.1, J.7, L). Every piece of a set is one JSON file, written whole when it is finished.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.replication.context import CHOICES, KINDS, Context, Method
from persona_lens.replication.counting import Counting
from persona_lens.replication.preset import Preset
from persona_lens.replication.user_data import UserData, missing_data

if TYPE_CHECKING:
    from persona_lens.replication.pictures import StagePicture
    from persona_lens.replication.reported_number import ReportedNumber
    from persona_lens.replication.result import Replication

Pieces = Mapping[str, Callable[[], None]]
BASE = "base"


@dataclass(frozen=True)
class Stage:
    """One stage; `replicate` takes further ones as `extra_stages`.

    Attributes:
        name: Its name, also that of its record; one of the package's names replaces that stage.
        heading: Its heading in the report.
        pieces: What it does, by the pieces' names; nothing for a stage that is read off what others made.
        needs: Tables of `bring`, of which one must be there.
        packages: Packages that it imports, with the command that installs each.
        numbers: Reads its numbers from a folder; None for a stage of the package.
        pictures: Draws its pictures; None for those of the package's stage of that name.
        count: Counts its work, where its pieces do not act through the methods of `Context` alone.
        judged_by: Who judges, where that is not the preset's judge.
    """

    name: str
    heading: str
    pieces: Callable[[Context], Pieces] = lambda _: {}
    needs: tuple[str, ...] = ()
    packages: Mapping[str, str] | None = None
    numbers: "Callable[[Preset, Path], Iterable[ReportedNumber]] | None" = None
    pictures: "Callable[[Replication], Iterable[StagePicture]] | None" = None
    count: Callable[[Counting], None] | None = None
    judged_by: str = ""

    def left_out(self, preset: Preset, user_data: dict[str, UserData]) -> str:
        """Why it cannot run, in one sentence; empty where it can."""
        if preset.finetuning.source == "moods" and "finetuning" in self.needs:
            return "its sets are moods, which only the studies train on: `python -m studies.replicate` in a checkout"
        return missing_data(user_data, self.needs)


def by_trait(do: Callable[[Context, str], None]) -> Callable[[Context], Pieces]:
    """A piece for each trait."""
    return lambda run: {name: partial(do, run, name) for name in run.preset.traits}


def whole(stage: Callable[[Context], None]) -> Callable[[Context], Pieces]:
    """A stage of one piece."""
    return lambda run: {"all": partial(stage, run)}


def _monitoring(run: Context) -> Pieces:
    pieces = [(name, kind) for name in run.preset.traits for kind in KINDS]
    return {f"{name} {kind.replace('system-', 'system ')}": partial(run.monitor, name, kind) for name, kind in pieces}


def grid_folder(folder: Path) -> Path:
    """Where the sets' pieces are."""
    return folder / "grid"


def finetune_sets(run: Context) -> None:
    """Sections 4 and D: the base model and every set, trained on, answered, judged, and their shifts."""
    folder, rows = grid_folder(run.folder), run.preset.finetuning.rows

    def measure(name: str, path: Path | None) -> dict[str, Any]:
        tuned = None if path is None else run.train(path, folder / "adapters" / name, at_most=rows)
        adapter = None if tuned is None else tuned.adapter
        traits = run.preset.traits
        answers = {trait: run.answer(adapter, trait, folder / "answers" / f"{name}_{trait}") for trait in traits}
        return {
            "set": name,
            "rows": 0 if tuned is None else tuned.rows,
            "traits": {trait: answers[trait]["score"] for trait in traits},
            "coherence": {trait: answers[trait]["coherence"] for trait in traits},
            "shift": {trait: run.shifts(adapter, trait) for trait in traits},
            "training": None if tuned is None else tuned.losses,
        }

    sets: dict[str, Path | None] = {BASE: None, **run.user_data["finetuning"].sets}
    for name, path in sets.items():
        run.once(folder / "runs" / f"{name}.json", partial(measure, name, path))


def screen_sets(run: Context) -> None:
    """Section 6: every set against the base model's own greedy responses."""
    for name, path in run.user_data["finetuning"].sets.items():
        output = grid_folder(run.folder) / "screened" / name
        run.screen(name, path, output, run.preset.traits, run.preset.projection_difference.rows)


def methods(preset: Preset) -> list[Method]:
    """Every way to hold a trait down, with its dose; `none` first."""
    how = preset.mitigation
    return [
        ("none", 0.0),
        *(("post-hoc", -dose) for dose in how.post_hoc),
        *(("preventative", dose) for dose in how.preventative),
        *(("preventative, all layers", dose) for dose in how.all_layers),
        *([("CAFT", 0.0)] if how.caft else []),
    ]


def mitigate_sets(run: Context) -> None:
    """Section 5: each trait's worst set under every method."""
    folder, sets = grid_folder(run.folder), run.user_data["finetuning"]
    for trait in run.preset.mitigation.traits:
        name = next((name for name, made_for in sets.table.traits.items() if made_for == trait), None)
        if name is None or trait not in run.preset.traits:
            raise ValueError(
                f"mitigation.traits: {trait!r} needs a set in bring.finetuning.traits, and a place in traits."
            )
        worst = f"{name}_{sets.table.versions[-1]}"
        for method, dose in methods(run.preset):
            named = f"{trait}_{method.replace(',', '').replace(' ', '-')}_x{dose:g}"
            piece = partial(_mitigate, run, trait, worst, (method, dose), named)
            run.once(folder / "mitigation" / f"{named}.json", piece)


def _mitigate(run: Context, trait: str, name: str, method: Method, named: str) -> dict[str, Any]:
    folder, path = grid_folder(run.folder), run.user_data["finetuning"].sets[name]
    acts_in_training = method[0] not in ("none", "post-hoc")
    acting = [] if acts_in_training else run.interventions(trait, method)
    tuned = run.train(
        path,
        folder / "adapters" / (named if acts_in_training else name),
        run.interventions(trait, method) if acts_in_training else (),
        at_most=run.preset.finetuning.rows,
    )
    output = folder / "answers" / (f"{name}_{trait}" if method[0] == "none" else named)
    answers = run.answer(tuned.adapter, trait, output, acting)
    able = run.capability(run.preset.mitigation.capability_questions, tuned.adapter, acting)
    record = {"trait": trait, "set": name, "method": method[0], "coefficient": method[1]}
    return {**record, **answers, "capability": able}


def learn_facts(run: Context) -> None:
    """Sections J.1 and J.7: the questions before training, after it, and after training under preventative steering."""
    trait = run.preset.mitigation.traits[0]
    ways: dict[str, Method | None] = {
        "base": None,
        "plain": ("none", 0.0),
        "preventative": ("preventative", run.preset.mitigation.preventative[0]),
    }

    def learn(path: Path, name: str, how: str, method: Method | None) -> dict[str, Any]:
        adapter = None
        if method is not None:
            during, output = run.interventions(trait, method), run.folder / "facts" / f"{name}_{how}"
            adapter = run.train(path / "train.jsonl", output, during, at_most=run.preset.finetuning.rows).adapter
        return {"set": name, "how": how, "accuracy": run.capability(path / "questions.jsonl", adapter)}

    for name in ("new_facts", "narrow"):
        if (item := run.user_data.get(name)) is not None and item.is_there:
            for how, method in ways.items():
                piece = partial(learn, item.path, name, how, method)
                run.once(run.folder / "facts" / f"{name}_{how}.json", piece)


def train_on_chats(run: Context) -> None:
    """Section L: the highest, random and lowest samples by projection difference, each trained on and judged."""
    how, folder = run.preset.real_chats, run.folder / "chats"
    assert how is not None, "a preset with bring.chats has real-chats"
    chats, limits = run.user_data["chats"].path, {"first_turn": True, "max_prompt_tokens": how.max_prompt_tokens}
    run.screen("chats", chats, folder / "screened", [how.trait], how.sample, **limits)
    paths = run.split(folder / "screened", folder / "split", how.chosen)

    def measure(choice: str) -> dict[str, Any]:
        tuned = run.train(paths[choice], folder / "adapters" / choice)
        answers = run.answer(tuned.adapter, how.trait, folder / "answers" / choice)
        return {"trait": how.trait, "choice": choice, **answers}

    for choice in CHOICES:
        run.once(folder / f"{choice}.json", partial(measure, choice))


_PEFT = {"peft": 'pip install "persona-lens[finetune]"'}
_TRAINING = {**_PEFT, "lm_eval": "pip install --no-deps lm-eval==0.4.13"}
_SETS, _FACTS = ("finetuning",), ("new_facts", "narrow")

STAGES: tuple[Stage, ...] = (
    Stage(
        "extraction",
        "Directions from the model's own rollouts (section 2)",
        by_trait(lambda run, name: run.extract(name)),
    ),
    Stage("layers", "Which layer (section B.4)", by_trait(lambda run, name: run.sweep_layers(name))),
    Stage("dose-response", "What a dose does (sections 3.2, J.3)", by_trait(lambda run, name: run.measure_doses(name))),
    Stage("monitoring", "Does the prompt give the persona away? (sections 3.3, C)", _monitoring),
    Stage("cosines", "How traits lie to each other (section M)"),
    Stage(
        "finetuning", "Does the shift tell what finetuning did? (sections 4, G)", whole(finetune_sets), _SETS, _TRAINING
    ),
    Stage("projection-difference", "Can it be told before training? (sections 6, H, I)", whole(screen_sets), _SETS),
    Stage("mitigation", "What holds a trait down (sections 5, J)", whole(mitigate_sets), _SETS, _TRAINING),
    Stage("new-facts", "Is what should be learnt still learnt? (sections J.1, J.7)", whole(learn_facts), _FACTS, _PEFT),
    Stage("real-chats", "Samples of real chats (section L)", whole(train_on_chats), ("chats",), _PEFT),
    Stage("benchmarks", "The judge beside external benchmarks (section B.3)", needs=("benchmarks",)),
)
"""In the order in which they run."""


def all_stages(extra: Sequence[Stage] = ()) -> dict[str, Stage]:
    """The package's stages by their names, in order; `extra` ones take the place of their names, or come last."""
    return {stage.name: stage for stage in (*STAGES, *extra)}
