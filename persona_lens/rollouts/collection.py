"""Collecting rollouts: the plan of what is asked, and the answers, from a file that resumes or from an engine.

Every extraction question is asked under every instruction, several times, at temperature 1 (arXiv:2507.21509, section
2.2); rows go straight to an append-only JSON-lines file, and a run that was interrupted goes on to the same rows.
Knows nothing about scores or activations.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tqdm.auto import tqdm

from persona_lens.chat.templates import fixed_date
from persona_lens.generation.capture import CapturedMeans
from persona_lens.generation.decoding import plan_batches
from persona_lens.models.structure import Model, refuse_other_threads
from persona_lens.rollouts.engines import (
    CapturingEngine,
    ModelEngine,
    RolloutEngine,
    StreamingEngine,
    threads_in,
    without_threads,
)
from persona_lens.rollouts.rows import FIELDS, Prompt, Rollout, rollouts_from_rows
from persona_lens.storage.files import DAMAGE, JsonLines, ensure_writable
from persona_lens.storage.locks import writes_file
from persona_lens.traits.trait import Polarity, Trait

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def plan_rollouts(
    trait: Trait,
    *,
    polarities: Sequence[Polarity] = ("positive", "negative"),
    questions: Sequence[str] | None = None,
    per_question: int = 10,
) -> list[Prompt]:
    """Every question under every instruction of each polarity, `per_question` times (neutral has one instruction).

    Questions default to the trait's extraction questions. Source: arXiv:2507.21509, section 2.2.
    """
    if per_question < 1:
        raise ValueError(f"per_question must be at least 1, got {per_question}.")
    asked = list(trait.extraction_questions if questions is None else questions)
    if len(set(asked)) < len(asked):
        raise ValueError(f"{trait.name}: {len(asked) - len(set(asked))} questions are repeated: ask each once.")
    return [
        Prompt(trait.name, polarity, instruction, trait.system_prompt(polarity, instruction), question, sample)
        for question in asked
        for polarity in polarities
        for instruction in ([None] if polarity == "neutral" else range(len(trait.instructions)))
        for sample in range(per_question)
    ]


def collect_rollouts(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    output: str | Path | None = None,
    captured: CapturedMeans | None = None,
    progress: bool = True,
) -> list[Rollout]:
    """Answers to all prompts, in their order, from `output` where they stand already and from the engine otherwise.

    A `StreamingEngine`'s rows are written one by one as they come. Batches of any other are cut from the whole plan and
    written as they finish; one that was interrupted is answered again whole, so a resumed run has the rows that an
    uninterrupted one has, and a chat template that reads the clock is told the day that `output` records. What was
    written before an engine failed stays, and so do rows of `output` that belong to other prompts. A `CapturingEngine`
    also leaves the means of its responses in `captured`. Raises ValueError where `output` holds rows of these prompts
    made with other settings or on several days, or something else than rollouts, OSError where another process writes
    it.
    """
    file = None if output is None else JsonLines(output)
    if file is not None:
        ensure_writable(file.path)
    with writes_file(None if file is None else file.path):
        done = {} if file is None else _answered(file.resume(FIELDS), file.path, prompts, engine.name, seed)
        with (
            fixed_date(next((row.date for row in done.values() if row.date), "")),
            tqdm(total=len(prompts), initial=len(done), desc="rollouts", unit="row", disable=not progress) as bar,
            closing(_fresh(engine, prompts, done, seed, captured, progress)) as answers,
        ):
            for rows in answers:
                if file is not None:
                    file.append(row.to_dict() for row in rows)
                done.update((rollout.key, rollout) for rollout in rows)
                bar.update(len(rows))
    return [done[prompt.key] for prompt in prompts]


def recorded_date(folder: Path) -> str:
    """The day that the chat template was told in the rollouts of a run's folder; empty where they record none."""
    for path in sorted(folder.glob("*rollouts.jsonl")):
        with suppress(OSError, *DAMAGE):  # a damaged file is refused, in a sentence, by whoever goes on with it
            for row in JsonLines(path).stream():
                if day := row.get("date"):
                    return datetime.fromisoformat(day).date().isoformat()
                break
    return ""


def keeps_date(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose prompts are all of one day (`fixed_date`): that of the run in the folder `output=`, or today."""
    given = signature(function)

    @wraps(function)
    def dated(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        output: Any = given.bind_partial(*args, **kwargs).arguments.get("output")
        with fixed_date("" if output is None else recorded_date(Path(output))):
            return function(*args, **kwargs)

    return dated


def unanswered(
    engine: RolloutEngine, prompts: Sequence[Prompt], *, seed: int = 0, output: str | Path | None = None
) -> list[Prompt]:
    """The prompts that have no row in `output` yet: what `collect_rollouts` would go on with. Touches nothing.

    Raises ValueError where `output` holds rows of these prompts made with other settings.
    """
    file = None if output is None else JsonLines(output)
    done = {} if file is None else _answered(file.whole(), file.path, prompts, engine.name, seed)
    return [prompt for prompt in prompts if prompt.key not in done]


def _fresh(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    done: Mapping[str, Rollout],
    seed: int,
    captured: CapturedMeans | None,
    progress: bool,
) -> Generator[list[Rollout], None, None]:
    """Answers to what is not done: one by one, or from the batches of the whole plan that hold any."""
    if isinstance(engine, StreamingEngine):
        missing = [prompt for prompt in prompts if prompt.key not in done]
        if missing:
            for _, rollout in engine.answer_each(missing, seed=seed):
                yield [rollout]
        return
    for batch in plan_batches(len(prompts), engine.batch_size):
        wanted = [prompts[row] for row in batch]
        missing = [prompt for prompt in wanted if prompt.key not in done]
        if missing:
            if captured is not None and isinstance(engine, CapturingEngine):
                answered, means = engine.answer_capturing(wanted, seed=seed, progress=progress)
                # Before the rows themselves, which say that a batch is done.
                captured.put([row.tokenize(captured.tokenizer) for row in answered], means)
            else:
                answered = engine.answer(wanted, seed=seed, progress=progress)
            answers = {rollout.key: rollout for rollout in answered}
            yield [answers[prompt.key] for prompt in missing]


def _answered(
    rows: Iterable[dict[str, Any]], path: Path, prompts: Sequence[Prompt], engine: str, seed: int
) -> dict[str, Rollout]:
    """The rollouts among a file's rows that answer the prompts, by key; refused where they were made otherwise."""
    planned = {prompt.key: prompt for prompt in prompts}
    done = {rollout.key: rollout for rollout in rollouts_from_rows(rows, path) if rollout.key in planned}
    for key, rollout in done.items():
        for what, had, has in (
            ("engine", without_threads(rollout.engine), without_threads(engine)),
            ("seed", rollout.seed, seed),
            ("system prompt", rollout.system_prompt, planned[key].system_prompt),
        ):
            if had != has:
                raise ValueError(
                    f"{path} holds rollouts made with another {what} ({had!r}, now {has!r}). "
                    "Choose another output, or move that file away."
                )
        if len(done) < len(planned):  # a file that lacks nothing is only read
            refuse_other_threads(path, threads_in(rollout.engine), threads_in(engine))
    days = sorted({rollout.date for rollout in done.values() if rollout.date})
    if len(days) > 1 and len(done) < len(planned):
        raise ValueError(
            f"{path} holds rollouts whose chat template was told several days ({', '.join(days)}), so that there is no "
            "one day to go on with. Choose another output, or move that file away."
        )
    return done


def sample_rollouts(
    model: Model,
    trait: Trait,
    *,
    polarities: Sequence[Polarity] = ("positive", "negative"),
    questions: Sequence[str] | None = None,
    per_question: int = 10,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    output: str | Path | None = None,
    captured: CapturedMeans | None = None,
    batch_size: int = 100,
    progress: bool = True,
) -> list[Rollout]:
    """Sample the trait's rollouts from a model; `plan_rollouts` and `collect_rollouts` with a `ModelEngine`.

    Interventions that are attached to the model act. With `captured` the responses' mean activations are kept as they
    are sampled, and `extract_from_responses` takes them from there. Source: arXiv:2507.21509, section 2.2.
    """
    engine = ModelEngine(model, max_new_tokens, temperature, top_p, batch_size)
    prompts = plan_rollouts(trait, polarities=polarities, questions=questions, per_question=per_question)
    return collect_rollouts(engine, prompts, seed=seed, output=output, captured=captured, progress=progress)
