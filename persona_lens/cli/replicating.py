"""The command that makes the paper's tables: planned, costed, run stage by stage, and reported beside the paper's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.ending import claim
from persona_lens.cli.inputs import set_threads
from persona_lens.cli.options import JsonOption, ThreadsOption, app
from persona_lens.cli.output import print_table, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.replication.plan import Plan


@app.command()
def replicate(
    preset: Annotated[str, typer.Option(help="embedded, qwen2.5-7b, llama-3.1-8b, or the path of a preset's file.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; a second call goes on where the first stopped.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All traits that the preset names.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of the data that you bring; the working folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print each stage's work, time and dollars; load and write nothing.")
    ] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The paper's experiments, each number beside the paper's, with one command; it says what it costs first.

    Stages: extraction, layers, dose-response, monitoring, cosines, finetuning, projection-difference, mitigation,
    new-facts, real-chats, benchmarks. With --dry-run it loads no model: it prints the work, hours and dollars of each.

    Example: persona-lens replicate --preset embedded --output runs/replication
    """
    from persona_lens.replication.plan import HEADS, plan_replication
    from persona_lens.replication.preset import load_preset
    from persona_lens.replication.stages import all_stages

    settings = load_preset(preset)
    if unknown := sorted(set(only or []).difference(all_stages())):
        raise typer.BadParameter(f"--only is one of {', '.join(all_stages())}; got {unknown[0]}")
    plan = plan_replication(settings.in_full() if full else settings, data, only=only or [])
    if dry_run and as_json:
        tell_json(plan.as_json())
    elif not as_json:
        print_table(HEADS, plan.rows())
        for line in plan.notes():
            tell(line)
    if not dry_run:
        claim(output)
        set_threads(threads)
        _run(plan, output, as_json=as_json)


def _run(plan: "Plan", output: Path, *, as_json: bool) -> None:
    from persona_lens.replication.page import write_replication_report
    from persona_lens.replication.run import run_plan

    replication = run_plan(plan, output)
    if as_json:
        tell_json(replication.as_json())
    try:
        say(f"The page is {write_replication_report(output)}; report.json and report.md have the same numbers.")
    except ImportError as error:
        say(f"No page: {error}")
    if failures := replication.failures:
        told = "; ".join(f"{name}: {why}" for name, why in failures.items())
        raise ValueError(f"{len(failures)} pieces failed, and are tried again at the next call: {told}")
