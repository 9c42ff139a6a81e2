"""A made-up run's folder, written as the library writes it, and a browser that says what it made of a page."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html import escape, unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from persona_lens.evaluation.dose_response import DoseResponse
from persona_lens.extraction.pipeline import ExtractionPlan, summarize
from persona_lens.judges.keep import keep_pairs, pair_rollouts
from persona_lens.judges.scores import ScoredRollout
from persona_lens.monitoring.result import (
    ChatProjections,
    MonitoredVector,
    Monitoring,
    TokenProjections,
    TurnProjections,
)
from persona_lens.rollouts.rows import Rollout
from persona_lens.storage.files import JsonLines, write_json
from tests.evaluation_cases import TRAIT, LetterJudge, keep_rows, make_calibration, make_evaluation, make_sweep
from tests.vector_cases import make_provenance, make_statistics, make_vectors

CELLS = {
    (0, 1.0): ([20.0, 30.0], 90.0),
    (0, 2.0): ([60.0, 70.0], 80.0),
    (2, 1.0): ([10.0, 12.0], 95.0),
    (2, 2.0): ([None, None], 30.0),
}
DIAGNOSTICS = {"rows": 8, "auc_without_own_pair": 0.91, "auc_with_own_pair": 0.95, "spearman_length_positive": None}
SCORES = [(90.0, 10.0), (80.0, 60.0), (30.0, 5.0), (70.0, None)]
"""Trait scores of the positive and the negative side of each pair: the first is kept, the others each dropped."""


def make_run(folder, *, trait=TRAIT.name, said="so it is", judge="made up", system=None):
    """A whole run whose foreign texts are `trait`, `said`, `judge` and `system`; a trait's words are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    scored = [row for pair in make_pairs(trait, said, system) for row in pair]
    JsonLines(folder / "rollouts.jsonl").append(asdict(row.rollout) for row in scored)
    _keep_scores(folder / "scores.jsonl", scored, judge)
    statistics, provenance = make_statistics(), make_provenance(settings={"sampled_by": said, "seed": 0})
    vectors = make_vectors(trait, statistics=statistics, provenance=provenance)
    vectors.save(folder / "vectors.safetensors")
    if trait == TRAIT.name:
        TRAIT.save(folder / "trait.json")
    fitted = replace(make_calibration(questions=TRAIT.evaluation_questions), trait=trait, diagnostics=DIAGNOSTICS)
    write_json(folder / "calibration.json", {"made_with": {}, "calibration": fitted.to_dict()})
    _, report = keep_pairs(pair_rollouts(scored), trait=trait)
    plan, rollouts = ExtractionPlan(trait, said, len(scored), 8, 12), [row.rollout for row in scored]
    summary = summarize(vectors, plan, report, LetterJudge(), TRAIT, rollouts) | {"judge": judge}
    write_json(folder / "summary.json", summary)
    _keep_sweep(folder, trait, said, judge)
    make_examples(vectors, scored[:2]).save(folder / "example_tokens.jsonl")
    return folder


def make_examples(vectors, scored):
    """The responses word by word: at layer l the n-th word of the first one projects to 10 l + n, of others to less."""
    measured = tuple(
        MonitoredVector(vectors.trait, layer, vectors.at(layer).fingerprint) for layer in vectors.known_layers
    )

    def chat(place, row):
        words = re.findall(r"\s*\S+", row.rollout.response)
        values = torch.tensor(
            [[10.0 * each.layer + n - 20 * place for each in measured] for n in range(len(words) + 1)]
        )
        tokens = TokenProjections(("asked", *words), 1, values)
        means = tuple(values[1:].mean(dim=0).tolist())
        turn = TurnProjections(2, tuple(values[0].tolist()), means, len(words), tokens=tokens)
        return ChatProjections(row.rollout.key, (turn,))

    return Monitoring(measured, tuple(chat(place, row) for place, row in enumerate(scored)))


def make_pairs(trait, said, system):
    """Pairs of rollouts with the scores of `SCORES`."""

    def side(index, polarity, score):
        words = TRAIT.system_prompt(polarity, 0) if system is None else system
        question = f"How is it? {said}"
        made = Rollout(trait, polarity, 0, words, question, index, f"{polarity} {index} {said}", None, "stop", said, 0)
        return ScoredRollout(made, score, 90.0)

    return [(side(index, "positive", one), side(index, "negative", two)) for index, (one, two) in enumerate(SCORES)]


def _keep_sweep(folder, trait, said, judge):
    asked = [f"What now? {said}", "And then?"]
    sweep = make_sweep(CELLS, baseline=(5.0, 6.0), questions=asked)

    def foreign(found):
        rows = [
            replace(
                row, rollout=replace(row.rollout, trait=trait, sample=0, response=f"{row.rollout.intervention} {said}")
            )
            for row in found.scored
        ]
        return replace(found, trait=trait, scored=tuple(rows))

    cells = {cell: foreign(found) for cell, found in sweep.evaluations.items()}
    sweep = replace(sweep, trait=trait, judge=judge, baseline=foreign(sweep.baseline), evaluations=cells)
    keep_rows([sweep.baseline, *cells.values()], folder)
    sweep.save(folder)


def keep_confirmation(folder, trait=TRAIT.name):
    """The files of a dose-response at the run's layer 0, with one random direction."""
    names = ["", "x 1", "x 2", "random", "random x 2"]
    scores = [[5.0, 9.0], [20.0, 24.0], [60.0, 72.0], [6.0, 9.0], [7.0, 9.0]]
    plain, one, two, *others = (
        make_evaluation(each, intervention=name, questions=["Why?", "When?"])
        for name, each in zip(names, scores, strict=True)
    )
    made = DoseResponse(trait, 0, "made up", (0.0, 1.0, 2.0), (0.0, 0.1, 0.2), (plain, one, two), ((plain, *others),))
    rows = [row for found in (plain, one, two, *others) for row in found.scored]
    JsonLines(folder / "dose_rollouts.jsonl").append(asdict(row.rollout) for row in rows)
    _keep_scores(folder / "dose_scores.jsonl", rows, "made up")
    write_json(folder / "dose_response.json", made.summary())
    return made


def _keep_scores(path, scored, judge):
    JsonLines(path).append(
        {"key": row.rollout.key, "trait_score": row.trait_score, "coherence": row.coherence, "judge": judge}
        for row in scored
    )


def tiles(page):
    """The large numbers at the top of a page, by their names."""
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd><dd class=about>", page))


# --- the browser ---------------------------------------------------------------------------------------------------

WATCH = """
window.seen = [];
addEventListener("error", function (event) { seen.push(String(event.message)); });
addEventListener("securitypolicyviolation", function (event) { seen.push("refused " + event.blockedURI); });
"""
TELL = """
addEventListener("load", function () { setTimeout(function () {
  var root = document.documentElement, all = function (what) { return document.querySelectorAll(what).length; };
  parent.postMessage({ width: innerWidth, scroll: root.scrollWidth, errors: seen, text: document.body.innerText,
    heading: document.querySelector("h1").innerText, images: all("img, iframe, object, embed"),
    loaded: performance.getEntriesByType("resource").map(function (each) { return each.name; }),
    drawn: all(".picture > .plot-container"), pictures: all(".picture") }, "*");
}, 200); });
"""
FRAMES = """<!doctype html><meta charset=utf-8><body><iframe src="{page}" width=1280 height=900></iframe>
<iframe src="{page}" width=400 height=900></iframe><script>
var told = []; addEventListener("message", function (event) {{ told.push(event.data);
  document.body.dataset.told = JSON.stringify(told); }});</script></body>"""
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=20000"]


class Opened(NamedTuple):
    """What a page says of itself 400 pixels wide and 1280, the console's lines, and what was asked of a network."""

    narrow: dict[str, Any]
    wide: dict[str, Any]
    console: list[str]
    asked: list[str]


def open_report(folder: Path, workplace: Path) -> Opened:
    """Make a run's report and open it in a browser, in two frames.

    A script before the page's own hears its errors, another one after them tells; the page's policy knows both.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed, in which a page could be opened")
    from persona_lens.pages import page, write_report

    real = page.page_scripts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "page_scripts", lambda pictures: [WATCH, *real(pictures), TELL])
        written = write_report(folder, workplace / "opened.html")
    frames, log = workplace / "frames.html", workplace / "net.json"
    frames.write_text(FRAMES.format(page=escape(written.as_uri())))
    flags = [*FLAGS, f"--user-data-dir={workplace / 'browser'}", f"--log-net-log={log}"]
    done = subprocess.run([browser, *flags, "--dump-dom", frames.as_uri()], capture_output=True, timeout=120)
    (told,) = re.findall(r'data-told="([^"]*)"', done.stdout.decode())
    narrow, wide = sorted(json.loads(unescape(told)), key=lambda each: each["width"])
    console = [line for line in done.stderr.decode().splitlines() if ":CONSOLE" in line]
    return Opened(narrow, wide, console, _asked(log))


def _asked(log: Path) -> list[str]:
    """Addresses that pages asked for; the browser asks for some of its own, and those have no origin."""
    lines = [line for line in log.read_text().splitlines() if '"initiator":' in line]
    own = '"initiator":"not an origin"'
    return [address for line in lines if own not in line for address in re.findall(r'"url":"([^"]*)"', line)]
