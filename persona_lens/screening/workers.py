"""Units scored by Ray Data actors, on one machine or a cluster that shares the run's folder.

An actor holds a model of its own and reads the units that it is given from the plan; this process alone writes. A
worker that dies is replaced and its units are scored again; a unit's numbers do not depend on who scores it.
Knows nothing about how a unit is scored.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from persona_lens.clients.client import OpenAIClient
from persona_lens.interventions.hooks import attachments
from persona_lens.models.loading import load_model
from persona_lens.models.structure import Model, identify
from persona_lens.screening.plan import Plan
from persona_lens.screening.scoring import ModelScorer, RowScore, Scorer, Scoring
from persona_lens.storage.text import missing_package

# So few units to a task that little is lost with the process that collects them, and no more tasks than Ray likes.
MAX_TASKS = 10_000


def score_with_actors(
    scorer: ModelScorer,
    plan: Plan,
    *,
    actors: int,
    gpus_per_actor: float = 0.0,
    load: Callable[[], Model] | None = None,
) -> Callable[[Sequence[int]], Iterator[tuple[int, list[RowScore]]]]:
    """The units of a plan as actors finish them, each scored as `scorer` would.

    `load` makes the model in an actor; by default it is loaded by its name, class and dtype. Raises ImportError where
    Ray is not installed, ValueError for interventions and clients of servers, which would stay behind, and in an actor
    for another model.
    """
    if find_spec("ray") is None:
        raise missing_package("Screening with actors", "ray", extra="scale")
    if attachments(scorer.model):
        raise ValueError("Interventions act on the model of this process alone: screen with them without actors.")
    if isinstance(scorer.how.base, OpenAIClient):
        raise ValueError("A server is asked by this process alone: screen with its responses without actors.")
    identity = identify(scorer.model)
    if load is None:
        load = partial(
            load_model,
            # Not the identity's name, which is that of a local folder without its path.
            str(getattr(scorer.model.cfg, "model_name", identity.name)),
            dtype=next(iter(scorer.model.parameters())).dtype,
            model_class=identity.model_class,  # type: ignore[arg-type]
        )
    make = partial(_load_scorer, load, identity.weights_hash, scorer.how, torch.get_num_threads())
    return partial(score_with_ray, make, plan, actors=actors, gpus_per_actor=gpus_per_actor)


def score_with_ray(
    make_scorer: Callable[[], Scorer], plan: Plan, units: Sequence[int], *, actors: int, gpus_per_actor: float = 0.0
) -> Iterator[tuple[int, list[RowScore]]]:
    """The units of these numbers as they are finished, by actors that each make a scorer of their own."""
    # Ray counts its users on a server of its maker unless told not to, which has to be before it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        # A cluster knows its processors; a machine of fewer than there are actors would wait for more without end.
        cpus = None if os.environ.get("RAY_ADDRESS") else max(os.cpu_count() or 1, actors)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.print_on_execution_start = False, False
    try:
        tasks = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=min(len(units), MAX_TASKS))
        scored = tasks.map_batches(
            _UnitActor,
            fn_constructor_args=(make_scorer, replace(plan, folder=plan.folder.resolve())),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=0 if gpus_per_actor else 1,
            num_gpus=gpus_per_actor,
        )
        for row in scored.iter_rows():
            yield int(row["unit"]), [RowScore(*score) for score in json.loads(row["scores"])]
    finally:
        if started:
            ray.shutdown()


class _UnitActor:
    """What runs in an actor: a scorer, made once, and the plan's files."""

    def __init__(self, make_scorer: Callable[[], Scorer], plan: Plan):
        self.scorer, self.plan = make_scorer(), plan

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        units = [int(unit) for unit in batch["unit"]]
        # As text, which Ray's tables hold as it is.
        return {"unit": units, "scores": [json.dumps(self.scorer.score(self.plan.unit(unit))) for unit in units]}


def _load_scorer(load: Callable[[], Model], weights_hash: str, how: Scoring, threads: int) -> ModelScorer:
    # Sums depend on how many threads share them.
    torch.set_num_threads(threads)
    model = load()
    found = identify(model).weights_hash
    if found != weights_hash:
        raise ValueError(f"The actor's model has weights {found}, the plan's {weights_hash}: pass load=.")
    return ModelScorer(model, how)
