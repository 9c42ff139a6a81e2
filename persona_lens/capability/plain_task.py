"""An lm-eval task as plain data: read without running anything that its files hold, and refused where it needs to run.

lm-eval runs a task's Python in several ways: `!function` and `class` import a file beside the .yaml, a metric that
lm-eval does not know is loaded as a script, `generate` takes a script for `custom_generate`, and Jinja templates are
filled without a sandbox. Here each of them is a refusal that names it, and templates are filled in Jinja's sandbox.
Knows nothing about models.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

_REMEDY = "pass allow_code=True if you would run its code yourself"
# Fields that hold functions, which only a file of Python can give.
_CODE_FIELDS = ("class", "custom_dataset", "process_docs", "process_results", "unsafe_code", "use_prompt")
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
    """The settings of a task's .yaml and of what it includes.

    Raises:
        ValueError: The files are no plain YAML, or the task would run code.
    """
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
