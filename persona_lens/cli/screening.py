"""The command that screens training data: which data sets and samples would pull the model along persona vectors."""

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from persona_lens.cli.inputs import ModelClass, load, load_vectors, selected_layer
from persona_lens.cli.judging import judge_of
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    AliasOption,
    BaseExtraOption,
    ClassOption,
    ConcurrencyOption,
    JsonOption,
    JudgeExtraOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    TimeoutOption,
    app,
)
from persona_lens.cli.output import say
from persona_lens.cli.screening_report import Asked, Judging, report
from persona_lens.cli.servers import client_of

if TYPE_CHECKING:
    from persona_lens.judges.scores import Judge
    from persona_lens.models.structure import Model
    from persona_lens.screening.scoring import Base
    from persona_lens.vectors.persona_vector import PersonaVector


class Form(StrEnum):
    """The forms of a score."""

    DIFFERENCE = "difference"
    PROXY = "proxy"
    RESPONSE = "response"


@app.command()
def screen(
    output: Annotated[Path, typer.Option(help="Folder of the run; a second call resumes it, or reads it.")],
    data: Annotated[list[Path] | None, typer.Argument(help="Chats: .jsonl, .json or .parquet; each is a set.")] = None,
    vectors: Annotated[
        list[Path] | None, typer.Option(help="A run's folder, or a vectors file; repeat for several.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Counted from 0; by default the one that was selected.")] = None,
    base: Annotated[
        str, typer.Option(help="Base responses: generate, given, proxy, none, openai:MODEL or openai:MODEL@URL.")
    ] = "generate",
    base_fraction: Annotated[float, typer.Option(help="Share of rows that get a base response.")] = 1.0,
    first_turn: Annotated[bool, typer.Option("--first-turn", help="A chat's first response; else its last.")] = False,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Leave longer prompts out.")] = None,
    max_response_tokens: Annotated[int | None, typer.Option(min=1, help="Read so much of a response.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of base responses.")] = 256,
    sample: Annotated[int | None, typer.Option(min=1, help="So many random rows of each set.")] = None,
    after: Annotated[str | None, typer.Option(help="Average a response only after this, such as </think>.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of rows without one.")] = None,
    by: Annotated[
        Form | None, typer.Option(help="Report this form of the score; by default what --base gives.")
    ] = None,
    benign: Annotated[
        Path | None, typer.Option(help="Benign chats, one of DATA by its name, or a file: their percentile is marked.")
    ] = None,
    percentile: Annotated[float, typer.Option(help="Of the benign samples.")] = 95.0,
    split: Annotated[int | None, typer.Option(min=1, help="Write so many highest, random and lowest samples.")] = None,
    judge: Annotated[str | None, typer.Option(help="Compare with likelihood, classifier:FILE or openai:MODEL.")] = None,
    trait: Annotated[str | None, typer.Option(help="What --judge judges: a bundled trait, or a JSON's path.")] = None,
    judge_top: Annotated[int | None, typer.Option(min=1, help="Judge so many of the highest samples only.")] = None,
    shard: Annotated[str | None, typer.Option(help="Score one share of so many, counted from 0: 0/4 to 3/4.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Score nothing; finish what shards have scored.")] = False,
    actors: Annotated[int, typer.Option(min=0, help="Score in so many Ray actors.")] = 0,
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="What each actor reserves.")] = 0.0,
    fail_above: Annotated[float | None, typer.Option(help="Exit with 3 if a set's score is greater.")] = None,
    seed: SeedOption = 0,
    judge_extra_body: JudgeExtraOption = None,
    base_extra_body: BaseExtraOption = None,
    concurrency: ConcurrencyOption = 20,
    timeout: TimeoutOption = 60.0,
    alias: AliasOption = None,
    model: ModelOption = DEFAULT_MODEL,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank training data by projection difference: how far its responses would pull the model along persona vectors.

    Rows that cannot be read are counted, and listed in rejects.jsonl. report.html shows what was found.

    Example: persona-lens screen chats.jsonl --vectors runs/demo --base proxy --benign plain.jsonl --output runs/screen
    """
    from persona_lens.screening.run import ShardsMissing, finish
    from persona_lens.screening.run import screen as find
    from persona_lens.screening.samples import named_datasets

    form = None if by is None else cast(Any, by.value)
    named, name = _named_with(data or [], benign)
    asked = Asked(form, name, percentile, split, judge_top, fail_above, as_json)
    ready = cache(lambda: load(model, model_class, threads))
    if judge is not None and benign is None:
        raise typer.BadParameter("--judge goes with --benign, whose threshold it is compared with")
    settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "aliases": alias}
    to_judge = settings | {"extra_body": judge_extra_body}
    judged = _judge(judge, trait, output, ready, max_new_tokens, seed, to_judge)
    if merge:
        report(finish(output), asked, judged)
        return
    if not data or not vectors:
        raise typer.BadParameter("give DATA and --vectors, or --merge for a run whose shards are scored")
    chosen, share = [_vector(path, layer) for path in vectors], _shard(shard)
    source, files = _base(base, output, settings | {"extra_body": base_extra_body}), named_datasets(named)
    try:
        found = find(
            ready(),
            files,
            chosen,
            output=output,
            base=source,
            base_fraction=base_fraction,
            first_turn=first_turn,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            max_new_tokens=max_new_tokens,
            sample=sample,
            after=after,
            system_prompt=system,
            shard=share,
            actors=actors,
            gpus_per_actor=gpus_per_actor,
            seed=seed,
        )
    except ShardsMissing as waiting:
        say(f"{waiting}")
        return
    if not isinstance(source, str):
        say(f"Base responses: {source.usage}.")
    report(found, asked, judged)


def _named_with(data: Sequence[Path], benign: Path | None) -> tuple[dict[str, Path], str | None]:
    """The sets by name, the benign one among them, and the name of that one."""
    named = _named(data)
    if benign is None or str(benign) in named:
        return named, None if benign is None else str(benign)
    named = _named(list(dict.fromkeys([*data, benign])))
    return named, next(name for name, path in named.items() if path == benign)


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """The files by their stems; two of one stem by their paths."""
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}


def _vector(path: Path, layer: int | None) -> "PersonaVector":
    given = load_vectors(path)
    return given.at(selected_layer(path, given) if layer is None else layer)


def _base(spec: str, folder: Path, settings: dict[str, Any]) -> "Base":
    if settings["extra_body"] is not None and not spec.startswith("openai:"):
        raise typer.BadParameter(f"--base-extra-body goes to a base model on a server, and --base is {spec}")
    match spec:
        case "generate" | "given" | "proxy" | "none":
            return spec
    if not spec.startswith("openai:"):
        raise typer.BadParameter(
            f"--base is generate, given, proxy, none, openai:MODEL or openai:MODEL@URL; got {spec}"
        )
    return client_of(spec, folder, **settings)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise typer.BadParameter(f"--shard is a share, counted from 0, of so many, such as 0/4; got {text}")
    return int(found[1]), int(found[2])


def _judge(
    spec: str | None,
    trait: str | None,
    folder: Path,
    model: "Callable[[], Model]",
    max_new_tokens: int,
    seed: int,
    settings: dict[str, Any],
) -> Judging | None:
    """What judges samples, checked before anything is loaded; None where no judge is asked for."""
    if (spec is None) != (trait is None):
        raise typer.BadParameter("--judge and --trait go together")
    if spec is None or trait is None:
        if settings["extra_body"] is not None:
            raise typer.BadParameter("--judge-extra-body goes to a --judge, and none is given")
        return None
    from persona_lens.extraction.pipeline import calibrate
    from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
    from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
    from persona_lens.rollouts.engines import ModelEngine
    from persona_lens.screening.filtering import judge_samples
    from persona_lens.traits.trait import load_trait

    judged = load_trait(trait)
    # A classifier alone: nothing here asks for coherence, which it would take from the model.
    if spec.startswith("classifier:") and settings["extra_body"] is None:
        words = ClassifierJudge(TextClassifier.load(spec.removeprefix("classifier:")))
        return lambda found, rows: judge_samples(found, words, judged, rows)
    chosen = judge_of(spec, folder, **settings)

    def own() -> "Judge":
        referee = LikelihoodRatioJudge(model())
        calibrate(referee, judged, ModelEngine(model(), max_new_tokens), folder=folder, seed=seed)
        return referee

    return lambda found, rows: judge_samples(found, chosen(own), judged, rows)
