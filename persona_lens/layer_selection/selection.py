"""`select_layer`: every layer steered at the same coefficients, all of it mixed in batched generation, then judged.

Knows nothing about how the best cell is chosen from the result.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from persona_lens.evaluation import Cell, evaluate_cells
from persona_lens.interventions import NamedPositions, Steer
from persona_lens.judges import Judge, scorable_questions
from persona_lens.layer_selection.screens import FixedTexts, fixed_texts, screen_layers
from persona_lens.layer_selection.sweep import ROWS_NAME, SWEEP_FILE, LayerSweep
from persona_lens.locks import writes_output
from persona_lens.models import Model
from persona_lens.records import refuse_other_json
from persona_lens.rollouts import keeps_date
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVectors


@writes_output
@keeps_date
def select_layer(
    model: Model,
    vectors: PersonaVectors,
    trait: Trait | str,
    *,
    judge: Judge,
    layers: Sequence[int] | None = None,
    coefficients: Sequence[float] = (1.0, 2.0, 4.0),
    questions: Sequence[str] | None = None,
    per_question: int = 1,
    texts: FixedTexts | None = None,
    likelihood_screen: bool = True,
    at: NamedPositions = "response",
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_rows: int = 120,
    allow_other_model: bool = False,
    output: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerSweep:
    """Steer every layer by its own direction at every coefficient, and judge the answers.

    `layers` default to all, `questions` to the trait's extraction questions; the recommended layer is then confirmed on
    evaluation questions by `dose_response`. Rows of all cells are mixed in batched generation, where those of one
    question share its prompt, and the unsteered answers are sampled once. `texts` are what the likelihood screen reads
    (default: the kept pairs of an extraction in `output`); `likelihood_screen=False` leaves that one out. With
    `output`, a folder, every batch is kept as it is made (sweep_rollouts.jsonl, sweep_scores.jsonl,
    layer_sweep.json), and a second call goes on where the first one stopped.

    Raises ValueError for layers out of range, repeated or zero coefficients, vectors of another model, or an `output`
    that holds a sweep made otherwise. Source: arXiv:2507.21509, section B.4.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    layers = vectors.known_layers if layers is None else sorted(set(layers))
    amounts = [float(coefficient) for coefficient in coefficients]
    cells = _cells(vectors, layers, amounts)
    Steer(vectors).check(model, allow_other_model=allow_other_model)
    asked = scorable_questions(judge, trait, trait.extraction_questions if questions is None else questions)
    folder = None if output is None else Path(output)
    if folder is not None:
        refuse_other_json(folder / SWEEP_FILE, ("format_version", "trait", "cells"))
        texts = fixed_texts(folder, trait) if texts is None and likelihood_screen else texts
    if progress:
        rows = len(asked) * per_question * (len(cells) + 1)
        tqdm.write(
            f"{trait.name}: {len(layers)} layers x {len(amounts)} coefficients x {len(asked)} questions, "
            f"{rows} rollouts with the unsteered ones, at most {rows * max_new_tokens:,} sampled tokens.",
            file=sys.stderr,
        )
    baseline, *found = evaluate_cells(
        model,
        trait,
        judge,
        list(cells.values()),
        questions=asked,
        per_question=per_question,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_rows=batch_rows,
        at=at,
        allow_other_model=allow_other_model,
        folder=folder,
        name=ROWS_NAME,
        seed=seed,
        progress=progress,
    )
    middle = sorted(amounts, key=abs)[len(amounts) // 2]
    screens = screen_layers(
        model,
        vectors,
        trait,
        layers=layers,
        coefficient=middle,
        texts=texts,
        at=at,
        allow_other_model=allow_other_model,
        progress=progress,
    )
    sweep = LayerSweep(
        trait.name,
        judge.name(trait),
        tuple(layers),
        tuple(amounts),
        baseline,
        dict(zip(cells, found, strict=True)),
        {place: Steer(cell.vector, cell.coefficient).doses[0] for place, cell in cells.items()},
        screens,
    )
    if folder is not None:
        sweep.save(folder)
    return sweep


def _cells(
    vectors: PersonaVectors, layers: Sequence[int], coefficients: Sequence[float]
) -> dict[tuple[int, float], Cell]:
    if not coefficients or 0.0 in coefficients or len(set(coefficients)) < len(coefficients) or not layers:
        raise ValueError(
            f"A sweep needs layers, and distinct coefficients other than 0 (which is always swept); got {list(layers)} "
            f"and {list(coefficients)}."
        )
    return {(layer, amount): Cell(vectors.at(layer), amount) for layer in layers for amount in coefficients}
