"""Screening a data set: the plan, the scores of its units, and the summary, each from the folder where it stands there.

The data set's score is the mean projection difference of its samples, which predicts the trait after finetuning on it
(arXiv:2507.21509, section 6). Units are scored here or by Ray actors. Whoever scores a unit writes its file, so a
worker that dies loses no more than the unit it was at, and units that are done are not scored again.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from persona_lens.chat.batches import template_hash
from persona_lens.clients.client import OpenAIClient
from persona_lens.interventions.hooks import attachments
from persona_lens.models.loading import load_model
from persona_lens.models.structure import Model, cpu_threads, identify
from persona_lens.screening.batches import SCORES, ScoreRows, write_scores
from persona_lens.screening.plan import SUMMARY, RowChoice, ScreeningPlan, make_plan, read_plan
from persona_lens.screening.result import Screening, write_summary
from persona_lens.screening.samples import Data, named_datasets
from persona_lens.screening.scoring import Base, ModelScorer
from persona_lens.storage.files import ensure_writable
from persona_lens.storage.locks import alone, sweep_up, writes_file
from persona_lens.storage.text import missing_package
from persona_lens.vectors.persona_vector import PersonaVector

# So few units to a task that little is lost with the process that holds it, and no more tasks than Ray likes.
MAX_TASKS = 10_000


class ShardsMissing(ValueError):
    """A shard is done, and others are not."""


@dataclass(frozen=True)
class Workers:
    """Ray actors that score units, on one machine or a cluster that shares the run's folder (the extra `scale`).

    Attributes:
        actors: How many; each loads a model of its own.
        gpus_per_actor: What each of them reserves.
        load: Loads the model in an actor; by default by its name, class and dtype.
    """

    actors: int
    gpus_per_actor: float = 0.0
    load: Callable[[], Model] | None = None

    def __post_init__(self) -> None:
        if self.actors < 1:
            raise ValueError(f"actors is 1 or more, got {self.actors}: leave workers out to score in this process.")


def screen(
    model: Model,
    data: Data,
    vectors: PersonaVector | Sequence[PersonaVector],
    *,
    output_dir: str | os.PathLike[str],
    base: Base = "generate",
    max_new_tokens: int = 256,
    rows: RowChoice = RowChoice(),
    workers: Workers | None = None,
    shard: tuple[int, int] = (0, 1),
    token_budget: int = 2048,
    allow_other_model: bool = False,
    progress: bool = True,
) -> Screening:
    """How far each response of a data set would pull the base model along persona vectors: projection differences.

    A sample's score is the mean projection of its response minus that of the base model's own greedy response to the
    same prompt; a data set's is the mean over its samples. It resumes: a second call with the same `output_dir` goes on
    where the first was interrupted, or reads what is finished. A row's numbers are the same, bit for bit, however often
    a run was interrupted and however many shards or workers took part: all of it runs on one number of CPU threads.
    Memory does not grow with the number of rows while they are planned and scored; for the summary the scores of one
    vector are in memory at a time.

    Args:
        model: The base model: what is to be finetuned, as it is before.
        data: A file of chats (.jsonl, .json, .parquet with `messages`, `conversation` or ShareGPT's `conversations`),
            rows such as a `datasets.Dataset`, streamed or not, or several of these by name.
        vectors: Of any traits and layers; blocks above the highest layer do not run.
        output_dir: Folder of the run. It holds the samples' texts, so that the data is not needed again.
        base: Where the base model's responses come from: `generate` (by the model), `given` (the rows'
            `base_response`), an `OpenAIClient` (the same model on a server), or nowhere: `proxy` takes the projection
            of the last prompt token instead, `none` nothing.
        max_new_tokens: Length limit of base responses that are generated.
        rows: Which rows are screened, and what is read of them.
        workers: Ray actors that score instead of this process.
        shard: `(i, n)` scores every n-th unit from unit i on: `(0, 4)` to `(3, 4)`, in processes that share the folder.
            The last to finish returns the result; the others raise `ShardsMissing`.
        token_budget: Padded tokens of a forward pass.
        allow_other_model: Accept vectors of an unrelated model of equal shape.
        progress: Show bars.

    Raises:
        ValueError: There is nothing to screen, a vector is not the model's, activations are not finite, or `output_dir`
            holds another run. Rows that are no samples are not errors: they are counted and listed in rejects.jsonl.
        ImportError: Near-duplicates or workers are asked for, and the package that they need is not installed.
        OSError: `output_dir` cannot be written, or another process is at work on the same shard.
    """
    folder = Path(output_dir)
    ensure_writable(folder / SUMMARY)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"A shard is its number, counted from 0, and how many there are; got {shard}.")
    several = (vectors,) if isinstance(vectors, PersonaVector) else tuple(vectors)
    scorer = ModelScorer(model, several, base, max_new_tokens, rows.after, token_budget, allow_other_model)
    datasets, settings = named_datasets(data), _settings(scorer)
    plan = make_plan(model.tokenizer, int(model.cfg.n_ctx), datasets, rows, settings, folder, progress=progress)
    score = partial(score_here, scorer.score, plan)
    if workers is not None:
        score = partial(score_with_ray, _score_maker(scorer, workers), plan, workers=workers)
    score_units(plan, score, shard=shard, progress=progress)
    return finish(folder)


def _settings(scorer: ModelScorer) -> dict[str, Any]:
    """Everything beside the choice of rows that shapes the numbers."""
    model, base, attached = scorer.model, scorer.base, attachments(scorer.model)
    if any(attachment.n_rows for attachment in attached):
        raise ValueError("Steering row by row has coefficients for other rows than these: steer all rows alike.")
    names = [f"{vector.trait}@{vector.layer}" for vector in scorer.vectors]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"Several vectors are called {doubled.pop()}: leave one out, or tell them apart by `dataclasses.replace`."
        )
    identity = identify(model)
    return {
        "model": identity.name,
        "model_class": identity.model_class,
        "weights_hash": identity.weights_hash,
        "template_hash": template_hash(model.tokenizer),
        "vectors": names,
        "fingerprints": [vector.fingerprint for vector in scorer.vectors],
        "base": base if isinstance(base, str) else f"{base.endpoint.model_name} on the server {base.endpoint.url}",
        "max_new_tokens": None if base in ("given", "proxy", "none") else scorer.max_new_tokens,
        "token_budget": scorer.token_budget,
        "interventions": [f"{value}, at {each.at}" for each in attached for value in each.interventions],
        "threads": cpu_threads(model),
    }


def score_units(
    plan: ScreeningPlan,
    score: Callable[[Sequence[int]], Iterable[int]],
    *,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Score this shard's units that are not scored yet: `score` takes their numbers and yields each that is done.

    Raises OSError where another process is at work on the shard.
    """
    own = range(shard[0], plan.n_units, shard[1])
    with writes_file(plan.folder / f"shard-{shard[0]}-of-{shard[1]}"):
        missing = sorted(plan.missing().intersection(own))
        if not missing:
            return
        (plan.folder / SCORES).mkdir(exist_ok=True)
        sweep_up(plan.folder / SCORES)
        done = len(own) - len(missing)
        with tqdm(total=len(own), initial=done, desc="screen", unit="unit", disable=not progress) as bar:
            for _ in score(missing):
                bar.update()


def score_here(score: ScoreRows, plan: ScreeningPlan, units: Iterable[int]) -> Iterator[int]:
    """Score units one after the other, and write each; yields their numbers as they are done."""
    for unit in units:
        rows = plan.unit(unit)
        write_scores(plan.folder, unit, rows, score(rows), plan.settings["vectors"])
        yield unit


def finish(output_dir: str | os.PathLike[str]) -> Screening:
    """The result of a run whose units are all scored; its summary is written where it is not there yet.

    Raises ShardsMissing where units are missing, FileNotFoundError where the folder holds no run.
    """
    plan = read_plan(Path(output_dir))
    if missing := plan.missing():
        raise ShardsMissing(
            f"{plan.folder}: {len(missing)} of {plan.n_units} units are not scored yet: run the other shards, "
            "or call again without a shard to score what is left."
        )
    with alone(plan.folder / ".plan.lock"):
        if not (plan.folder / SUMMARY).exists():
            write_summary(Screening.load(plan.folder))
    return Screening.load(plan.folder)


# Ray actors


def _score_maker(scorer: ModelScorer, workers: Workers) -> Callable[[], ScoreRows]:
    """What makes a scorer like this one in an actor.

    Raises ImportError where Ray is not installed, ValueError for interventions and clients of servers, which would stay
    behind, and in an actor for another model.
    """
    if find_spec("ray") is None:
        raise missing_package("Screening with actors", "ray", extra="scale")
    if attachments(scorer.model):
        raise ValueError("Interventions act on the model of this process alone: screen with them without workers.")
    if isinstance(scorer.base, OpenAIClient):
        raise ValueError("A server is asked by this process alone: screen with its responses without workers.")
    identity = identify(scorer.model)
    load = workers.load or partial(
        load_model,
        # Not the identity's name, which is that of a local folder without its path.
        str(getattr(scorer.model.cfg, "model_name", identity.name)),
        dtype=next(iter(scorer.model.parameters())).dtype,
        model_class=identity.model_class,  # type: ignore[arg-type]
    )
    weights_hash, threads = identity.weights_hash, torch.get_num_threads()
    settings = {name: value for name, value in vars(scorer).items() if name != "model"}

    def make() -> ScoreRows:
        # Sums depend on how many threads share them.
        torch.set_num_threads(threads)
        model = load()
        loaded = identify(model).weights_hash
        if loaded != weights_hash:
            raise ValueError(f"The actor's model has weights {loaded}, this one's {weights_hash}: set Workers.load.")
        return ModelScorer(model, **settings).score

    return make


def score_with_ray(
    make_score: Callable[[], ScoreRows], plan: ScreeningPlan, units: Sequence[int], *, workers: Workers
) -> Iterator[int]:
    """Score units by actors that each make what scores and write what they score; yields units as done."""
    # Ray counts its users on a server of its maker unless told not to, which has to be before it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        # A cluster knows its processors; a machine of fewer than there are actors would wait for more without end.
        cpus = None if os.environ.get("RAY_ADDRESS") else max(os.cpu_count() or 1, workers.actors)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.print_on_execution_start = False, False
    try:
        tasks = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=min(len(units), MAX_TASKS))
        scored = tasks.map_batches(
            _UnitActor,
            fn_constructor_args=(make_score, replace(plan, folder=plan.folder.resolve())),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers.actors),
            num_cpus=0 if workers.gpus_per_actor else 1,
            num_gpus=workers.gpus_per_actor,
        )
        for row in scored.iter_rows():
            yield int(row["unit"])
    finally:
        if started:
            ray.shutdown()


class _UnitActor:
    """What runs in an actor: a scorer, made once, and the plan."""

    def __init__(self, make_score: Callable[[], ScoreRows], plan: ScreeningPlan):
        self.score, self.plan = make_score(), plan

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"unit": list(score_here(self.score, self.plan, map(int, batch["unit"])))}
