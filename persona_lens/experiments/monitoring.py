"""Does the prompt give the persona away? The last prompt token's projection against how the model then behaves.

Every condition's prompts are answered several times and judged; each prompt's last token is projected on the unit
vector at every layer, before a word is said (arXiv:2507.21509, section 3.3).
Knows nothing about which conditions these are.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from persona_lens.activations import stream_means
from persona_lens.experiments.monitoring_result import MonitoringExperiment, Point
from persona_lens.judges import Judge, ScoredRollout, score_rollouts
from persona_lens.locks import writes_output
from persona_lens.models import Model
from persona_lens.records import refuse_other_json
from persona_lens.rollouts import ModelEngine, Prompt, RolloutEngine, collect_rollouts, keeps_date
from persona_lens.template_date import fixed_date
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors


@writes_output
@keeps_date
def monitoring_experiment(
    model: Model,
    trait: Trait,
    vectors: PersonaVectors,
    prompts: Sequence[Prompt],
    *,
    judge: Judge,
    layer: int,
    engine: RolloutEngine | None = None,
    max_new_tokens: int = 1000,
    output: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MonitoringExperiment:
    """Answer, judge and project the prompts of `system_prompts` or `many_shot`, or of your own.

    `layer` is the one chosen beforehand, as by `select_layer`: the best of the curve would be chosen on its own result.
    With `output`, a folder, rollouts, scores and the result (experiment.json) are written there, and an interrupted
    run goes on. Raises ValueError where a vector does not belong to the model, or a prompt stands twice.
    """
    vectors.check(model)
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise ValueError(f"{trait.name}: {len(prompts)} prompts are planned and some stand twice: give each one place.")
    vector = vectors.at(layer)  # refuses a layer that there is not, before anything is sampled
    folder = None if output is None else Path(output)
    if folder is not None:
        refuse_other_json(folder / "experiment.json", ("format_version", "trait", "points"))
    engine = ModelEngine(model, max_new_tokens) if engine is None else engine
    rollouts = collect_rollouts(
        engine, prompts, seed=seed, output=folder and folder / "rollouts.jsonl", progress=progress
    )
    scored = score_rollouts(judge, trait, rollouts, output=folder and folder / "scores.jsonl", progress=progress)
    settings = {
        "judge": judge.name(trait),
        "engine": engine.name,
        "vector": vector.fingerprint,
        "position": vectors.position,
    }
    found = MonitoringExperiment(trait.name, layer, _points(model, vectors, scored), settings, seed)
    if folder is not None:
        found.save(folder / "experiment.json")
    return found


def _points(model: Model, vectors: PersonaVectors, scored: Sequence[ScoredRollout]) -> tuple[Point, ...]:
    groups: dict[tuple[str, str], list[ScoredRollout]] = {}
    for row in scored:
        groups.setdefault((row.rollout.condition, row.rollout.question), []).append(row)
    asked = [members[0].rollout for members in groups.values()]
    rows = []
    for each in asked:
        with fixed_date(each.date):
            rows.append(each.prompt.tokenize(model.tokenizer))
    projections = torch.empty(len(rows), vectors.n_layers, dtype=torch.float32)
    for batch in stream_means(model, rows, position="prompt_last"):
        projections[batch.rows] = vectors.project(batch.means[:, 1:])
    return tuple(
        _point(*group, members, row) for (group, members), row in zip(groups.items(), projections.tolist(), strict=True)
    )


def _point(condition: str, question: str, members: Sequence[ScoredRollout], projections: Sequence[float]) -> Point:
    scores = [row.trait_score for row in members if row.trait_score is not None]
    mean = sum(scores) / len(scores) if scores else None
    return Point(condition, question, tuple(projections), mean, len(scores), len(members))
