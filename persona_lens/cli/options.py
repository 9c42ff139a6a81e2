"""What the commands share: the application, and the options that mean the same everywhere.

Knows nothing about what a command does.
"""

from enum import StrEnum
from typing import Annotated

import typer

from persona_lens.cli.inputs import DEFAULT_THREADS, ModelClass

app = typer.Typer(
    help="Persona vectors for TransformerLens (arXiv:2507.21509).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class QuestionSet(StrEnum):
    """A trait's two disjoint sets of questions."""

    EXTRACTION = "extraction"
    EVALUATION = "evaluation"


class Polarity(StrEnum):
    """Which system prompts."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    NEUTRAL = "neutral"


ModelOption = Annotated[
    str, typer.Option("--model", help="Hub name, local directory, or smollm2-135m-instruct (embedded).")
]
TraitOption = Annotated[str, typer.Option("--trait", help="Bundled trait, or path of a trait's JSON.")]
ClassOption = Annotated[ModelClass, typer.Option("--model-class", help="TransformerLens class.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help=f"CPU threads, default {DEFAULT_THREADS}; a run goes on with the number it began with."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of a response.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
JudgeOption = Annotated[
    str, typer.Option("--judge", help="likelihood, classifier:FILE, openai:MODEL, or openai:MODEL@URL.")
]
ServerOption = Annotated[
    str | None, typer.Option("--server", help="Sample on this OpenAI-compatible server: http://localhost:8000/v1.")
]
ServerModelOption = Annotated[
    str | None, typer.Option("--server-model", help="The model's name on the server; that of --model by default.")
]
_EXTRA_HELP = (
    """JSON of further fields for each request, such as '{"chat_template_kwargs": {"enable_thinking": false}}'."""
)
JudgeExtraOption = Annotated[
    str | None, typer.Option("--judge-extra-body", help=f"To the judge's server: {_EXTRA_HELP}")
]
ServerExtraOption = Annotated[str | None, typer.Option("--server-extra-body", help=f"To --server: {_EXTRA_HELP}")]
WriterExtraOption = Annotated[
    str | None, typer.Option("--writer-extra-body", help=f"To the writer's server: {_EXTRA_HELP}")
]
BaseExtraOption = Annotated[
    str | None, typer.Option("--base-extra-body", help=f"To the base model's server: {_EXTRA_HELP}")
]
ConcurrencyOption = Annotated[int, typer.Option("--concurrency", min=1, help="Calls to a server at a time.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=1, help="Seconds that one answer of a server may take.")]
AliasOption = Annotated[
    list[str] | None,
    typer.Option("--alias", help="MODEL=NAME: a server asked for MODEL may answer under NAME; repeatable."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say what calls a server would get; ask and write nothing.")
]
DEFAULT_MODEL = "smollm2-135m-instruct"
RELATIONS = {
    "same": "the model that the vectors came from",
    "adapted": "a finetuned or adapted model of the vectors' base",
    "unknown": "of their shape; the vectors do not say which model they came from",
}
