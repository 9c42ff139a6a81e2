"""Run a task of lm-eval on a model, under the interventions and adapters that are on it.

lm-eval gets the Hugging Face model that a bridge wraps, which runs the bridge's hooks. Tasks are local files (a .yaml
and the JSON-lines that it names), so no hub is needed.

lm-eval runs a task's Python in several ways: `!function` and `class` import a file beside the .yaml, a metric that it
does not know is loaded as a script, `generate` takes a script for `custom_generate`, and Jinja templates are filled
without a sandbox. Unless the caller allows code, each of them is refused by name here, and templates are filled in
Jinja's sandbox.
"""

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

from torch import nn

from persona_lens.models.structure import Model, is_bridge
from persona_lens.statistics import Estimate, mean_estimate
from persona_lens.storage.text import missing_package

_REMEDY = "pass allow_code=True if you would run its code yourself"
# Fields that hold functions, which only a file of Python can give.
_CODE_FIELDS = ("class", "custom_dataset", "process_docs", "process_results", "unsafe_code", "use_prompt")
# Generation settings that are numbers or texts; any other may name a script.
_GENERATION = {
    "do_sample",
    "length_penalty",
    "max_gen_toks",
    "max_length",
    "max_new_tokens",
    "max_tokens",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "until",
}
# lm-eval's templates are filled by one environment of its module, for the whole process.
_FILLING = threading.Lock()


def plain_task(path: str | Path, task: str) -> dict[str, Any]:
    """The settings of a task's .yaml and its includes; ValueError where it is no plain YAML or would run code."""
    settings = _read(Path(path), ())
    for name in _CODE_FIELDS:
        if settings.get(name):
            raise _needs_code(path, f"sets {name!r}")
    examples = settings.get("fewshot_config")
    if isinstance(examples, Mapping) and examples.get("process_docs"):
        raise _needs_code(path, "sets 'fewshot_config.process_docs'")
    _refuse_foreign_metrics(path, settings.get("metric_list"))
    generation = settings.get("generation_kwargs") or {}
    if unknown := [name for name in generation if name not in _GENERATION]:
        raise _needs_code(path, f"generates with {str(unknown[0])[:60]!r}, which may load a script")
    data = dict(settings.get("dataset_kwargs") or {})
    source = str(settings.get("dataset_path"))
    if data.get("trust_remote_code") or source == "pandas" or source.endswith(".py"):
        raise _needs_code(path, f"loads its documents from {source[:60]!r} by a script or a pickle")
    # Versions of `datasets` below 4 would ask, or not, about a script of the dataset's.
    return {**settings, "task": task, "dataset_kwargs": {**data, "trust_remote_code": False}}


@contextmanager
def sandboxed_templates(whose: str) -> Iterator[None]:
    """While open, lm-eval fills templates in Jinja's sandbox; what it refuses is a ValueError that names `whose`."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    with _FILLING:
        original = getattr(utils, "env", None)
        if not isinstance(original, jinja2.Environment):
            raise ValueError(f"This lm-eval fills templates in another way, which cannot be sandboxed: {_REMEDY}.")

        class Sandbox(ImmutableSandboxedEnvironment):
            def handle_exception(self, source: str | None = None) -> NoReturn:
                error = sys.exception()
                raise ValueError(
                    f"A template of {whose} cannot be filled in a sandbox ({error}): correct it, or {_REMEDY}."
                ) from error

        sandbox = Sandbox(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        sandbox.filters["regex_replace"] = original.filters["regex_replace"]
        utils.env = sandbox
        try:
            yield
        finally:
            utils.env = original


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A .yaml with what it includes, as lm-eval merges them: its own fields win, and the last included over the first.

    Tags, `!function` among them, are refused.
    """
    import yaml

    path = path.resolve()
    if path in above:
        raise ValueError(f"{path} includes itself: take the include out.")
    try:
        settings = yaml.safe_load(path.read_bytes())
    except yaml.constructor.ConstructorError as error:
        raise _needs_code(path, f"has a tag ({str(error.problem)[-60:]})") from error
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no YAML that can be read ({reason}): correct it.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}, expected the fields of an lm-eval task.")
    included = settings.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        inherited = _read(path.parent / str(name), (*above, path))
        inherited.pop("task_list", None)
        merged |= inherited
    merged |= settings
    for name in ("tag", "group", "task_list"):
        merged.pop(name, None)
    return merged


def _refuse_foreign_metrics(path: str | Path, metrics: Any) -> None:
    import lm_eval.api.metrics  # noqa: F401 (which registers lm-eval's own)
    from lm_eval.api.registry import metric_registry

    for metric in metrics or []:
        name = metric.get("metric") if isinstance(metric, Mapping) else metric
        if not isinstance(metric, Mapping) or metric.get("hf_evaluate") or str(name) not in metric_registry:
            raise _needs_code(path, f"scores by {str(name)[:60]!r}, which is no metric of lm-eval's own")


def _needs_code(path: str | Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}, which runs code that comes with the task: {_REMEDY}.")


@dataclass(frozen=True)
class HarnessScores:
    """lm-eval's scores of one task.

    Attributes:
        task: The task's name.
        metric: The metric of the scores.
        scores: The metric of each document, in the task's order; for `acc` 1 or 0.
        log_likelihoods: Of each document's choices, in nats; empty for a task without choices.
        seed: Seed of the bootstrap.
    """

    task: str
    metric: str
    scores: tuple[float, ...] = field(repr=False)
    log_likelihoods: tuple[tuple[float, ...], ...] = field(repr=False, default=())
    seed: int = 0

    @cached_property
    def mean(self) -> Estimate:
        """Mean over the documents, with its interval over documents."""
        return mean_estimate(self.scores, [str(index) for index in range(len(self.scores))], seed=self.seed)


def lm_eval_accuracy(
    model: Model,
    task_folder: str | os.PathLike[str],
    task: str,
    *,
    metric: str = "acc",
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    system_prompt: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    allow_code: bool = False,
) -> HarnessScores:
    """Run a task of lm-eval from a local folder on a bridge, under the contexts that are open around the call.

    Interventions must act at `all` tokens: lm-eval's passes do not say where a prompt ends. No global seed is set.

    Args:
        model: A TransformerBridge.
        task_folder: Holds the task's .yaml; `dataset_path: json` with `data_files` of whole paths needs no hub.
        task: The name in the .yaml.
        metric: The metric of the task that is read.
        num_fewshot: Examples before each question; the task's own number by default.
        limit: Run the first so many documents only.
        chat_template: Render each prompt by the model's chat template, under `system_prompt`.
        system_prompt: The system turn that lm-eval puts before each prompt.
        batch_size: Rows of a batch.
        seed: Seed of the bootstrap and of choosing examples.
        allow_code: Let the task run its Python on this machine (`!function`, `class`, metrics of the hub, templates
            outside a sandbox). Only for a folder whose code you would run yourself.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: The model is no bridge, the folder has no such task, the task no such metric, or it would run code
            and `allow_code` is false.
    """
    if not is_bridge(model):
        raise ValueError(
            f"lm-eval runs Hugging Face models, and got {type(model).__name__}: load the model with "
            "model_class='TransformerBridge'."
        )
    if not Path(task_folder).is_dir():
        raise ValueError(f"Expected a folder with an lm-eval task, got {task_folder}: name one that exists.")
    harness = _lm_eval()
    tasks = harness.tasks.TaskManager(include_path=str(task_folder), include_defaults=False)
    if task not in tasks.all_tasks:
        there = ", ".join(tasks.all_tasks) or "none"
        raise ValueError(f"{task_folder} has no task {task!r}, but {there}: name one of these.")
    if task in (*tasks.all_groups, *tasks.all_tags):
        raise ValueError(f"{task!r} of {task_folder} is a group of tasks: name one task of it.")
    hf_model = cast(Any, model).original_model
    task_or_settings: str | dict[str, Any] = task
    templates: AbstractContextManager[None] = nullcontext()
    if not allow_code:
        task_or_settings = plain_task(tasks.task_index[task].yaml_path, task)
        templates = sandboxed_templates(f"{task_folder}, task {task!r}")
    with _modes_kept(hf_model), templates:
        runner = harness.models.huggingface.HFLM(pretrained=hf_model, tokenizer=model.tokenizer, batch_size=batch_size)
        results = harness.evaluator.simple_evaluate(
            runner,
            tasks=[task_or_settings],
            task_manager=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            system_instruction=system_prompt,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=seed,
        )
    return _scores(task, metric, results["samples"][task], seed)


def _scores(task: str, metric: str, samples: Sequence[Mapping[str, Any]], seed: int) -> HarnessScores:
    # A task with several filters has a sample for each filter; take the first filter's.
    rows = sorted((row for row in samples if row["filter"] == samples[0]["filter"]), key=lambda row: row["doc_id"])
    if metric not in rows[0]["metrics"]:
        raise ValueError(f"{task} has no metric {metric!r}, but {', '.join(rows[0]['metrics'])}: name one of these.")
    choices = [row["filtered_resps"] for row in rows]
    are_choices = all(isinstance(choice, (tuple, list)) for row in choices for choice in row)
    likelihoods = tuple(tuple(float(value) for value, _ in row) for row in choices) if are_choices else ()
    return HarnessScores(task, metric, tuple(float(row[metric]) for row in rows), likelihoods, seed)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore each module's training mode: lm-eval puts them into evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise missing_package("lm_eval_accuracy", "lm-eval", extra="eval") from error
    return lm_eval
