"""The report of a replication: one self-contained page, the same in Markdown, and report.json, all from its folder.

It may be made again at any time, also while the run goes on.
"""

from collections.abc import Sequence
from pathlib import Path

import persona_lens
from persona_lens.pages.page import PARTS_STYLE, Picture, drawing_scripts, escaped, html_page
from persona_lens.pages.sections import REPORT_STYLE, Section, boxed_table, figure, note
from persona_lens.replication.markdown import HEADS, made_with, markdown, number_row, stage_text, summary_lines
from persona_lens.replication.pictures import stage_pictures
from persona_lens.replication.result import Replication
from persona_lens.replication.stages import Stage
from persona_lens.storage.files import ensure_writable, write_whole

PAGE, MARKDOWN = "report.html", "report.md"
STYLE_OF_WORDS = """
.scroll { max-height: none; }
th:nth-child(2), td:nth-child(2), th:nth-child(6), td:nth-child(6) { text-align: left; white-space: normal; }
"""


def write_replication_report(folder: str | Path, *, extra_stages: Sequence[Stage] = ()) -> Path:
    """Write report.html, report.md and report.json of a replication's folder, and return where the page is.

    The page is one file, for any browser, without a network: each number of the paper's tables beside ours with its
    interval, n, controls, and pictures in the paper's axes. Raises FileNotFoundError where the folder holds no
    replication, ImportError without plotly.
    """
    folder = Path(folder)
    replication = Replication.load(folder, extra_stages=extra_stages)
    ensure_writable(folder / PAGE)
    replication.save()
    write_whole(folder / MARKDOWN, markdown(replication).encode())
    write_whole(folder / PAGE, replication_html(replication).encode())
    return folder / PAGE


def replication_html(replication: Replication) -> str:
    """The page of a replication. Raises ImportError without plotly."""
    sections = [_section(replication, stage) for stage in replication.stages]
    body = [f"<p class=lead>{escaped(replication.preset.description)}</p>"]
    body += [note(each) for each in summary_lines(replication)]
    body += [f"<section><h2>{escaped(each.heading)}</h2>{each.html}</section>" for each in sections]
    body.append(
        note(f"Made by persona-lens {persona_lens.__version__} from {replication.folder.name}; intervals are 95 %.")
    )
    pictures: list[Picture] = [picture for each in sections for picture in each.pictures]
    title = f"Replication: {replication.preset.name}"
    return html_page(
        title, "\n".join(body), style=PARTS_STYLE + REPORT_STYLE + STYLE_OF_WORDS, scripts=drawing_scripts(pictures)
    )


def _section(replication: Replication, stage: str) -> Section:
    heading = replication.stages[stage].heading
    if text := stage_text(replication, stage):
        return Section(heading, note(text))
    drawn = [
        figure(each.draw, each.place, label=each.caption, caption=escaped(each.caption), height=each.height, least=560)
        for each in stage_pictures(replication, stage)
    ]
    rows = [number_row(number, replication.preset.model.paper) for number in replication.numbers[stage]]
    html = (
        boxed_table(heading, HEADS, rows) + "".join(each.html for each in drawn) + note(made_with(replication, stage))
    )
    return Section(heading, html, tuple(picture for each in drawn for picture in each.pictures))
