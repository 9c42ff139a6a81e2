"""The commands that steer: which layer to take, and what a prompt's answer becomes under interventions."""

from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.inputs import load_run, load_vectors, selected_layer
from persona_lens.cli.interrupts import lock
from persona_lens.cli.options import (
    ActOn,
    ActOnOption,
    JsonOption,
    JudgeOptions,
    LayerOption,
    ModelOptions,
    RunLengthOption,
    RunTraitOption,
    SeedOption,
    command,
)
from persona_lens.cli.output import interval, number, print_columns, print_table, records, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.evaluation.dose_response import DoseResponse
    from persona_lens.evaluation.evaluate import Evaluation
    from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
    from persona_lens.interventions.values import Intervention
    from persona_lens.traits.trait import Trait
    from persona_lens.vectors.persona_vectors import PersonaVectors

CapOption = Annotated[float | None, typer.Option(help="Also with the projection at the layer capped there.")]
AblateOption = Annotated[bool, typer.Option("--ablate", help="Also with the direction ablated at every layer.")]


@command
def select_layer(
    run: Annotated[Path, typer.Argument(help="A run's folder (of `extract` or `demo`), or a vectors file.")],
    models: ModelOptions,
    judges: JudgeOptions,
    trait: RunTraitOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder; the run's by default. A second call resumes.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="A layer, counted from 0; repeat. All by default.")] = None,
    coefficient: Annotated[list[float] | None, typer.Option(help="Repeat for several. 1, 2 and 4 by default.")] = None,
    n_questions: Annotated[int | None, typer.Option(min=2, help="Only the first n questions.")] = None,
    per_question: Annotated[int, typer.Option(min=1, help="Answers to each question in each cell.")] = 1,
    max_new_tokens: RunLengthOption = None,
    min_coherence: Annotated[float, typer.Option(min=0, max=100, help="Mean coherence that a cell needs.")] = 75.0,
    confirm: Annotated[bool, typer.Option(help="Confirm the choice on evaluation questions.")] = True,
    random: Annotated[int, typer.Option(min=0, help="Random directions to confirm it against.")] = 10,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Steer every layer at several coefficients, judge the answers, and recommend a layer.

    Example: persona-lens select-layer runs/demo --coefficient 2 --coefficient 4 --n-questions 4
    """
    from persona_lens.evaluation.dose_response import dose_response
    from persona_lens.evaluation.layer_proxies import fixed_texts
    from persona_lens.evaluation.layer_selection import select_layer as sweep_layers

    loaded = load_run(run, trait, max_new_tokens)
    folder = loaded.folder if output is None else output
    if folder is None:
        raise typer.BadParameter("--output is needed where the vectors are given as a file")
    lock(folder)
    coefficients = tuple(coefficient or (1.0, 2.0, 4.0))
    make_judge = judges.load_judge(folder)
    model = models.load()
    shared: dict[str, Any] = {
        "judge": make_judge(lambda: loaded.likelihood_judge(model, folder, seed)),
        "per_question": per_question,
        "max_new_tokens": loaded.max_new_tokens,
        "output_dir": folder,
        "seed": seed,
    }
    sweep = sweep_layers(
        model,
        loaded.vectors,
        loaded.trait,
        layers=layer or None,
        coefficients=coefficients,
        questions=loaded.trait.extraction_questions[:n_questions],
        texts=fixed_texts(loaded.folder or folder, loaded.trait),
        **shared,
    )
    best = sweep.best(min_coherence)
    confirmation = None
    if confirm:
        doses = sorted({sign * amount for amount in coefficients for sign in (1, -1)})
        vector = loaded.vectors.at(best.layer)
        confirmation = dose_response(model, vector, loaded.trait, coefficients=doses, random=random, **shared)
    if as_json:
        confirmed = None if confirmation is None else confirmation.summary()
        tell_json({**sweep_as_json(sweep, min_coherence), "confirmed": confirmed})
        return
    _show_sweep(sweep, best)
    _show_proxies(sweep)
    show_doses(sweep, loaded.trait, min_coherence=min_coherence)
    if confirmation is not None:
        _show_confirmation(confirmation)


@command
def steer(
    prompt: Annotated[str, typer.Argument(help="What to ask the model.")],
    vectors: Annotated[Path, typer.Option(help="A run's folder, or a vectors file.")],
    models: ModelOptions,
    layer: LayerOption = None,
    coefficient: Annotated[list[float] | None, typer.Option(help="Repeat for several, side by side.")] = None,
    ablate: AblateOption = False,
    cap: CapOption = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "You are a helpful assistant.",
    at: ActOnOption = ActOn.RESPONSE,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """What the model answers without and with the vector, several coefficients side by side.

    Example: persona-lens steer "How will my exam go?" --vectors runs/demo --coefficient -4 --coefficient 4 --ablate
    """
    from persona_lens.chat.batches import chat_messages, tokenize_chat
    from persona_lens.generation.decoding import generate
    from persona_lens.interventions.hooks import intervene

    loaded = load_vectors(vectors)
    interventions = _variants(
        loaded, selected_layer(vectors, loaded) if layer is None else layer, coefficient, ablate, cap
    )
    model = models.load()
    ids = tokenize_chat(model.tokenizer, chat_messages(system, prompt)).prompt

    def answer() -> str:
        completions = generate(model, [ids], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return model.tokenizer.decode(completions[0].tokens, skip_special_tokens=True)

    texts = {"no intervention": answer()}
    for intervention in interventions:
        with intervene(model, intervention, at=at.value):
            texts[str(intervention)] = answer()
    if as_json:
        tell_json([{"intervention": name, "text": text} for name, text in texts.items()])
    else:
        print_columns(texts)


def _variants(
    vectors: "PersonaVectors", layer: int, coefficients: list[float] | None, ablate: bool, cap: float | None
) -> "list[Intervention]":
    from persona_lens.interventions.values import Ablate, Cap, Steer

    vector = vectors.at(layer)
    # With none of the three options the vector itself is steered by, in both directions.
    amounts = coefficients or ([] if ablate or cap is not None else [-2.0, 2.0])
    variants: list[Intervention] = [Steer(vector, amount) for amount in amounts]
    variants += [Ablate(vectors)] if ablate else []
    variants += [Cap(vector, maximum=cap)] if cap is not None else []
    return variants


def sweep_as_json(sweep: "LayerSweep", min_coherence: float = 75.0) -> dict[str, Any]:
    """A sweep's table, its choice (null where no cell is coherent enough), and how well cheap proxies rank layers."""
    try:
        choice = asdict(sweep.best(min_coherence))
    except ValueError:
        choice = None
    return {
        "trait": sweep.trait,
        "judge": sweep.judge,
        "best": choice,
        "cells": records(sweep.table()),
        "screens": records(sweep.proxy_correlations().rename(columns={"proxy": "screen"})),
    }


def show_doses(sweep: "LayerSweep", trait: "Trait", *, min_coherence: float) -> None:
    """Print the chosen layer's dose-response, with a sentiment lexicon beside the judge where one is installed."""
    from persona_lens.judges.classifier import SentimentJudge
    from persona_lens.judges.scores import score_rollouts
    from persona_lens.statistics import mean_estimate

    best = sweep.best(min_coherence)
    rows = []
    for coefficient, evaluation in sweep.dose_response(best.layer).items():
        dose = number(sweep.doses.get((best.layer, coefficient), 0.0), "+.2f", "")
        try:
            rollouts = [row.rollout for row in evaluation.scored]
            scored = score_rollouts(rollouts, trait, judge=SentimentJudge(), progress=False)
            questions = [row.rollout.question for row in scored]
            sentiment = str(mean_estimate([row.trait_score for row in scored], questions))
        except ImportError:
            sentiment = ""
        example = shorten(evaluation.scored[0].rollout.response, 40, placeholder="...")
        scores = str(evaluation.trait_score), sentiment, str(evaluation.coherence)
        rows.append([f"{coefficient:g}", dose, *scores, example])
    head = ["coefficient", "dose", f"{sweep.trait} [95 %]", "sentiment lexicon", "coherence", "first answer"]
    tell(f"\nSteering layer {best.layer}, with intervals over {len(sweep.baseline.questions)} questions:")
    print_table(head, rows)
    tell(f"{best.reason[0].upper()}{best.reason[1:]}.")


def _show_sweep(sweep: "LayerSweep", best: "LayerChoice") -> None:
    """Print every layer with the trait score and mean coherence of each coefficient; the chosen layer has a star."""

    def cell(evaluation: "Evaluation") -> str:
        return f"{evaluation.trait_score} / {number(evaluation.coherence.value, '.0f')}"

    rows = [["none", cell(sweep.baseline)]]
    for layer in sweep.layers:
        cells = [cell(sweep.evaluations[layer, coefficient]) for coefficient in sweep.coefficients]
        rows.append([f"{'*' * (layer == best.layer)}{layer}", *cells])
    print_table(["layer", *(f"x {amount:g}: {sweep.trait} / coherence" for amount in sweep.coefficients)], rows)


def _show_proxies(sweep: "LayerSweep") -> None:
    """Print how well each cheap proxy ranks the layers as the sweep does."""
    table = sweep.proxy_correlations()
    if all(row["spearman"] is None for row in records(table)):  # fewer than three layers have no ranks
        return
    tell("\nSpearman of cheap proxies with the swept trait score, over layers:")
    rows = [
        [str(name), *(interval(row["spearman"], row["low"], row["high"], ".2f") for row in records(group))]
        for name, group in table.groupby("proxy", sort=False)
    ]
    print_table(["proxy", *(f"x {coefficient:g}" for coefficient in sweep.coefficients)], rows)


def _show_confirmation(response: "DoseResponse") -> None:
    """Print what the chosen direction does on other questions, beside random directions of equal norm."""
    head = ["coefficient", "dose", f"{response.trait} [95 %]", "coherence", "random directions: mean (range)"]
    rows = []
    for evaluation, row in zip(response.evaluations, records(response.table()), strict=True):
        spread = number(row["random_mean"], ".1f")
        if row["random_mean"] is not None:
            spread += f" ({row['random_low']:.1f} to {row['random_high']:.1f})"
        scores = str(evaluation.trait_score), str(evaluation.coherence), spread
        rows.append([f"{row['coefficient']:g}", number(row["dose"], "+.2f", ""), *scores])
    n_questions = len(response.evaluations[0].questions)
    tell(f"\nConfirmed at layer {response.layer} on {n_questions} evaluation questions:")
    print_table(head, rows)
    tell(f"{response}.")
