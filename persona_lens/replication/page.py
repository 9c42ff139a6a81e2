"""The report of a replication: one self-contained page, the same in Markdown, and report.json, all from its folder.

Knows nothing about models: it may be made again at any time, also while the run goes on.
"""

from pathlib import Path
from typing import Any

import persona_lens
from persona_lens.pages.page import draw, render
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
    stages = [_stage(found, stage) for stage in STAGES]
    return render(
        "replication.html",
        f"Replication: {found.preset.name}",
        "results report replication",
        pictures=[picture for stage in stages for picture in stage["pictures"]],
        description=found.preset.description,
        summary=summary_lines(found),
        stages=stages,
        heads=HEADS,
        version=persona_lens.__version__,
        folder=found.folder.name,
    )


def _stage(found: Replication, stage: Stage) -> dict[str, Any]:
    text = stage_text(found, stage)
    if text:
        return {"heading": HEADINGS[stage], "text": text, "pictures": []}
    return {
        "heading": HEADINGS[stage],
        "text": "",
        "rows": [finding_row(each, found.preset.model.paper) for each in found.findings[stage]],
        "pictures": [
            draw(each.draw, each.place, each.caption, height=each.height, min_width=560)
            for each in stage_pictures(found, stage)
        ],
        "made_with": made_with(found, stage),
    }
