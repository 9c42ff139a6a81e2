"""Draws the pictures of the documentation, with a headless Chromium.

python docs/picture.py readme runs/demo                     # a run's folder: docs/images/readme.png
python docs/picture.py growth benchmarks/results.json       # results of benchmarks: docs/images/growth.png
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import plotly.io
from markupsafe import escape

import persona_lens
from persona_lens import plot_frontier, plot_layer_statistics
from persona_lens.judges.scores import ScoredRollout
from persona_lens.pages.run_folder import Run, read_run
from persona_lens.pages.run_report import coloured_texts

SHEET = (Path(persona_lens.__file__).parent / "pages" / "templates" / "style.css").read_text("utf-8")
IMAGES = Path(__file__).parent / "images"
MIN_COHERENCE = 75.0
STYLE = """
:root { --ink: #1d1d1f; --grey: #6b6b70; --line: #d9d9de; --ground: #fff; --card: #fff; }
body { margin: 0; padding: 22px 30px; color: var(--ink); background: #fff;
  font: 15px/1.5 "Liberation Sans", Arial, sans-serif; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 24px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 24px; margin-top: 6px; }
h1 { font-size: 22px; margin: 0 0 12px; letter-spacing: 0; }
h2 { font-size: 16px; margin: 0; }
p { margin: 0 0 4px; color: var(--grey); }
"""


def main() -> None:
    """Read what is named, and draw it."""
    parser = argparse.ArgumentParser(description="Draws the pictures of the documentation.")
    parser.add_argument("picture", choices=["readme", "growth"])
    parser.add_argument("source", type=Path, help="a run's folder, or the results of benchmarks")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    chosen = parser.parse_args()
    if chosen.picture == "readme":
        page, size = page_of(read_run(chosen.source)), (1280, 660)
    else:
        page, size = growth_page(chosen.source), (820, 520)
    output = IMAGES / f"{chosen.picture}.png"
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "page.html"
        written.write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=10000"]
        sized = [f"--window-size={size[0]},{size[1]}", "--force-device-scale-factor=1.5", f"--screenshot={output}"]
        subprocess.run([chosen.chromium, *flags, *sized, written.as_uri()], check=True, capture_output=True)
    print(output)


def growth_page(results: Path) -> str:
    """How the time of extraction grows with what is asked of it."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not installed
    from benchmarks.growth import plot_growth

    figure = plot_growth(json.loads(results.read_text("utf-8"))["measures"])
    figure.update_layout(width=800, height=500)
    drawn = plotly.io.to_html(figure, full_html=False, include_plotlyjs=True, config={"staticPlot": True})
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{drawn}"


def page_of(run: Run) -> str:
    """Layers and frontier side by side over a kept pair, token by token."""
    if run.trait is None or run.vectors is None or run.sweep is None or run.examples is None:
        raise SystemExit(
            f"{run.folder} lacks a trait, vectors, a sweep or example tokens: make it with `persona-lens demo`."
        )
    figures = [plot_layer_statistics(run.vectors), plot_frontier(run.sweep, min_coherence=MIN_COHERENCE)]
    drawn = [
        plotly.io.to_html(
            figure.update_layout(
                title=None, width=598, height=370, font_size=12, margin={"t": 50, "l": 56, "r": 12, "b": 44}
            ).update_annotations(font_size=12),
            full_html=False,
            include_plotlyjs=place == 0,
            config={"staticPlot": True},
        )
        for place, figure in enumerate(figures)
    ]
    texts, _ = coloured_texts(run, run.choice(MIN_COHERENCE))
    sides = [
        side
        for pair in run.pairs
        for side in (pair.positive, pair.negative)
        if side is not None and side.rollout.key in texts
    ]
    adjectives = {"positive": run.trait.positive_adjective, "negative": run.trait.negative_adjective}
    answers = "".join(_side(adjectives[side.rollout.polarity], side, texts) for side in sides[:2])
    best = run.sweep.best(MIN_COHERENCE)
    of = "" if run.vectors.provenance is None else f" of {run.vectors.provenance.model.name}"
    return (
        f"<!doctype html><meta charset=utf-8><style>{SHEET}{STYLE}</style><body class=report>"
        f"<h1>{escape(run.name)}, a persona vector{escape(of)}</h1>"
        "<div class=plots><div><h2>How good is each layer's direction?</h2><p>On questions it was not made of.</p>"
        f"{drawn[0]}</div><div><h2>What does steering with it do, and cost?</h2><p>Each mark is a layer at a "
        f"coefficient; layer {best.layer} at {best.coefficient:g} is recommended.</p>{drawn[1]}</div></div>"
        f"<h2>{escape(sides[0].rollout.question)}</h2>"
        f"<p>Two of the model's answers, each token in the colour of its projection on layer {best.layer}.</p>"
        f"<div class=pair>{answers}</div>"
    )


def _side(adjective: str, side: ScoredRollout, texts: Mapping[str, str]) -> str:
    score = "no score" if side.trait_score is None else f"trait score {side.trait_score:.0f}"
    return f"<div><b>told to be {escape(adjective)}</b> · {score}<div class=text>{texts[side.rollout.key]}</div></div>"


if __name__ == "__main__":
    main()
