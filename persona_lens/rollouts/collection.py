"""Plan rollouts, and collect the responses: from a file where they are there already, else from an engine.

Every extraction question is asked under every instruction, several times, at temperature 1 (arXiv:2507.21509, section
2.2). Rows go straight to an append-only JSON-lines file, and an interrupted run resumes to the same rows.
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
from persona_lens.traits.trait import Polarity, Trait, load_trait

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def plan_rollouts(
    trait: Trait | str,
    *,
    polarities: Sequence[Polarity] = ("positive", "negative"),
    questions: Sequence[str] | None = None,
    per_question: int = 10,
) -> list[Prompt]:
    """Every question under every instruction of each polarity, `per_question` times (neutral has one instruction).

    Questions default to the trait's extraction questions. Source: arXiv:2507.21509, section 2.2.
    """
    trait = load_trait(trait)
    if per_question < 1:
        raise ValueError(f"per_question must be at least 1, got {per_question}.")
    questions = list(trait.extraction_questions if questions is None else questions)
    if repeated := len(questions) - len(set(questions)):
        raise ValueError(f"{trait.name}: {repeated} questions are repeated: ask each once.")
    return [
        Prompt(trait.name, polarity, instruction, trait.system_prompt(polarity, instruction), question, sample)
        for question in questions
        for polarity in polarities
        for instruction in ([None] if polarity == "neutral" else range(len(trait.instructions)))
        for sample in range(per_question)
    ]


def sample_rollouts(
    model: Model | RolloutEngine,
    trait: Trait | str,
    *,
    polarities: Sequence[Polarity] = ("positive", "negative"),
    questions: Sequence[str] | None = None,
    per_question: int = 10,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    output_file: str | Path | None = None,
    captured: CapturedMeans | None = None,
    batch_size: int = 100,
    progress: bool = True,
) -> list[Rollout]:
    """Sample the trait's rollouts from a model, or from an engine, which has sampling settings of its own.

    Interventions that are attached to the model act. With `captured` the responses' mean activations are kept while
    they are sampled, for `extract_from_responses`. See `plan_rollouts` for what is asked, and `collect_rollouts` for
    `output_file` and what it raises. Source: arXiv:2507.21509, section 2.2.
    """
    if isinstance(model, RolloutEngine):
        if (max_new_tokens, temperature, top_p, batch_size) != (1000, 1.0, 1.0, 100):
            raise ValueError("An engine has its own sampling settings: set max_new_tokens and others on the engine.")
        engine = model
    else:
        engine = ModelEngine(model, max_new_tokens, temperature, top_p, batch_size)
    prompts = plan_rollouts(trait, polarities=polarities, questions=questions, per_question=per_question)
    return collect_rollouts(engine, prompts, seed=seed, output_file=output_file, captured=captured, progress=progress)


def collect_rollouts(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    output_file: str | Path | None = None,
    captured: CapturedMeans | None = None,
    progress: bool = True,
) -> list[Rollout]:
    """Responses to all prompts, in their order: those in `output_file`, and the others from the engine.

    Rows of a `StreamingEngine` are written one by one as they come. For any other engine, batches are cut from the
    whole plan and written as they finish; an interrupted batch is sampled again whole, so a resumed run has the rows
    that an uninterrupted one has. A chat template that reads the clock is given the day that the file records. Rows
    that were written before an engine failed stay, as do rows for other prompts. A `CapturingEngine` also leaves the
    means of its responses in `captured`.

    Raises:
        ValueError: The file holds rows of these prompts made with other settings or on several days, or no rollouts.
        OSError: The file cannot be written, or another process writes it.
    """
    file = None if output_file is None else JsonLines(output_file)
    if file is not None:
        ensure_writable(file.path)
    with writes_file(None if file is None else file.path):
        done = {} if file is None else _answered(file.resume(FIELDS), file.path, prompts, engine.name, seed)
        with (
            fixed_date(next((row.date for row in done.values() if row.date), "")),
            tqdm(total=len(prompts), initial=len(done), desc="rollouts", unit="row", disable=not progress) as bar,
            closing(_fresh(engine, prompts, done, seed, captured, progress)) as batches,
        ):
            for rows in batches:
                if file is not None:
                    file.append(row.to_dict() for row in rows)
                done.update((rollout.key, rollout) for rollout in rows)
                bar.update(len(rows))
    return [done[prompt.key] for prompt in prompts]


def unanswered(
    engine: RolloutEngine, prompts: Sequence[Prompt], *, seed: int = 0, output_file: str | Path | None = None
) -> list[Prompt]:
    """The prompts without a row in `output_file`: those that `collect_rollouts` would sample. Writes nothing.

    Raises ValueError where the file holds rows of these prompts made with other settings.
    """
    file = None if output_file is None else JsonLines(output_file)
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
    """Rows that are not done: one by one, or from those batches of the whole plan that hold any."""
    if isinstance(engine, StreamingEngine):
        missing = [prompt for prompt in prompts if prompt.key not in done]
        if missing:
            for _, rollout in engine.answer_each(missing, seed=seed):
                yield [rollout]
        return
    for indices in plan_batches(len(prompts), engine.batch_size):
        batch = [prompts[index] for index in indices]
        missing = [prompt for prompt in batch if prompt.key not in done]
        if not missing:
            continue
        if captured is not None and isinstance(engine, CapturingEngine):
            rows, means = engine.answer_capturing(batch, seed=seed, progress=progress)
            # Before the rows are written, because a written row marks its batch as done.
            captured.put([row.tokenize(captured.tokenizer) for row in rows], means)
        else:
            rows = engine.answer(batch, seed=seed, progress=progress)
        by_key = {row.key: row for row in rows}
        yield [by_key[prompt.key] for prompt in missing]


def _answered(
    rows: Iterable[dict[str, Any]], path: Path, prompts: Sequence[Prompt], engine: str, seed: int
) -> dict[str, Rollout]:
    """The file's rollouts that answer the prompts, by key; refuses those that were made with other settings."""
    planned = {prompt.key: prompt for prompt in prompts}
    done = {rollout.key: rollout for rollout in rollouts_from_rows(rows, path) if rollout.key in planned}
    is_complete = len(done) == len(planned)  # then the file is only read
    for key, rollout in done.items():
        for setting, before, now in (
            ("engine", without_threads(rollout.engine), without_threads(engine)),
            ("seed", rollout.seed, seed),
            ("system prompt", rollout.system_prompt, planned[key].system_prompt),
        ):
            if before != now:
                raise ValueError(
                    f"{path} holds rollouts made with another {setting} ({before!r}, now {now!r}). "
                    "Choose another output, or move that file away."
                )
        if not is_complete:
            refuse_other_threads(path, threads_in(rollout.engine), threads_in(engine))
    days = sorted({rollout.date for rollout in done.values() if rollout.date})
    if len(days) > 1 and not is_complete:
        raise ValueError(
            f"{path} holds rollouts whose chat template was given several days ({', '.join(days)}), so there is no "
            "one day to resume with. Choose another output, or move that file away."
        )
    return done


def recorded_date(folder: Path) -> str:
    """The day that the chat template was given in the rollouts of a run's folder; empty where they record none."""
    for path in sorted(folder.glob("*rollouts.jsonl")):
        with suppress(OSError, *DAMAGE):  # whoever resumes a damaged file refuses it with a proper error
            for row in JsonLines(path).stream():
                if day := row.get("date"):
                    return datetime.fromisoformat(day).date().isoformat()
                break
    return ""


def keeps_date(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: all prompts of the function have one date, that of the run in its `output_dir`, or today's."""
    parameters = signature(function)

    @wraps(function)
    def dated(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        arguments = parameters.bind_partial(*args, **kwargs).arguments
        folder: Any = arguments.get("output_dir", arguments.get("output"))
        with fixed_date("" if folder is None else recorded_date(Path(folder))):
            return function(*args, **kwargs)

    return dated
