"""Screening a data set: the plan, the scores of its units, and the table, each from the folder where it stands there.

The dataset's score is the mean projection difference of its samples, which predicts the trait after finetuning on it
(arXiv:2507.21509, section 6).
Knows nothing about what the numbers say.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from persona_lens.chat.batches import template_hash
from persona_lens.interventions.hooks import attachments
from persona_lens.models.structure import Model, cpu_threads, identify
from persona_lens.screening.plan import SETTINGS, Plan, make_plan, read_plan
from persona_lens.screening.planning import Choices, Room
from persona_lens.screening.result import Screening, read_screening, write_summary
from persona_lens.screening.samples import Data, named_datasets
from persona_lens.screening.scores import LOG_FIELDS, TABLE, log_path, log_unit, scored_units, write_table
from persona_lens.screening.scoring import Base, ModelScorer, RowScore, Scorer, Scoring
from persona_lens.screening.workers import score_with_actors
from persona_lens.storage.files import JsonLines, ensure_writable, read_json
from persona_lens.storage.locks import alone, writes_file
from persona_lens.vectors.persona_vector import PersonaVector

FORMAT_VERSION = 1


class ShardsMissing(ValueError):
    """A shard is done, and others are not."""


def screen(
    model: Model,
    data: Data,
    vectors: PersonaVector | Sequence[PersonaVector],
    *,
    output: str | os.PathLike[str],
    base: Base = "generate",
    base_fraction: float = 1.0,
    first_turn: bool = False,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    max_new_tokens: int = 256,
    sample: int | None = None,
    after: str | None = None,
    system_prompt: str | None = None,
    shard: tuple[int, int] = (0, 1),
    actors: int = 0,
    gpus_per_actor: float = 0.0,
    load: Callable[[], Model] | None = None,
    token_budget: int = 2048,
    allow_other_model: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Screening:
    """How far each response of a data set would pull the base model along persona vectors: projection differences.

    A sample's score is the mean projection of its response minus that of the base model's own greedy response to the
    same prompt; a data set's is the mean over its samples. It resumes: a second call with the same `output` goes on
    where the first was interrupted, or reads what is finished. A row's numbers are the same, bit for bit, however often
    a run was interrupted and however many shards or actors took part: all of it runs on one number of CPU threads.

    Args:
        model: The base model: what is to be finetuned, as it is before.
        data: A file of chats (.jsonl, .json, .parquet with `messages`, `conversation` or ShareGPT's `conversations`),
            rows such as a `datasets.Dataset`, streamed or not, or several of these by name.
        vectors: Of any traits and layers; blocks above the highest layer do not run.
        output: Folder of the run. It holds the samples' texts, so that the data is not needed again.
        base: Where the base model's responses come from: `generate` (by the model), `given` (the rows'
            `base_response`), an `OpenAIClient` (the same model on a server), or nowhere: `proxy` takes the projection
            of the last prompt token instead, `none` nothing.
        base_fraction: The share of rows, drawn at random, that get a base response; the others are left out of a data
            set's projection difference, whose interval grows.
        first_turn: Screen the first response of a chat, as the paper does with logs of real chats; else the last.
        max_prompt_tokens: Leave longer prompts out (the paper: 512); they are counted.
        max_response_tokens: Read so many tokens of a response; cut ones are counted.
        max_new_tokens: Length limit of base responses that are made.
        sample: Screen so many random samples of each data set (the paper: 200,000).
        after: Average only what follows this text, such as `</think>`.
        system_prompt: For rows without a system turn; None leaves them to the chat template, which may add its own.
        shard: Score only every so manyth unit: `(0, 4)` to `(3, 4)`, in processes that share the folder. The last to
            finish writes the table; the others raise `ShardsMissing`.
        actors: Score in so many Ray actors instead of here (the extra `scale`); each loads the model by `load`.
        gpus_per_actor: What each actor reserves.
        load: Loads the model in an actor; by default by its name.
        token_budget: Padded tokens of a forward pass.
        allow_other_model: Accept vectors of an unrelated model of equal shape.
        seed: Of what is drawn at random.
        progress: Show bars.

    Raises:
        ValueError: There is nothing to screen, a vector is not the model's, activations are not finite, or `output`
            holds another run. Rows that are no samples are not errors: they are counted and listed in rejects.jsonl.
        OSError: `output` cannot be written, or another process is at work on the same shard.
    """
    folder, given = Path(output), (vectors,) if isinstance(vectors, PersonaVector) else tuple(vectors)
    ensure_writable(folder / TABLE)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"A shard is its number, counted from 0, and how many there are; got {shard}.")
    scorer = ModelScorer(model, Scoring(given, base, max_new_tokens, after, token_budget, allow_other_model))
    choices = Choices(
        first_turn,
        max_prompt_tokens,
        max_response_tokens,
        sample,
        after,
        system_prompt,
        given_base=base == "given",
        base_fraction=base_fraction,
        seed=seed,
    )
    room = Room(int(model.cfg.n_ctx), max_new_tokens if scorer.how.makes_base else 0)
    settings = _settings(model, scorer.how)
    plan = make_plan(model.tokenizer, room, named_datasets(data), choices, settings, folder, progress=progress)
    if actors:
        score_all = score_with_actors(scorer, plan, actors=actors, gpus_per_actor=gpus_per_actor, load=load)
    else:
        score_all = score_here(scorer, plan)
    score_units(folder, plan, score_all, shard=shard, progress=progress)
    return finish(folder)


def _settings(model: Model, how: Scoring) -> dict[str, Any]:
    """Everything beside the choice of samples that shapes the numbers."""
    base = how.base
    attached = attachments(model)
    if any(each.n_rows for each in attached):
        raise ValueError("Steering row by row has coefficients for other rows than these: steer all rows alike.")
    identity = identify(model)
    named = [f"{each.trait}@{each.layer}" for each in how.vectors]
    if doubled := {name for name in named if named.count(name) > 1}:
        raise ValueError(
            f"Several vectors are called {doubled.pop()}: leave one out, or tell them apart by `dataclasses.replace`."
        )
    return {
        "format_version": FORMAT_VERSION,
        "model": identity.name,
        "model_class": identity.model_class,
        "weights_hash": identity.weights_hash,
        "template_hash": template_hash(model.tokenizer),
        "vectors": named,
        "fingerprints": [each.fingerprint for each in how.vectors],
        "base": base if isinstance(base, str) else f"{base.endpoint.model_name} on the server {base.endpoint.url}",
        "max_new_tokens": how.max_new_tokens if how.makes_base else None,
        "token_budget": how.token_budget,
        "interventions": [f"{value}, at {each.at}" for each in attached for value in each.interventions],
        "threads": cpu_threads(model),
    }


ScoreAll = Callable[[Sequence[int]], Iterator[tuple[int, list[RowScore]]]]
"""Scores the units of these numbers, in whatever order they come."""


def score_here(scorer: Scorer, plan: Plan) -> ScoreAll:
    """The units one after the other, in this process."""

    def score_all(units: Sequence[int]) -> Iterator[tuple[int, list[RowScore]]]:
        for unit in units:
            yield unit, scorer.score(plan.unit(unit))

    return score_all


def score_units(
    folder: Path, plan: Plan, score_all: ScoreAll, *, shard: tuple[int, int] = (0, 1), progress: bool = True
) -> None:
    """Score this shard's units that no log has yet, and keep each as it comes.

    Raises OSError where another process is at work on the shard.
    """
    log = JsonLines(log_path(folder, shard))
    with writes_file(log.path):
        log.mend(LOG_FIELDS)
        done = scored_units(folder)
        missing = [unit for unit in range(shard[0], plan.n_units, shard[1]) if unit not in done]
        total = len(range(shard[0], plan.n_units, shard[1]))
        with tqdm(total=total, initial=total - len(missing), desc="screen", unit="unit", disable=not progress) as bar:
            for unit, scores in score_all(missing) if missing else ():
                log_unit(log, unit, scores)
                bar.update()


def finish(output: str | os.PathLike[str]) -> Screening:
    """The result of a run whose units are all scored; its table is written where it is not there yet.

    Raises ShardsMissing where units are missing, FileNotFoundError where the folder holds no run.
    """
    folder = Path(output)
    plan = read_plan(folder)
    with alone(folder / ".plan.lock"):
        if not (folder / TABLE).exists():
            missing = plan.n_units - len(scored_units(folder))
            if missing:
                raise ShardsMissing(
                    f"{folder}: {missing} of {plan.n_units} units are not scored yet: run the other shards, "
                    "or call again without a shard to score what is left."
                )
            vectors = read_json(folder / SETTINGS)["vectors"]
            write_table(folder, plan, vectors)
        write_summary(folder)
    return read_screening(folder)
