"""The stages on traits: extraction, layer selection, dose-response and monitoring, each a call of the library.

A piece that is finished is not touched again; one that was interrupted goes on where it stopped.
Knows nothing about what the numbers say.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from persona_lens.evaluation.dose_response import dose_response
from persona_lens.evaluation.layer_selection import select_layer
from persona_lens.extraction.pipeline import extract_persona_vectors
from persona_lens.judges.scores import scorable_questions
from persona_lens.monitoring.experiment import judged_examples, many_shot, monitoring_experiment, system_prompts
from persona_lens.replication.context import Context
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.rollouts.rows import Prompt


def extract(run: Context, name: str) -> None:
    """Section 2: rollouts, scores, kept pairs, vectors."""
    folder, how = run.trait_folder(name), run.preset.extraction
    if (folder / "summary.json").exists():
        return
    trait = run.trait(name)
    extract_persona_vectors(
        run.model,
        trait,
        judge=run.unfitted_judge,
        engine=ModelEngine(run.model, how.max_new_tokens),
        questions=trait.extraction_questions[: how.questions],
        per_question=how.per_question,
        threshold=how.threshold,
        min_coherence=how.min_coherence,
        min_pairs=how.min_pairs,
        output_dir=folder,
        **run.sampling,
    )


def sweep_layers(run: Context, name: str) -> None:
    """Section B.4: every layer at the same coefficients."""
    folder, how = run.trait_folder(name), run.preset.layers
    if (folder / "layer_sweep.json").exists():
        return
    trait, vectors = run.trait(name), run.vectors(name)
    select_layer(
        run.model,
        vectors,
        trait,
        judge=run.judge_of(trait),
        layers=how.layers or None,
        coefficients=how.coefficients,
        questions=trait.extraction_questions[: how.questions],
        per_question=how.per_question,
        max_new_tokens=how.max_new_tokens,
        likelihood_proxy=False,
        output_dir=folder,
        **run.sampling,
    )


def measure_doses(run: Context, name: str) -> None:
    """Section 3.2: the direction at its layer, and random ones of its norm, on questions that it has not seen."""
    folder, how = run.trait_folder(name), run.preset.dose_response
    if (folder / "dose_response.json").exists():
        return
    trait, vector = run.trait(name), run.vector(name)
    dose_response(
        run.model,
        vector,
        trait,
        judge=run.judge_of(trait),
        coefficients=how.coefficients,
        random=how.random,
        questions=_asked(run, name, how.questions),
        per_question=how.per_question,
        max_new_tokens=how.max_new_tokens,
        output_dir=folder,
        **run.sampling,
    )


def monitor_system_prompts(run: Context, name: str) -> None:
    """Section 3.3: eight system prompts from discouraging to encouraging."""
    how = run.preset.monitoring
    _monitor(
        run,
        name,
        lambda questions: system_prompts(run.trait(name), questions, per_question=how.per_question),
        run.folder / "monitoring" / f"{name}_system-prompts",
    )


def monitor_many_shot(run: Context, name: str) -> None:
    """Section C: examples of the trait in context."""
    how = run.preset.monitoring

    def plan(questions: Sequence[str]) -> list[Prompt]:
        examples = judged_examples(run.trait_folder(name), threshold=run.preset.extraction.threshold)
        return many_shot(
            run.trait(name),
            questions,
            examples,
            shots=how.shots,
            per_question=how.per_question,
            seed=run.preset.seed,
        )

    _monitor(run, name, plan, run.folder / "monitoring" / f"{name}_many-shot")


def _monitor(run: Context, name: str, plan: Callable[[Sequence[str]], list[Prompt]], folder: Path) -> None:
    if (folder / "experiment.json").exists():
        return
    how, trait, vectors, layer = run.preset.monitoring, run.trait(name), run.vectors(name), run.layer(name)
    judge = run.judge_of(trait)
    monitoring_experiment(
        run.model,
        vectors,
        trait,
        plan(_asked(run, name, how.questions)),
        judge=judge,
        layer=layer,
        max_new_tokens=how.max_new_tokens,
        output_dir=folder,
        **run.sampling,
    )


def _asked(run: Context, name: str, count: int) -> list[str]:
    trait = run.trait(name)
    return scorable_questions(run.judge_of(trait), trait, trait.evaluation_questions)[:count]
