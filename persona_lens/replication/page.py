"""The report of a replication: one self-contained page, the same in Markdown, and report.json, all from its folder.

Knows nothing about models: it may be made again at any time, also while the run goes on.
"""

from pathlib import Path

import persona_lens
from persona_lens.pages.page import PARTS_STYLE, Picture, drawing_scripts, escaped, html_page
from persona_lens.pages.sections import REPORT_STYLE, Section, boxed_table, figure, note
from persona_lens.replication.pictures import stage_pictures
from persona_lens.replication.preset import STAGES
from persona_lens.replication.result import Replication, read_replication
from persona_lens.replication.tables import Stage
from persona_lens.replication.wording import (
    HEADINGS,
    HEADS,
    finding_row,
    made_with,
    markdown,
    stage_text,
    summary_lines,
)
from persona_lens.storage.files import ensure_writable, write_whole

PAGE, MARKDOWN = "report.html", "report.md"
STYLE_OF_WORDS = """
.scroll { max-height: none; }
th:nth-child(2), td:nth-child(2), th:nth-child(6), td:nth-child(6) { text-align: left; white-space: normal; }
"""


def write_replication_report(folder: str | Path) -> Path:
    """Write report.html, report.md and report.json of a replication's folder, and give back where the page is.

    The page is one file, for any browser, without a network: each number of the paper's tables beside ours with its
    interval, n, controls, and pictures in the paper's axes. Raises FileNotFoundError where the folder holds no
    replication, ImportError without plotly.
    """
    folder = Path(folder)
    found = read_replication(folder)
    ensure_writable(folder / PAGE)
    found.save()
    write_whole(folder / MARKDOWN, markdown(found).encode())
    write_whole(folder / PAGE, replication_html(found).encode())
    return folder / PAGE


def replication_html(found: Replication) -> str:
    """The page of a replication. Raises ImportError without plotly."""
    sections = [_section(found, stage) for stage in STAGES]
    body = [f"<p class=lead>{escaped(found.preset.description)}</p>"]
    body += [note(each) for each in summary_lines(found)]
    body += [f"<section><h2>{escaped(each.heading)}</h2>{each.html}</section>" for each in sections]
    body.append(note(f"Made by persona-lens {persona_lens.__version__} from {found.folder.name}; intervals are 95 %."))
    pictures: list[Picture] = [picture for each in sections for picture in each.pictures]
    title = f"Replication: {found.preset.name}"
    return html_page(
        title, "\n".join(body), style=PARTS_STYLE + REPORT_STYLE + STYLE_OF_WORDS, scripts=drawing_scripts(pictures)
    )


def _section(found: Replication, stage: Stage) -> Section:
    heading = HEADINGS[stage]
    if text := stage_text(found, stage):
        return Section(heading, note(text))
    drawn = [
        figure(each.draw, each.place, label=each.caption, caption=escaped(each.caption), height=each.height, least=560)
        for each in stage_pictures(found, stage)
    ]
    rows = [finding_row(each, found.preset.model.paper) for each in found.findings[stage]]
    html = boxed_table(heading, HEADS, rows) + "".join(each.html for each in drawn) + note(made_with(found, stage))
    return Section(heading, html, tuple(picture for each in drawn for picture in each.pictures))
