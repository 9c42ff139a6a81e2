"""The command that makes the paper's tables: planned, costed, run stage by stage, and reported beside the paper's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.ending import claim
from persona_lens.cli.inputs import set_threads
from persona_lens.cli.options import JsonOption, ThreadsOption, app
from persona_lens.cli.output import print_table, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.replication.preset import Preset
    from persona_lens.replication.tables import Stage


@app.command()
def replicate(
    preset: Annotated[str, typer.Option(help="embedded, qwen2.5-7b, llama-3.1-8b, or the path of a preset's file.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; a second call goes on where the first stopped.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All traits and moods that the preset names.")] = False,
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
    from persona_lens.replication.brought import brought
    from persona_lens.replication.cost import HEADS, plan_replication
    from persona_lens.replication.preset import STAGES, load_preset

    chosen = load_preset(preset)
    chosen = chosen.in_full() if full else chosen
    stages = set(only or [])
    if unknown := sorted(stages.difference(STAGES)):
        raise typer.BadParameter(f"--only is one of {', '.join(STAGES)}; got {unknown[0]}")
    wanted: list[Stage] = [each for each in STAGES if each in stages]
    plan = plan_replication(chosen, brought(chosen, data), only=wanted)
    if dry_run and as_json:
        tell_json(plan.as_json())
    elif not as_json:
        print_table(HEADS, plan.rows())
        for line in plan.notes():
            tell(line)
    if not dry_run:
        _run(chosen, output, wanted, data, threads, as_json=as_json)


def _run(
    preset: "Preset",
    output: Path,
    only: "list[Stage]",
    data: Path | None,
    threads: int | None,
    *,
    as_json: bool,
) -> None:
    from persona_lens.replication.page import write_replication_report
    from persona_lens.replication.run import replicate as run_stages

    claim(output)
    set_threads(threads)
    found = run_stages(preset, output, only=only, data=data)
    if as_json:
        tell_json(found.as_json())
    try:
        say(f"The page is {write_replication_report(output)}; report.json and report.md have the same numbers.")
    except ImportError as error:
        say(f"No page: {error}")
    if found.failures:
        told = "; ".join(f"{name}: {why}" for name, why in found.failures.items())
        raise ValueError(f"{len(found.failures)} pieces failed, and are tried again at the next call: {told}")
