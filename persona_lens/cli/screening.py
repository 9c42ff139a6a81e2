"""The command that screens training data: which data sets and samples would pull the model along persona vectors."""

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from persona_lens.cli.inputs import load_vector
from persona_lens.cli.options import (
    THRESHOLD_PASSED,
    AfterOption,
    BaseFieldsOption,
    FailAboveOption,
    JsonOption,
    JudgeFieldsOption,
    JudgeOptions,
    LayerOption,
    ModelOptions,
    SeedOption,
    ServerOptions,
    command,
)
from persona_lens.cli.output import interval, number, print_table, records, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.judges.scores import Judge
    from persona_lens.models.structure import Model
    from persona_lens.monitoring.thresholds import Threshold
    from persona_lens.screening.result import By, Screening
    from persona_lens.screening.scoring import Base

Judging = Callable[["Screening", Sequence[int] | None], Any]
"""A judge's scores of a screening's samples."""


class Form(StrEnum):
    """The forms of a score."""

    DIFFERENCE = "difference"
    PROXY = "proxy"
    RESPONSE = "response"


class Reporting(NamedTuple):
    """What is done with a finished screening."""

    by: "By | None"
    benign: str | None
    percentile: float
    split: int | None
    judge_top: int | None
    fail_above: float | None
    as_json: bool


@command
def screen(
    output: Annotated[Path, typer.Option(help="Folder of the run; a second call resumes it, or reads it.")],
    models: ModelOptions,
    servers: ServerOptions,
    data: Annotated[list[Path] | None, typer.Argument(help="Chats: .jsonl, .json or .parquet; each is a set.")] = None,
    vectors: Annotated[
        list[Path] | None, typer.Option(help="A run's folder, or a vectors file; repeat for several.")
    ] = None,
    layer: LayerOption = None,
    base: Annotated[
        str, typer.Option(help="Base responses: generate, given, proxy, none, openai:MODEL or openai:MODEL@URL.")
    ] = "generate",
    base_fraction: Annotated[float, typer.Option(help="Share of rows that get a base response.")] = 1.0,
    base_extra_body: BaseFieldsOption = None,
    first_turn: Annotated[bool, typer.Option("--first-turn", help="A chat's first response; else its last.")] = False,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Leave longer prompts out.")] = None,
    max_response_tokens: Annotated[int | None, typer.Option(min=1, help="Read only n tokens of a response.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of base responses.")] = 256,
    sample: Annotated[int | None, typer.Option(min=1, help="Only n random rows of each set.")] = None,
    after: AfterOption = None,
    system: Annotated[str | None, typer.Option(help="System prompt of rows without one.")] = None,
    by: Annotated[
        Form | None, typer.Option(help="Report this form of the score; by default what --base gives.")
    ] = None,
    benign: Annotated[
        Path | None, typer.Option(help="Benign chats, one of DATA by its name, or a file: their percentile is marked.")
    ] = None,
    percentile: Annotated[float, typer.Option(help="Of the benign samples.")] = 95.0,
    split: Annotated[int | None, typer.Option(min=1, help="Write the n highest, random and lowest samples.")] = None,
    judge: Annotated[str | None, typer.Option(help="Compare with likelihood, classifier:FILE or openai:MODEL.")] = None,
    judge_extra_body: JudgeFieldsOption = None,
    trait: Annotated[str | None, typer.Option(help="What --judge judges: a bundled trait, or a JSON's path.")] = None,
    judge_top: Annotated[int | None, typer.Option(min=1, help="Judge only the n highest samples.")] = None,
    shard: Annotated[str | None, typer.Option(help="Score shard i of n, counted from 0: 0/4 to 3/4.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Score nothing; finish what shards have scored.")] = False,
    actors: Annotated[int, typer.Option(min=0, help="Number of Ray actors.")] = 0,
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="What each actor reserves.")] = 0.0,
    fail_above: FailAboveOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Rank training data by projection difference: how far its responses would pull the model along persona vectors.

    Rows that cannot be read are counted, and listed in rejects.jsonl. report.html shows the results.

    Example: persona-lens screen chats.jsonl --vectors runs/demo --base proxy --benign plain.jsonl --output runs/screen
    """
    from persona_lens.screening.plan import RowChoice
    from persona_lens.screening.run import ShardsMissing, Workers, finish
    from persona_lens.screening.run import screen as score_samples
    from persona_lens.screening.samples import named_datasets

    form: Any = by and by.value
    files, benign_name = _name_files(data or [], benign)
    reporting = Reporting(form, benign_name, percentile, split, judge_top, fail_above, as_json)
    if judge is not None and benign is None:
        raise typer.BadParameter("--judge goes with --benign, whose threshold it is compared with")
    load = cache(models.load)
    judging = None
    if (judge is None) != (trait is None):
        raise typer.BadParameter("--judge and --trait go together")
    if judge is not None and trait is not None:
        options = JudgeOptions(servers.concurrency, servers.timeout, servers.alias, judge, judge_extra_body)
        judging = _judging(options, trait, output, load, max_new_tokens, seed)
    elif judge_extra_body is not None:
        raise typer.BadParameter("--judge-extra-body goes to a --judge, and none is given")
    if merge:
        _report(finish(output), reporting, judging)
        return
    if not data or not vectors:
        raise typer.BadParameter("give DATA and --vectors, or --merge for a run whose shards are scored")
    directions, share = [load_vector(path, layer) for path in vectors], _shard(shard)
    source, datasets = _base(base, base_extra_body, output, servers), named_datasets(files)
    rows = RowChoice(
        first_turn=first_turn,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        sample=sample,
        after=after,
        system_prompt=system,
        base_fraction=base_fraction,
        seed=seed,
    )
    try:
        screening = score_samples(
            load(),
            datasets,
            directions,
            output_dir=output,
            base=source,
            max_new_tokens=max_new_tokens,
            rows=rows,
            workers=Workers(actors, gpus_per_actor) if actors else None,
            shard=share,
        )
    except ShardsMissing as waiting:
        say(f"{waiting}")
        return
    if not isinstance(source, str):
        say(f"Base responses: {source.usage}.")
    _report(screening, reporting, judging)


def _name_files(data: Sequence[Path], benign: Path | None) -> tuple[dict[str, Path], str | None]:
    """The data sets by name, the benign one among them, and the name of that one."""

    def by_name(paths: Sequence[Path]) -> dict[str, Path]:  # by their stems, and two of one stem by their paths
        stems = [path.stem for path in paths]
        return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}

    files = by_name(data)
    if benign is None or str(benign) in files:
        return files, None if benign is None else str(benign)
    files = by_name(list(dict.fromkeys([*data, benign])))
    return files, next(name for name, path in files.items() if path == benign)


def _base(name: str, extra_body: str | None, folder: Path, servers: ServerOptions) -> "Base":
    if name.startswith("openai:"):
        return servers.client(name, folder, extra_body=extra_body)
    if extra_body is not None:
        raise typer.BadParameter(f"--base-extra-body goes to a base model on a server, and --base is {name}")
    match name:
        case "generate" | "given" | "proxy" | "none":
            return name
    raise typer.BadParameter(f"--base is generate, given, proxy, none, openai:MODEL or openai:MODEL@URL; got {name}")


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise typer.BadParameter(f"--shard is i/n, counted from 0, such as 0/4; got {text}")
    return int(match[1]), int(match[2])


def _judging(
    options: JudgeOptions, trait: str, folder: Path, load: "Callable[[], Model]", max_new_tokens: int, seed: int
) -> Judging:
    """What judges samples; its file or server is checked before anything is loaded."""
    from persona_lens.extraction.pipeline import calibrate
    from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
    from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
    from persona_lens.rollouts.engines import ModelEngine
    from persona_lens.screening.filtering import judge_samples
    from persona_lens.traits.trait import load_trait

    loaded = load_trait(trait)
    # A classifier alone: nothing here asks for coherence, which it would take from the model.
    if options.judge.startswith("classifier:") and options.judge_extra_body is None:
        classifier = ClassifierJudge(TextClassifier.load(options.judge.removeprefix("classifier:")))
        return lambda screening, rows: judge_samples(screening, loaded, judge=classifier, rows=rows)
    make_judge = options.load_judge(folder)

    def likelihood_judge() -> "Judge":
        judge = LikelihoodRatioJudge(load())
        calibrate(judge, loaded, ModelEngine(load(), max_new_tokens), folder=folder, seed=seed)
        return judge

    return lambda screening, rows: judge_samples(screening, loaded, judge=make_judge(likelihood_judge), rows=rows)


# What the command says of a finished screening


def _report(screening: "Screening", reporting: Reporting, judging: Judging | None) -> None:
    """Print the results, write the pages and splits, and exit with 3 where a set's score passes --fail-above."""
    from persona_lens.screening.filtering import count_flagged

    if reporting.benign is not None and reporting.benign not in screening.datasets:
        names = ", ".join(screening.datasets)
        raise typer.BadParameter(f"--benign {reporting.benign} is not one of the sets: {names}")
    thresholds = _thresholds(screening, reporting)
    rows = _rows(screening, reporting, thresholds)
    flagged = None
    if judging is not None:
        top = None if reporting.judge_top is None else _top(screening, reporting, reporting.judge_top)
        counts = count_flagged(screening, thresholds, judged=judging(screening, top), by=reporting.by)
        flagged = records(counts.set_index("dataset"))
    if reporting.as_json:
        by = reporting.by or screening.by
        tell_json({"counts": screening.counts, "by": by, "sets": rows, "flagged": flagged})
    else:
        _show(screening, reporting, rows, flagged)
    _write(screening, reporting, thresholds)
    if reporting.fail_above is not None and (message := _first_above(rows, reporting.benign, reporting.fail_above)):
        say(f"persona-lens: {message}")
        raise typer.Exit(THRESHOLD_PASSED)


def _first_above(rows: list[dict[str, Any]], benign: str | None, limit: float) -> str | None:
    """One sentence about the first set whose score is above a limit, the benign one apart; None where there is none.

    Raises ValueError where a set has no score, which is no proof of a low one.
    """
    others = [row for row in rows if row["dataset"] != benign]
    for row in others:
        if row["score"] is not None and row["score"] > limit:
            score = f"its score on {row['vector']} is {row['score']:.3f}"
            return f"{row['dataset']}: {score}, above the threshold of {limit:g}."
    if without := [row for row in others if row["score"] is None]:
        raise ValueError(
            f"{without[0]['dataset']}: no sample has a score on {without[0]['vector']} to compare with --fail-above: "
            "raise --base-fraction, or report another form --by."
        )
    return None


def _thresholds(screening: "Screening", reporting: Reporting) -> "dict[str, Threshold]":
    """The benign percentile for every vector, kept in the run's folder; none without benign chats."""
    from persona_lens.monitoring.thresholds import save_thresholds

    if reporting.benign is None:
        return {}
    settings: dict[str, Any] = {
        "benign": reporting.benign,
        "percentile": reporting.percentile,
        "by": reporting.by,
    }
    thresholds = {name: screening.threshold(name, **settings) for name in screening.vectors}
    save_thresholds(screening.folder, thresholds.values())
    return thresholds


def _rows(screening: "Screening", reporting: Reporting, thresholds: "dict[str, Threshold]") -> list[dict[str, Any]]:
    """A row for every set and vector: its score, its controls, and the share of samples above the threshold."""
    scores, controls = records(screening.dataset_scores(reporting.by)), records(screening.controls(reporting.by))
    rows = []
    for score, control in zip(scores, controls, strict=True):
        row = {name: score[name] for name in ("dataset", "vector", "n", "missing", "score", "low", "high")}
        row |= {name: control[name] for name in ("spearman_length", "repeated", "score_without_repeats")}
        if thresholds:
            in_set = screening.rows["dataset"] == row["dataset"]
            scores_in_set: Any = screening.score(row["vector"], reporting.by)[in_set]
            values = scores_in_set.dropna()
            row["above"] = float((values > thresholds[row["vector"]].value).mean()) if len(values) else None
        rows.append(row)
    return rows


def _top(screening: "Screening", reporting: Reporting, n: int) -> list[int]:
    """The highest samples on any of the vectors."""
    rankings = [screening.ranking(name, reporting.by).index[:n].tolist() for name in screening.vectors]
    return sorted({row for ranking in rankings for row in ranking})


def _show(
    screening: "Screening", reporting: Reporting, rows: list[dict[str, Any]], flagged: list[dict[str, Any]] | None
) -> None:
    head = ["set", "vector", "n", "without a score", f"{reporting.by or screening.by} [95 %]"]
    head += ["above the benign threshold"] * (reporting.benign is not None) + ["Spearman with length", "repeats"]
    table = []
    for row in rows:
        cells = [row["dataset"], row["vector"], str(row["n"]), str(row["missing"])]
        cells.append(interval(row["score"], row["low"], row["high"], ".2f"))
        cells += [number(row["above"], ".1%")] if "above" in row else []
        table.append([*cells, number(row["spearman_length"], ".2f"), number(row["repeated"], ".1%")])
    print_table(head, table)
    if flagged:
        names = ("n", "unscored", "projection", "judge", "union", "both")
        print_table(["set", *names], [[row["dataset"], *(str(row[name]) for name in names)] for row in flagged])
    counts = screening.counts
    tell(f"Of {counts['read']} rows {counts['planned']} were screened, {counts['cut']} of them cut.")
    lost = [f"{count} {reason}" for reason, count in (*counts["rejected"].items(), *counts["left_out"].items())]
    if lost:
        tell(f"Not screened: {', '.join(lost)}; rejected rows are listed in {screening.folder / 'rejects.jsonl'}.")


def _write(screening: "Screening", reporting: Reporting, thresholds: "dict[str, Threshold]") -> None:
    """Write a page for every vector, and then the splits, for which there may be too few samples."""
    from persona_lens.screening.filtering import write_split
    from persona_lens.storage.files import write_whole

    endings = {name: f"-{re.sub(r'[^a-zA-Z0-9@._-]', '_', name)}" for name in screening.vectors}
    if len(screening.vectors) == 1:
        endings = dict.fromkeys(screening.vectors, "")
    try:
        from persona_lens.pages.screening import screening_html

        for name, ending in endings.items():
            page = screening_html(screening, vector=name, by=reporting.by, threshold=thresholds.get(name))
            path = screening.folder / f"report{ending}.html"
            write_whole(path, page.encode())
            say(f"The page is {path}.")
    except ImportError as error:
        say(f"No page: {error}")
    if reporting.split is None:
        return
    # The benign set is the reference of the comparison, and no candidate for training.
    table: Any = screening.rows
    candidates = table.index[table["dataset"] != reporting.benign].tolist()
    for name, ending in endings.items():
        folder = screening.folder / f"split{ending}"
        paths = write_split(screening, folder, reporting.split, vector=name, by=reporting.by, rows=candidates)
        say(f"{name}: the highest, random and lowest samples are in {', '.join(map(str, paths.values()))}.")
