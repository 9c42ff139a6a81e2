"""The commands that report: the page of a run's folder, and the paper's tables."""

from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli.interrupts import lock
from persona_lens.cli.options import DEFAULT_THREADS, JsonOption, command
from persona_lens.cli.output import print_table, say, tell, tell_json


@command
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, of `extract`, `select-layer` or `demo`.")],
    output: Annotated[
        Path | None, typer.Option(help="The page to write; report.html in the folder by default.")
    ] = None,
    min_coherence: Annotated[float, typer.Option(min=0, max=100, help="Mean coherence that a cell needs.")] = 75.0,
    as_json: JsonOption = False,
) -> None:
    """A run's folder as one page of HTML: layer and dose, samples, statistics, judge, and provenance.

    The page is one file that needs no network. No model is loaded; the page names what the folder lacks.

    Example: persona-lens report runs/demo --output demo.html
    """
    from persona_lens.pages.run_folder import findings, read_run
    from persona_lens.pages.run_report import write_report

    page = write_report(run, output, min_coherence=min_coherence)
    if as_json:
        numbers = findings(read_run(run), min_coherence=min_coherence)
        tell_json({"page": str(page), "bytes": page.stat().st_size, **numbers})
        return
    say(f"The page is {page}.")


@command
def replicate(
    preset: Annotated[str, typer.Option(help="embedded, qwen2.5-7b, llama-3.1-8b, or the path of a preset's file.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; a second call goes on where the first stopped.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All traits that the preset names.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of your own data sets; the working folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print each stage's work, time and dollars; load and write nothing.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help=f"CPU threads, default {DEFAULT_THREADS}.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The paper's experiments with one command, each number beside the paper's; it says first what they cost.

    Stages: extraction, layers, dose-response, monitoring, cosines, finetuning, projection-difference, mitigation,
    new-facts, real-chats, benchmarks. With --dry-run it loads no model: it prints the work, hours and dollars of each.

    Example: persona-lens replicate --preset embedded --output runs/replication
    """
    from persona_lens.replication.plan import HEADS, plan_replication
    from persona_lens.replication.preset import load_preset
    from persona_lens.replication.stages import all_stages

    loaded = load_preset(preset)
    if unknown := sorted(set(only or []).difference(all_stages())):
        raise typer.BadParameter(f"--only is one of {', '.join(all_stages())}; got {unknown[0]}")
    plan = plan_replication(loaded.in_full() if full else loaded, data, only=only or [])
    if dry_run and as_json:
        tell_json(plan.as_json())
    elif not as_json:
        print_table(HEADS, plan.rows())
        for line in plan.notes():
            tell(line)
    if dry_run:
        return
    import torch

    from persona_lens.replication.page import write_replication_report
    from persona_lens.replication.run import run_plan

    lock(output)
    torch.set_num_threads(threads or DEFAULT_THREADS)
    replication = run_plan(plan, output)
    if as_json:
        tell_json(replication.as_json())
    try:
        say(f"The page is {write_replication_report(output)}; report.json and report.md have the same numbers.")
    except ImportError as error:
        say(f"No page: {error}")
    if replication.failures:
        failures = "; ".join(f"{name}: {reason}" for name, reason in replication.failures.items())
        raise ValueError(f"{len(replication.failures)} pieces failed, and are tried again at the next call: {failures}")
