"""The commands that steer: which layer to take, and what a prompt's answer becomes under interventions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.ending import claim
from persona_lens.cli.inputs import ModelClass, load, load_run, load_vectors, selected_layer
from persona_lens.cli.judging import judge_of
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    AliasOption,
    ClassOption,
    ConcurrencyOption,
    JsonOption,
    JudgeExtraOption,
    JudgeOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    TimeoutOption,
    app,
)
from persona_lens.cli.output import (
    print_columns,
    show_confirmation,
    show_doses,
    show_screens,
    show_sweep,
    sweep_as_json,
    tell_json,
)

if TYPE_CHECKING:
    from persona_lens.interventions.values import Intervention
    from persona_lens.judges.scores import Judge
    from persona_lens.vectors.persona_vectors import PersonaVectors

RunArgument = Annotated[Path, typer.Argument(help="A run's folder (of `extract` or `demo`), or a vectors file.")]
TraitName = Annotated[str | None, typer.Option("--trait", help="Bundled trait or JSON; by default the run's own.")]
LimitOption = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Length limit of a response; by default the run's.")
]


@app.command()
def select_layer(
    run: RunArgument,
    trait: TraitName = None,
    output: Annotated[Path | None, typer.Option(help="Folder; the run's by default. A second call resumes.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="A layer, counted from 0; repeat. All by default.")] = None,
    coefficient: Annotated[list[float] | None, typer.Option(help="Repeat for several. 1, 2 and 4 by default.")] = None,
    n_questions: Annotated[int | None, typer.Option(min=2, help="Only the first so many questions.")] = None,
    per_question: Annotated[int, typer.Option(min=1, help="Answers to each question in each cell.")] = 1,
    max_new_tokens: LimitOption = None,
    min_coherence: Annotated[float, typer.Option(min=0, max=100, help="Mean coherence that a cell needs.")] = 75.0,
    confirm: Annotated[bool, typer.Option(help="Confirm the choice on evaluation questions.")] = True,
    random: Annotated[int, typer.Option(min=0, help="Random directions to confirm it against.")] = 10,
    judge: JudgeOption = "likelihood",
    judge_extra_body: JudgeExtraOption = None,
    concurrency: ConcurrencyOption = 20,
    timeout: TimeoutOption = 60.0,
    alias: AliasOption = None,
    model: ModelOption = DEFAULT_MODEL,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Steer every layer at several coefficients, judge the answers, and recommend a layer.

    Example: persona-lens select-layer runs/demo --coefficient 2 --coefficient 4 --n-questions 4
    """
    from persona_lens.evaluation.dose_response import dose_response
    from persona_lens.evaluation.layer_proxies import fixed_texts
    from persona_lens.evaluation.layer_selection import select_layer as sweep_layers
    from persona_lens.extraction.pipeline import calibrated_judge

    found = load_run(run, trait, max_new_tokens)
    folder = found.folder if output is None else output
    if folder is None:
        raise typer.BadParameter("--output is needed where the vectors are given as a file")
    claim(folder)
    amounts = tuple(coefficient or (1.0, 2.0, 4.0))
    settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "aliases": alias}
    chosen = judge_of(judge, folder, **settings, extra_body=judge_extra_body)
    ready = load(model, model_class, threads)
    source = found.folder or folder

    def own() -> "Judge":
        return calibrated_judge(ready, found.trait, source, max_new_tokens=found.max_new_tokens, seed=seed)

    shared: dict[str, Any] = {
        "judge": chosen(own),
        "per_question": per_question,
        "max_new_tokens": found.max_new_tokens,
        "output": folder,
        "seed": seed,
    }
    questions = found.trait.extraction_questions[:n_questions]
    sweep = sweep_layers(
        ready,
        found.vectors,
        found.trait,
        layers=layer or None,
        coefficients=amounts,
        questions=questions,
        texts=fixed_texts(source, found.trait),
        **shared,
    )
    best = sweep.best(min_coherence)
    confirmed = None
    if confirm:
        doses = sorted({sign * amount for amount in amounts for sign in (1, -1)})
        vector = found.vectors.at(best.layer)
        confirmed = dose_response(ready, vector, found.trait, coefficients=doses, random=random, **shared)
    if as_json:
        shown = {**sweep_as_json(sweep, min_coherence), "confirmed": None if confirmed is None else confirmed.summary()}
        tell_json(shown)
        return
    show_sweep(sweep, best)
    show_screens(sweep)
    show_doses(sweep, found.trait, min_coherence=min_coherence)
    if confirmed is not None:
        show_confirmation(confirmed)


@app.command()
def steer(
    prompt: Annotated[str, typer.Argument(help="What to ask the model.")],
    vectors: Annotated[Path, typer.Option(help="A run's folder, or a vectors file.")],
    layer: Annotated[int | None, typer.Option(help="Counted from 0; by default the one that was selected.")] = None,
    coefficient: Annotated[list[float] | None, typer.Option(help="Repeat for several, side by side.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also with the direction ablated at every layer.")] = False,
    cap: Annotated[float | None, typer.Option(help="Also with the projection at the layer capped there.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "You are a helpful assistant.",
    at: Annotated[str, typer.Option(help="Which tokens: response, prompt or all.")] = "response",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    model: ModelOption = DEFAULT_MODEL,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """What the model answers without and with the vector, several coefficients side by side.

    Example: persona-lens steer "How will my exam go?" --vectors runs/demo --coefficient -4 --coefficient 4 --ablate
    """
    from persona_lens.chat.batches import chat_messages, tokenize_chat
    from persona_lens.generation.decoding import generate
    from persona_lens.interventions.hooks import intervene

    if at not in ("response", "prompt", "all"):
        raise typer.BadParameter(f"--at is response, prompt or all; got {at}")
    given = load_vectors(vectors)
    chosen = selected_layer(vectors, given) if layer is None else layer
    variants = _variants(given, chosen, coefficient, ablate, cap)
    ready = load(model, model_class, threads)
    ids = tokenize_chat(ready.tokenizer, chat_messages(system, prompt)).prompt

    def answer() -> str:
        done = generate(ready, [ids], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return ready.tokenizer.decode(done[0].tokens, skip_special_tokens=True)

    texts = {"no intervention": answer()}
    for intervention in variants:
        with intervene(ready, intervention, at=at):
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
    # Alone, --ablate and --cap are compared with nothing; without any of them, the vector itself is what one asks for.
    amounts = coefficients or ([] if ablate or cap is not None else [-2.0, 2.0])
    variants: list[Intervention] = [Steer(vector, amount) for amount in amounts]
    variants += [Ablate(vectors)] if ablate else []
    variants += [Cap(vector, maximum=cap)] if cap is not None else []
    return variants
