"""The application, and the options that several commands share.

A command may take a group of options as one parameter: a dataclass whose fields are the options (`ModelOptions`,
`ServerOptions`, `JudgeOptions`). `command` spreads its fields out on the command line, so each is declared once.
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from persona_lens.cli.output import say

if TYPE_CHECKING:
    from persona_lens.clients.client import OpenAIClient
    from persona_lens.judges.scores import Judge
    from persona_lens.models.structure import Model

app = typer.Typer(
    help="Persona vectors for TransformerLens (arXiv:2507.21509).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT_MODEL = "smollm2-135m-instruct"
Function = TypeVar("Function", bound=Callable[..., None])
THRESHOLD_PASSED = 3
"""The exit code where a number is above the user's --fail-above."""
# One, whatever the machine: the number of threads decides how sums round, and so which text a seed gives. A number that
# followed the cores or the load would give another text elsewhere or tomorrow; and threads that share a busy core make
# every kernel wait, so that one can be several times as fast as two.
DEFAULT_THREADS = 1


def command(function: Function) -> Function:
    """Register a command; a parameter that is a dataclass becomes an option for each of its fields."""
    hints = get_type_hints(function, include_extras=True)
    own: list[inspect.Parameter] = []
    shared: list[inspect.Parameter] = []  # listed after the command's own options
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if not is_dataclass(hints[name]):
            own.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        groups[name] = hints[name]
        kinds = get_type_hints(groups[name], include_extras=True)
        for option in fields(groups[name]):
            default = inspect.Parameter.empty if option.default is MISSING else option.default
            kind = inspect.Parameter.KEYWORD_ONLY
            shared.append(inspect.Parameter(option.name, kind, default=default, annotation=kinds[option.name]))

    @wraps(function)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{option.name: values.pop(option.name) for option in fields(group)})
        function(**values)

    spread: Any = run  # typer reads both, and would otherwise find those of `function`
    spread.__signature__ = inspect.Signature([*own, *shared])
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
    app.command()(run)
    return function


# Single options


class QuestionSet(StrEnum):
    """A trait's two disjoint sets of questions."""

    EXTRACTION = "extraction"
    EVALUATION = "evaluation"


class Polarity(StrEnum):
    """Which system prompts."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    NEUTRAL = "neutral"


class Position(StrEnum):
    """Which tokens' activations are averaged."""

    RESPONSE_MEAN = "response_mean"
    PROMPT_MEAN = "prompt_mean"
    PROMPT_LAST = "prompt_last"


class ActOn(StrEnum):
    """Which tokens interventions act on."""

    RESPONSE = "response"
    PROMPT = "prompt"
    ALL = "all"


TraitOption = Annotated[str, typer.Option("--trait", help="Bundled trait, or path of a trait's JSON.")]
RunTraitOption = Annotated[str | None, typer.Option("--trait", help="Bundled trait or JSON; by default the run's own.")]
LayerOption = Annotated[int | None, typer.Option(help="Counted from 0; by default the selected layer.")]
VectorsOption = Annotated[list[Path], typer.Option(help="A run's folder, or a vectors file; repeat for several.")]
ActOnOption = Annotated[ActOn, typer.Option("--at", help="Which tokens to act on.")]
AfterOption = Annotated[str | None, typer.Option(help="Average a response only after this text, such as '</think>'.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
AliasOption = Annotated[
    list[str] | None, typer.Option(help="MODEL=NAME: a server asked for MODEL may answer under NAME; repeatable.")
]
LengthOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of a response.")]
RunLengthOption = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Length limit of a response; by default the run's.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
FailAboveOption = Annotated[float | None, typer.Option(help="Exit with code 3 if a result is greater than this.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say which calls a server would get; ask and write nothing.")
]
_FIELDS = """JSON of further fields for each request, such as '{"chat_template_kwargs": {"enable_thinking": false}}'."""
ServerFieldsOption = Annotated[str | None, typer.Option("--server-extra-body", help=f"To --server: {_FIELDS}")]
WriterFieldsOption = Annotated[str | None, typer.Option("--writer-extra-body", help=f"To the writer: {_FIELDS}")]
JudgeFieldsOption = Annotated[str | None, typer.Option("--judge-extra-body", help=f"To the judge's server: {_FIELDS}")]
BaseFieldsOption = Annotated[str | None, typer.Option("--base-extra-body", help=f"To the base model: {_FIELDS}")]


# Groups of options


class ModelClass(StrEnum):
    """TransformerLens's two model classes."""

    BRIDGE = "TransformerBridge"
    HOOKED = "HookedTransformer"


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    model_class: Annotated[ModelClass, typer.Option("--model-class", help="TransformerLens class.")] = ModelClass.BRIDGE
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16 or float64.")] = "float32"
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; a GPU by default, if one is there.")] = (
        None
    )
    threads: Annotated[
        int | None,
        typer.Option(min=1, help=f"CPU threads, default {DEFAULT_THREADS}; a resumed run needs the number it had."),
    ] = None

    def load_by_name(self, name: str) -> "Model":
        """Load a model without progress bars, to run on the chosen device and number of CPU threads."""
        import torch
        from transformers.utils import logging

        from persona_lens.models.loading import load_model

        torch.set_num_threads(self.threads or DEFAULT_THREADS)
        logging.disable_progress_bar()
        used = torch.get_num_threads()
        say(f"Loading {name} as {self.model_class.value}, on {used} CPU thread{'s' * (used > 1)} ...")
        return load_model(name, model_class=self.model_class.value, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """Which model, and how it is loaded."""

    model: Annotated[
        str, typer.Option("--model", help=f"Hub name, local directory, or {DEFAULT_MODEL} (embedded).")
    ] = DEFAULT_MODEL

    def load(self) -> "Model":
        """Load the model."""
        return self.load_by_name(self.model)


@dataclass(frozen=True)
class ServerOptions:
    """How OpenAI-compatible servers are asked. Their answers are kept in calls.sqlite, in the folder of the output."""

    concurrency: Annotated[int, typer.Option(min=1, help="Calls to a server at a time.")] = 20
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one answer of a server may take.")] = 60.0
    alias: AliasOption = None

    def client(
        self, name: str, folder: Path, *, extra_body: str | None = None, dry_run: bool = False
    ) -> "OpenAIClient":
        """The client that `openai:MODEL` or `openai:MODEL@URL` names; the URL begins at the first `@http`."""
        match = re.fullmatch(r"openai:(?P<model>(?!@http).+?)(?:@(?P<url>https?:.*))?", name.strip())
        if match is None:
            raise typer.BadParameter(
                "expected openai:MODEL, or openai:MODEL@URL as in openai:my-model@http://localhost:8000/v1; "
                f"got {name!r}"
            )
        try:
            return self.connect(match["url"], match["model"], folder, extra_body=extra_body, dry_run=dry_run)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    def connect(
        self, url: str | None, model: str, folder: Path, *, extra_body: str | None = None, dry_run: bool = False
    ) -> "OpenAIClient":
        """The client of a model on a server; a dry run makes no file for its answers."""
        from persona_lens.clients.client import OpenAIClient

        cache = folder / "calls.sqlite"
        pairs = [alias.partition("=") for alias in self.alias or ()]
        if wrong := ["".join(pair) for pair in pairs if not all(part.strip() for part in pair)]:
            raise typer.BadParameter(f"--alias is MODEL=NAME, such as my-deployment=gpt-4.1-mini; got {wrong[0]!r}")
        return OpenAIClient(
            model,
            base_url=url,
            concurrency=self.concurrency,
            timeout=self.timeout,
            cache=cache if cache.exists() or not dry_run else None,
            aliases=[name for asked_for, _, name in pairs if asked_for == model],
            extra_body=_request_fields(extra_body),
        )


@dataclass(frozen=True)
class JudgeOptions(ServerOptions):
    """Which judge scores responses, and how it is asked where it is on a server."""

    judge: Annotated[
        str, typer.Option("--judge", help="likelihood, classifier:FILE, openai:MODEL, or openai:MODEL@URL.")
    ] = "likelihood"
    judge_extra_body: JudgeFieldsOption = None

    def load_judge(self, folder: Path) -> "Callable[[Callable[[], Judge]], Judge]":
        """A function that makes the judge, given one that makes the likelihood judge, which needs the model.

        The classifier's file and the server's name are checked at once, before a model is loaded. A classifier knows no
        coherence, and takes it from the likelihood judge.
        """
        from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
        from persona_lens.judges.llm import LLMJudge
        from persona_lens.judges.scores import CombinedJudge

        if self.judge.startswith("openai:"):
            server_judge = LLMJudge(self.judge_client(folder))
            return lambda make_likelihood_judge: server_judge
        if self.judge_extra_body is not None:
            raise typer.BadParameter(f"--judge-extra-body goes to a judge on a server, and --judge is {self.judge}")
        if self.judge == "likelihood":
            return lambda make_likelihood_judge: make_likelihood_judge()
        if self.judge.startswith("classifier:"):
            classifier = ClassifierJudge(TextClassifier.load(self.judge.removeprefix("classifier:")))
            return lambda make_likelihood_judge: CombinedJudge(classifier, make_likelihood_judge())
        raise self._unknown()

    def judge_client(self, folder: Path, *, dry_run: bool = False) -> "OpenAIClient":
        """The client of a judge on a server; bad usage where the judge is none."""
        if not self.judge.startswith("openai:"):
            raise self._unknown()
        return self.client(self.judge, folder, extra_body=self.judge_extra_body, dry_run=dry_run)

    def _unknown(self) -> typer.BadParameter:
        return typer.BadParameter(
            f"--judge is likelihood, classifier:FILE, openai:MODEL or openai:MODEL@URL; got {self.judge}"
        )


def _request_fields(text: str | None) -> dict[str, Any]:
    """The further fields of a request that an option gives as a JSON object."""
    if text is None:
        return {}
    try:
        extra = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise typer.BadParameter(
            'expected further fields as a JSON object such as {"chat_template_kwargs": {"enable_thinking": false}}; '
            f"got {text}"
        )
    if reserved := sorted({"model", "messages", "stream", "n"} & extra.keys()):
        raise typer.BadParameter(
            f"further fields of a request cannot be {', '.join(reserved)}: every call sets them itself"
        )
    return extra


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
