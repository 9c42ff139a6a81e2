"""The page of a run: its parts in the order in which one asks for them, in one file that needs nothing from outside.

Knows nothing about the parts.
"""

from pathlib import Path

import persona_lens
from persona_lens.pages.page import PARTS_STYLE, drawing_scripts, html_page
from persona_lens.pages.run_evidence import ending, judge_section, layers_section, origin_section, responses_section
from persona_lens.pages.run_folder import PAGE, Run, read_run
from persona_lens.pages.run_headline import headline
from persona_lens.pages.run_steering import confirmation_section, frontier_section, sweep_section, texts_section
from persona_lens.pages.sections import REPORT_STYLE, Section
from persona_lens.storage.files import ensure_writable, write_whole


def write_report(folder: str | Path, output: str | Path | None = None, *, min_coherence: float = 75.0) -> Path:
    """Write the report of a run's folder, `report.html` in it by default, and give back where it is.

    The page is one file, for any browser, without a network: the recommended layer and coefficient, the sweep, samples
    at each dose, the layers' statistics, kept and dropped responses, the judge, and what it was all made with. A cell
    needs a mean coherence of `min_coherence` to be recommended. An older page stays until the new one is whole.
    Raises FileNotFoundError where the folder holds no run, ValueError that names a damaged file, OSError where the page
    cannot be written, ImportError without plotly.
    """
    page = Path(folder) / PAGE if output is None else Path(output)
    run = read_run(folder)
    ensure_writable(page)
    write_whole(page, report_html(run, min_coherence=min_coherence).encode())
    return page


def report_html(run: Run, *, min_coherence: float = 75.0) -> str:
    """The page of a run, as `write_report` writes it. Raises ImportError without plotly."""
    sections: list[Section | None] = [
        sweep_section(run, min_coherence),
        frontier_section(run, min_coherence),
        confirmation_section(run),
        texts_section(run, min_coherence),
        layers_section(run, min_coherence),
        responses_section(run, min_coherence),
        judge_section(run),
        origin_section(run),
    ]
    shown = [section for section in sections if section is not None]
    body = [headline(run, min_coherence)]
    body += [f"<section><h2>{each.heading}</h2>{each.html}</section>" for each in shown]
    body.append(ending(f"Made by persona-lens {persona_lens.__version__} from {run.folder.name}; intervals are 95 %."))
    pictures = [picture for each in shown for picture in each.pictures]
    return html_page(
        f"Persona vectors: {run.name}",
        "\n".join(body),
        style=PARTS_STYLE + REPORT_STYLE,
        scripts=drawing_scripts(pictures),
    )
