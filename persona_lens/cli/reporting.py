"""The command that makes a page of a run's folder."""

from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli.options import JsonOption, app
from persona_lens.cli.output import say, tell_json


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, of `extract`, `select-layer` or `demo`.")],
    output: Annotated[
        Path | None, typer.Option(help="The page to write; report.html in the folder by default.")
    ] = None,
    min_coherence: Annotated[float, typer.Option(min=0, max=100, help="Mean coherence that a cell needs.")] = 75.0,
    as_json: JsonOption = False,
) -> None:
    """A run's folder as one page of HTML: layer and dose, samples, statistics, judge, and what made it.

    The page is one file that needs no network; it loads no model. What the folder lacks, it says.

    Example: persona-lens report runs/demo --output demo.html
    """
    from persona_lens.pages.run_findings import findings
    from persona_lens.pages.run_folder import read_run
    from persona_lens.pages.run_report import write_report

    page = write_report(run, output, min_coherence=min_coherence)
    if as_json:
        found = findings(read_run(run), min_coherence=min_coherence)
        tell_json({"page": str(page), "bytes": page.stat().st_size, **found})
        return
    say(f"The page is {page}.")
