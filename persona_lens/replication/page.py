"""The report of a replication: one self-contained page, the same in Markdown, and report.json, all from its folder.

It may be made again at any time, also while the run goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import persona_lens
from persona_lens.pages.page import draw, render
from persona_lens.replication.markdown import HEADS, made_with, markdown, number_row, stage_text, summary_lines
from persona_lens.replication.pictures import stage_pictures
from persona_lens.replication.result import Replication
from persona_lens.replication.stages import Stage
from persona_lens.storage.files import ensure_writable, write_whole

PAGE, MARKDOWN = "report.html", "report.md"


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
    stages = [_stage(replication, stage) for stage in replication.stages]
    return render(
        "replication.html",
        f"Replication: {replication.preset.name}",
        "results report replication",
        pictures=[picture for stage in stages for picture in stage["pictures"]],
        description=replication.preset.description,
        summary=summary_lines(replication),
        stages=stages,
        heads=HEADS,
        version=persona_lens.__version__,
        folder=replication.folder.name,
    )


def _stage(replication: Replication, stage: str) -> dict[str, Any]:
    heading, text = replication.stages[stage].heading, stage_text(replication, stage)
    if text:
        return {"heading": heading, "text": text, "pictures": []}
    return {
        "heading": heading,
        "text": "",
        "rows": [number_row(number, replication.preset.model.paper) for number in replication.numbers[stage]],
        "pictures": [
            draw(picture.draw, picture.place, picture.caption, height=picture.height, min_width=560)
            for picture in stage_pictures(replication, stage)
        ],
        "made_with": made_with(replication, stage),
    }
