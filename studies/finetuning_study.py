"""Does finetuning on a mood move the model along the mood's vector, and what holds it back at which cost?

Every run trains an adapter (or takes the one it shares), answers the held-out prompts, and is measured: each mood's
score by its classifier, the likelihood ratio under the base model, coherence, copying, the shift of the last prompt
token along every mood's vector, and what the model still can (arXiv:2507.21509, sections 4 and 5).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from persona_lens.evaluation.capability import measure_capability
from persona_lens.evaluation.capability_result import mmlu_sample
from persona_lens.finetuning.dataset import Dataset
from persona_lens.finetuning.finetune import finetune
from persona_lens.finetuning.result import Finetuning
from persona_lens.finetuning.shift import finetuning_shift
from persona_lens.finetuning.trainer import ProjectionPenalty
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Ablate, Intervention, Steer
from persona_lens.judges.classifier import ClassifierJudge
from persona_lens.models.adapters import Adapter, adapted
from persona_lens.models.structure import Model, ModelIdentity, identify
from persona_lens.replication.context import refuse_other_settings, rounded
from persona_lens.rollouts.collection import collect_rollouts
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.rollouts.rows import Prompt, Rollout
from persona_lens.statistics import mean_estimate
from persona_lens.storage.files import read_json, write_json
from persona_lens.storage.locks import alone, taken
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from persona_lens.traits.trait import Trait
from persona_lens.vectors.persona_vector import PersonaVector
from studies.finetuning_materials import Materials, coherence_scores, make_materials, mood_ratios
from studies.finetuning_plan import StudyRun, StudySettings, study_runs
from studies.mood_texts import ngram_overlap, training_rows
from studies.moods import MOODS

FORMAT_VERSION = 1


def finetuning_study(
    model: Model,
    output: str | Path,
    *,
    settings: StudySettings | None = None,
    runs: Sequence[StudyRun] | None = None,
    progress: bool = True,
) -> None:
    """Make every run of the study that `output` does not hold yet, one JSON file each in runs/.

    `runs` are those of `study_runs` on all moods, or others; a folder may get more of them later. It resumes after any
    interruption, and several processes may share a folder: each takes the runs that no other is at work on.
    `read_study` reads what is there. Raises ImportError where the mood data or the multiple-choice sample is not
    installed, ValueError for a model that is no bridge.
    """
    settings = settings or StudySettings()
    folder = Path(output)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    with alone(folder / "materials.lock"):
        keep_settings(folder / "settings.json", settings, identify(model))
        materials = make_materials(model, settings, folder, progress=progress)
    for run in study_runs(settings, MOODS) if runs is None else runs:
        path = folder / "runs" / f"{run.name}.json"
        with taken(path.with_suffix(".lock")) as mine:
            if mine and not path.exists():
                record = measure(model, run, materials, settings, folder, progress=progress)
                write_json(path, rounded(record))


def keep_settings(path: Path, settings: StudySettings, model: ModelIdentity) -> None:
    """Write the settings down, or raise ValueError where the folder has others; more mitigated moods are added."""
    wanted = asdict(settings)
    if not path.exists():
        refuse_other_settings(path, wanted, model)
        return
    kept = read_json(path)
    refuse_other_settings(path, {**wanted, "mitigated": kept["mitigated"]}, model)
    if added := [mood for mood in wanted["mitigated"] if mood not in kept["mitigated"]]:
        write_json(path, {**kept, "mitigated": [*kept["mitigated"], *added]})


def measure(
    model: Model, run: StudyRun, materials: Materials, settings: StudySettings, folder: Path, *, progress: bool = True
) -> dict[str, Any]:
    """One run, trained where its adapter is not there yet, and everything that is measured of it, as JSON."""
    trained = None
    if run.trained_as is not None:
        with alone(folder / "runs" / f"{run.trained_as.name}.training"):
            trained = train(model, run.trained_as, materials, settings, folder, progress=progress)
    adapter = None if trained is None else trained.adapter
    acting = _while_answering(run, materials)
    is_told = run.method == "negative system prompt"
    system = materials.trait(run.mood).system_prompt("negative", 0) if is_told else NEUTRAL
    output = folder / "answers" / f"{run.name}.jsonl"
    answers = study_answers(
        model, adapter, materials.split.evaluation, settings, output, acting=acting, system=system, progress=progress
    )
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "run": {"mood": run.mood, "rows": run.rows, "method": run.method, "coefficient": run.coefficient},
        "questions": [row.question for row in answers],
        **study_scores(model, run.mood, answers, materials),
        "training": None if trained is None else trained.loss_curve().reset_index().to_dict("list"),
    }
    if run.rows != "half" and run.mood in ("", *settings.mitigated):
        record["capability"] = _capability(model, adapter, acting, materials, settings)
    if run.method == "none":
        record |= _shift(model, adapter, materials)
    if run.rows in ("full", "half"):
        texts = [row["messages"][-1]["content"] for row in _rows(run, materials, settings)]
        overlap = ngram_overlap([row.response for row in answers], texts)
        record["overlap"] = {"words": overlap.n_words, **overlap.share._asdict()}
    return record


def train(
    model: Model, run: StudyRun, materials: Materials, settings: StudySettings, folder: Path, *, progress: bool = True
) -> Finetuning:
    """The run's adapter, from the folder where it stands there."""
    prompts = materials.trait(run.mood) if run.method == "preventative prompts" else None
    penalty = None
    if run.method == "penalty":
        penalty = ProjectionPenalty(materials.vectors[run.mood], settings.penalty_weight)
    return finetune_as(
        settings,
        model,
        _rows(run, materials, settings),
        folder / "adapters" / run.name,
        during=_while_training(run, materials),
        preventative_prompts=prompts,
        penalty=penalty,
        progress=progress,
    )


def finetune_as(
    settings: StudySettings,
    model: Model,
    rows: Dataset,
    output: Path,
    *,
    during: Sequence[Intervention] = (),
    preventative_prompts: Trait | None = None,
    penalty: ProjectionPenalty | None = None,
    progress: bool = True,
) -> Finetuning:
    """Finetune on rows at the study's rate, epochs, batches, length and seed."""
    return finetune(
        model,
        rows,
        during=during,
        preventative_prompts=preventative_prompts,
        penalty=penalty,
        output=output,
        learning_rate=settings.learning_rate,
        epochs=settings.epochs,
        batch_size=settings.batch_rows,
        accumulation=settings.accumulation,
        max_length=settings.max_length,
        seed=settings.seed,
        progress=progress,
    )


def _rows(run: StudyRun, materials: Materials, settings: StudySettings) -> list[dict[str, Any]]:
    if run.rows == "benign":
        own = materials.neutral_to(materials.split.finetuning)[: settings.rows]
        return [{"messages": [*row.prompt.messages, {"role": "assistant", "content": row.response}]} for row in own]
    assert run.rows != "base", "the base model is not trained"
    return training_rows(materials.split, run.mood, run.rows, materials.neutral, settings.rows, settings.seed)


def _while_training(run: StudyRun, materials: Materials) -> list[Intervention]:
    match run.method:
        case "preventative":
            return [Steer(_at_its_layer(run, materials), run.coefficient)]
        case "preventative, all layers":
            return [Steer(materials.vectors[run.mood].incremental(), run.coefficient)]
        case "CAFT":
            return [Ablate(materials.vectors[run.mood])]
        case "CAFT, one layer":
            return [Ablate(_at_its_layer(run, materials))]
    return []


def _at_its_layer(run: StudyRun, materials: Materials) -> PersonaVector:
    return materials.vectors[run.mood].at(materials.layers[run.mood])


def _while_answering(run: StudyRun, materials: Materials) -> list[Intervention]:
    if run.method != "post-hoc":
        return []
    return [Steer(_at_its_layer(run, materials), run.coefficient)]


def study_answers(
    model: Model,
    adapter: Adapter | None,
    questions: Sequence[str],
    settings: StudySettings,
    output: Path,
    *,
    acting: Sequence[Intervention] = (),
    system: str = NEUTRAL,
    progress: bool = True,
) -> list[Rollout]:
    """Answers to the questions; sampled by the same random numbers in every run."""
    prompts = [
        Prompt("study", "neutral", None, system, question, sample)
        for question in questions
        for sample in range(settings.per_question)
    ]
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(adapted(model, adapter))
        if acting:
            stack.enter_context(intervene(model, *acting, at="response"))
        engine = ModelEngine(model, settings.max_new_tokens)
        return collect_rollouts(engine, prompts, seed=settings.seed, output_file=output, progress=progress)


def study_scores(model: Model, own: str, answers: Sequence[Rollout], materials: Materials) -> dict[str, Any]:
    """Every mood's score, and of the own mood (all, where it is empty) the likelihood ratio; each answer's own."""
    questions = [row.question for row in answers]
    record: dict[str, Any] = {"traits": {}, "likelihood_ratios": {}}
    for mood in MOODS:
        judge = ClassifierJudge(materials.judges[mood])
        scores = [score.trait_score for score in judge.score(materials.trait(mood), answers)]
        record["traits"][mood] = mean_estimate(scores, questions)._asdict()
        if mood == own:
            record["own_scores"] = scores
        if mood == own or not own:
            ratios = [
                None if np.isnan(value) else float(value)
                for value in mood_ratios(model, materials.trait(mood), answers)
            ]
            record["likelihood_ratios"][mood] = mean_estimate(ratios, questions)._asdict()
    coherence = coherence_scores(model, materials.coherence, answers)
    return {**record, "coherence": mean_estimate(coherence, questions)._asdict()}


def _capability(
    model: Model,
    adapter: Adapter | None,
    acting: Sequence[Intervention],
    materials: Materials,
    settings: StudySettings,
) -> dict[str, Any]:
    """Multiple choice, and the likelihood of the base model's own answers to the evaluation prompts."""
    questions = mmlu_sample()
    able = measure_capability(
        model,
        questions[:: len(questions) // settings.capability_questions],
        texts=[row.conversation() for row in materials.neutral_to(materials.split.evaluation)],
        interventions=acting,
        at="response",
        adapter=adapter,
        progress=False,
    )
    return {**able.summary(), "margins": [answer.margin for answer in able.answers]}


def _shift(model: Model, adapter: Adapter | None, materials: Materials) -> dict[str, Any]:
    """The shift along every mood's vectors of both contrasts, at every layer; 0 for the base model itself."""
    vectors = [*materials.vectors.values(), *materials.against_neutral.values()]
    shift = finetuning_shift(model, model if adapter is None else adapter, list(materials.split.evaluation), vectors)
    return {
        "shift": {name: shift.projections[:, index].mean(dim=0).tolist() for index, name in enumerate(shift.traits)},
        "shift_norms": shift.mean_norms.tolist(),
        "base_norms": shift.base_norms.tolist(),
    }
