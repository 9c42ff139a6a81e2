"""The stages on the user's own sets: each trained on, answered, judged, screened; and every way to hold a trait down.

The grid of arXiv:2507.21509, sections 4 to 6: eight datasets of three versions, whose scores, finetuning shifts and
projection differences are compared. Every piece is one JSON file, written whole when it is finished.
Knows nothing about what the numbers say.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from persona_lens.evaluation.capability import measure_capability
from persona_lens.evaluation.capability_result import mmlu_sample
from persona_lens.evaluation.evaluate import Evaluation, evaluate
from persona_lens.experiments.study_folder import rounded
from persona_lens.finetuning.dataset import Dataset
from persona_lens.finetuning.finetune import finetune
from persona_lens.finetuning.result import Finetuning
from persona_lens.finetuning.shift import finetuning_shift
from persona_lens.interventions.intervention import Intervention
from persona_lens.interventions.values import Ablate, Steer
from persona_lens.judges.scores import scorable_questions
from persona_lens.models.adapters import Adapter, adapted
from persona_lens.replication.context import Context
from persona_lens.replication.preset import Preset
from persona_lens.screening.run import screen
from persona_lens.statistics import Estimate
from persona_lens.storage.files import JsonLines, write_json

BASE = "base"
FORMAT_VERSION = 1


def grid_folder(folder: Path) -> Path:
    """Where the sets' pieces are."""
    return folder / "grid"


def made_once(path: Path, make: Callable[[], dict[str, Any]]) -> None:
    """A piece's file, unless it is there."""
    if not path.exists():
        write_json(path, rounded({"format_version": FORMAT_VERSION, **make()}))


def set_names(run: Context) -> list[str]:
    """The user's sets."""
    return list(run.there["finetuning"].sets)


def train_rows(run: Context, path: Path) -> Dataset:
    """A file of chats, or a random part of it where it has more rows than the preset wants."""
    rows = JsonLines(path).read()
    if len(rows) <= run.preset.finetuning.rows:
        return path
    return random.Random(run.preset.seed).sample(rows, run.preset.finetuning.rows)


def train(run: Context, rows: Dataset, output: Path, *, during: Sequence[Intervention] = ()) -> Finetuning:
    """Finetune at the preset's settings, or read what the folder holds."""
    how = run.preset.finetuning
    return finetune(
        run.model,
        rows,
        during=during,
        output=output,
        rank=how.rank,
        alpha=how.alpha,
        dropout=how.dropout,
        learning_rate=how.learning_rate,
        warmup_steps=how.warmup_steps,
        weight_decay=how.weight_decay,
        epochs=how.epochs,
        batch_size=how.batch_rows,
        accumulation=how.accumulation,
        max_length=how.max_length,
        gradient_checkpointing=how.gradient_checkpointing,
        **run.sampling,
    )


def asked(run: Context, name: str) -> list[str]:
    """The trait's evaluation questions that are answered after training."""
    trait = run.trait(name)
    questions = scorable_questions(run.judge_of(trait), trait, trait.evaluation_questions)
    return questions[: run.preset.finetuning.questions]


def answer(
    run: Context, adapter: Adapter | None, name: str, output: Path, *, acting: Sequence[Intervention] = ()
) -> Evaluation:
    """The trait's questions answered with the adapter on, and judged."""
    how, trait = run.preset.finetuning, run.trait(name)
    judge = run.judge_of(trait)
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(adapted(run.model, adapter))
        return evaluate(
            run.model,
            trait,
            judge,
            interventions=acting,
            questions=asked(run, name),
            per_question=how.per_question,
            max_new_tokens=how.max_new_tokens,
            output=output,
            **run.sampling,
        )


def finetune_sets(run: Context) -> None:
    """Section 4: the base model and every set."""
    folder = grid_folder(run.folder)
    made_once(folder / "runs" / f"{BASE}.json", lambda: _measure(run, BASE, None))
    for name, path in run.there["finetuning"].sets.items():
        made_once(folder / "runs" / f"{name}.json", lambda name=name, path=path: _measure(run, name, path))


def _measure(run: Context, name: str, path: Path | None) -> dict[str, Any]:
    folder = grid_folder(run.folder)
    tuned = None if path is None else train(run, train_rows(run, path), folder / "adapters" / name)
    adapter = None if tuned is None else tuned.adapter
    found = {trait: answer(run, adapter, trait, folder / "answers" / f"{name}_{trait}") for trait in run.preset.traits}
    vectors = [run.vector(trait) for trait in run.preset.traits]
    shifts: dict[str, dict[str, float]] = {}
    for trait in run.preset.traits:
        if adapter is None:
            shifts[trait] = {each.trait: 0.0 for each in vectors}
            continue
        shift = finetuning_shift(run.model, adapter, asked(run, trait), vectors)
        shifts[trait] = {each.trait: value(shift.at(each.layer, each.trait)) for each in vectors}
    return {
        "set": name,
        "rows": 0 if tuned is None else tuned.rows["trained"],
        "traits": {trait: each.trait_score._asdict() for trait, each in found.items()},
        "coherence": {trait: each.coherence._asdict() for trait, each in found.items()},
        "shift": shifts,
        "training": None if tuned is None else tuned.loss_curve().reset_index().to_dict("list"),
    }


def value(found: Estimate) -> float:
    """The number of an estimate that has one."""
    assert found.value is not None
    return found.value


def screen_sets(run: Context) -> None:
    """Section 6: every set against the base model's own greedy responses."""
    how = run.preset.projection_difference
    for name, path in run.there["finetuning"].sets.items():
        output = grid_folder(run.folder) / "screened" / name
        if not (output / "summary.json").exists():
            vectors = [run.vector(trait) for trait in run.preset.traits]
            screen(
                run.model,
                {name: path},
                vectors,
                output=output,
                sample=how.rows,
                max_new_tokens=how.base_tokens,
                **run.sampling,
            )


Method = tuple[str, float]


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
    folder, item = grid_folder(run.folder), run.there["finetuning"]
    for trait in run.preset.mitigation.traits:
        name = next((each for each, made_for in item.table.traits.items() if made_for == trait), None)
        if name is None or trait not in run.preset.traits:
            raise ValueError(
                f"mitigation.traits: {trait!r} needs a set in bring.finetuning.traits, and a place in traits."
            )
        worst = f"{name}_{item.table.versions[-1]}"
        for method, dose in methods(run.preset):
            file = folder / "mitigation" / f"{_method_name(trait, method, dose)}.json"
            made_once(file, lambda trait=trait, worst=worst, what=(method, dose): _mitigate(run, trait, worst, what))


def _method_name(trait: str, method: str, dose: float) -> str:
    return f"{trait}_{method.replace(',', '').replace(' ', '-')}_x{dose:g}"


def _mitigate(run: Context, trait: str, name: str, what: Method) -> dict[str, Any]:
    method, dose = what
    folder, vectors, vector = grid_folder(run.folder), run.vectors(trait), run.vector(trait)
    during: dict[str, list[Intervention]] = {
        "preventative": [Steer(vector, dose)],
        "preventative, all layers": [Steer(vectors.incremental(), dose)],
        "CAFT": [Ablate(vectors)],
    }
    acting: list[Intervention] = [Steer(vector, dose)] if method == "post-hoc" else []
    trained = _method_name(trait, method, dose)
    rows = train_rows(run, run.there["finetuning"].sets[name])
    place = folder / "adapters" / (trained if method in during else name)
    tuned = train(run, rows, place, during=during.get(method, []))
    output = folder / "answers" / (f"{name}_{trait}" if method == "none" else trained)
    found = answer(run, tuned.adapter, trait, output, acting=acting)
    sample, wanted = mmlu_sample(), run.preset.mitigation.capability_questions
    able = measure_capability(
        run.model, spread(sample, wanted), interventions=acting, adapter=tuned.adapter, progress=run.progress
    )
    return {
        "trait": trait,
        "set": name,
        "method": method,
        "coefficient": dose,
        "score": found.trait_score._asdict(),
        "coherence": found.coherence._asdict(),
        "capability": able.summary()["accuracy"],
    }


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """So many rows, evenly over all."""
    return [rows[place * len(rows) // count] for place in range(min(count, len(rows)))]
