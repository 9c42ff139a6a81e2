"""The pages that are made at each build from the code itself, so that they cannot fall behind it.

`commands.md` from the help of the command line, `reference/*.md` from the public names, and the notebooks as they are
kept. Knows nothing about Sphinx beyond the directives it writes.
"""

import base64
import inspect
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import persona_lens

# Every public name stands in exactly one group; the groups are the steps of the package's docstring.
GROUPS: dict[str, tuple[str, str]] = {
    "models": (
        "Models and chats: what runs, and which tokens count",
        "load_model from_paper_layer suspended generate generate_text Conversation ChatBatch chat_batch show_tokens "
        "Transcript read_transcripts",
    ),
    "traits": (
        "Traits: what is looked for, in words",
        "Trait InstructionPair bundled_traits load_trait generate_trait preview_trait template_rubric "
        "read_reference_trait write_reference_trait",
    ),
    "rollouts": (
        "Rollouts: the model's own responses",
        "Rollout sample_rollouts read_rollouts OpenAIClient ServerEngine read_messages read_reference_csv",
    ),
    "judges": (
        "Judges: scores, and which pairs are kept",
        "Judge LikelihoodRatioJudge LLMJudge ClassifierJudge TextClassifier SentimentJudge Score "
        "ScoredRollout score_rollouts keep_pairs judge_agreement",
    ),
    "extraction": (
        "Extraction: from responses to vectors",
        "extract_persona_vectors extract_from_responses mean_activations CapturedMeans difference_in_means",
    ),
    "vectors": (
        "Vectors: their algebra, projections and files",
        "PersonaVectors PersonaVector cosine_matrix",
    ),
    "interventions": (
        "Interventions: steer, ablate, cap",
        "Steer Ablate Cap When steer ablate cap intervene",
    ),
    "layer_selection": (
        "Layer selection and evaluation",
        "select_layer LayerSweep dose_response DoseResponse evaluate Evaluation measure_capability Capability "
        "Question read_questions mmlu_sample lm_eval_accuracy",
    ),
    "monitoring": (
        "Monitoring: before, while and after the model speaks",
        "monitor Monitoring stream_watched generate_watched WatchedReply Safeguard calibrate_threshold "
        "Threshold save_thresholds load_thresholds detection Detection",
    ),
    "finetuning": (
        "Finetuning and its shift",
        "finetune Finetuning ProjectionPenalty Adapter adapted finetuning_shift FinetuningShift",
    ),
    "screening": (
        "Screening training data",
        "screen Screening",
    ),
    "replication": (
        "Replicating the paper",
        "replicate Replication",
    ),
    "interop": (
        "Vectors of other tools",
        "read_vectors write_vectors read_reference_vectors write_reference_vectors read_control_vector "
        "write_control_vector read_sae decompose push_vectors pull_vectors persona_scorer",
    ),
    "pictures": (
        "Pictures and pages",
        "write_report monitoring_html screening_html tokens_html "
        + " ".join(name for name in persona_lens.__all__ if name.startswith("plot_")),
    ),
}
# The picture of the first page: which notebook, and which of its pictures.
FRONT_PICTURE = ("02_layer_selection.ipynb", 0)


def write_pages(docs: Path, output: Path) -> None:
    """Write every generated page under `output`, leaving a page alone that is as it was."""
    pages = {"commands.md": commands_page(), **reference_pages()}
    for name, text in pages.items():
        _write(output / name, text.encode())
    for notebook in sorted((docs.parent / "notebooks").glob("*.ipynb")):
        _write(output / "notebooks" / notebook.name, with_stills(notebook).encode())
    notebook, index = FRONT_PICTURE
    _write(output / "front.png", pictures(docs.parent / "notebooks" / notebook)[index])


def pictures(notebook: Path) -> list[bytes]:
    """The stills that a notebook keeps of its pictures."""
    outputs = [each for cell in json.loads(notebook.read_text())["cells"] for each in cell.get("outputs", [])]
    stills = [each["data"]["image/png"] for each in outputs if "image/png" in each.get("data", {})]
    return [base64.b64decode(still) for still in stills]


def with_stills(notebook: Path) -> str:
    """A notebook without plotly's JSON where a still stands beside it: a page shows the still."""
    content = json.loads(notebook.read_text())
    for cell in content["cells"]:
        for each in cell.get("outputs", []):
            if "image/png" in each.get("data", {}):
                each["data"].pop("application/vnd.plotly.v1+json", None)
    return json.dumps(content)


def reference_pages() -> dict[str, str]:
    """A page for each group of public names, and one that lists them; a name without a group is an error."""
    grouped = [name for _, names in GROUPS.values() for name in names.split()]
    if sorted(grouped) != sorted(persona_lens.__all__):
        wrong = sorted(set(grouped) ^ set(persona_lens.__all__)) or [n for n in grouped if grouped.count(n) > 1]
        raise ValueError(f"docs/generate.py: each public name stands in one group, which does not hold for {wrong}.")
    pages = {}
    for key, (title, names) in GROUPS.items():
        body = [f"# {title}\n"]
        for name in names.split():
            kind = "autoclass" if isinstance(getattr(persona_lens, name), type) else "autofunction"
            body.append(f"```{{eval-rst}}\n.. {kind}:: persona_lens.{name}\n```\n")
        pages[f"reference/{key}.md"] = "\n".join(body)
    body = ["# What they give and take", "Types that are seldom made by hand: results' parts, protocols and records."]
    for each in types_of([getattr(persona_lens, name) for name in grouped]):
        body.append(f"```{{eval-rst}}\n.. autoclass:: {each.__module__}.{each.__qualname__}\n```")
    pages["reference/types.md"] = "\n\n".join(body) + "\n"
    listing = "\n".join(f"reference/{key}" for key in [*GROUPS, "types"])
    pages["reference.md"] = (
        "# Reference\n\nEvery public name, from its docstring. All of them are imported from the package itself "
        '(`import persona_lens as pl`).\nA shape stands in the signature: `Float[Tensor, "batch pos d_model"]` is a '
        f"floating-point tensor with those axes.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listing}\n```\n"
    )
    return pages


def types_of(things: list[Any]) -> list[type]:
    """The package's other types in the annotations of `things`, and in those of these types, by name."""
    found: dict[str, type] = {}
    waiting = list(things)
    while waiting:
        for annotation in _annotations(waiting.pop()):
            for each in _ours(annotation):
                if each not in things and each.__name__ not in found and not each.__name__.startswith("_"):
                    found[each.__name__] = each
                    waiting.append(each)
    return [found[name] for name in sorted(found)]


def _annotations(thing: Any) -> Iterator[Any]:
    """Those of a function, or of a class's public fields, properties and methods."""
    notes = getattr(inspect.unwrap(thing), "__annotations__", {})
    yield from (note for name, note in notes.items() if not name.startswith("_"))
    members = vars(thing).items() if isinstance(thing, type) else ()
    for name, member in members:
        function = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            yield from _annotations(function)


def _ours(annotation: Any) -> Iterator[type]:
    for part in typing.get_args(annotation):
        yield from _ours(part)
    if isinstance(annotation, type) and annotation.__module__.startswith("persona_lens"):
        yield annotation


def commands_page() -> str:
    """A section for each command of `persona-lens`, from its own help."""
    import typer

    from persona_lens.cli.options import app

    group: Any = typer.main.get_command(app)
    parts = [
        "# How to do it from the command line\n",
        "What each command prints with `--help`. Results go to standard output (a table, or JSON with `--json`), "
        "progress to standard error.\nExit code 0 is success, 1 is bad input with one sentence that says what to do, "
        "2 is bad usage, 3 is a threshold that was passed.\n",
    ]
    for name, command in group.commands.items():
        prose, _, example = command.help.partition("Example: ")
        parts.append(f"## {name}\n\n{_prose(prose)}\n")
        if example:
            parts.append(f"```bash\n{' '.join(example.split())}\n```\n")
        rows = [_option(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        parts.append("\n\n".join(rows) + "\n")
    return "\n".join(parts)


def _option(parameter: Any) -> str:
    """One argument or option as a definition."""
    opts = [*parameter.opts, *parameter.secondary_opts]
    is_option = opts[0].startswith("-")
    name = ", ".join(f"`{opt}`" for opt in opts) if is_option else f"`{parameter.name.upper()}`"
    default = parameter.default
    notes = []
    if parameter.required:
        notes.append("Required.")
    elif is_option and default is not None and not isinstance(default, bool) and not callable(default):
        notes.append(f"Default: `{getattr(default, 'value', default)}`.")
    text = " ".join([*(parameter.help or "").split(), *notes])
    return f"{name}\n: {_prose(text)}"


def _prose(text: str) -> str:
    """Help as Markdown: options and file names as code, nothing else with a meaning of its own."""
    text = re.sub(r"([*_<>\[\]])", r"\\\1", text.strip())
    return re.sub(r"(?<![\w`-])(--[a-z][\w-]*)", r"`\1`", text)


def _write(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
