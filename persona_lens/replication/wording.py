"""How a replication is told: tables with the paper's number beside ours, the same on the page and in Markdown.

Knows nothing about HTML.
"""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from persona_lens.replication.finding import Finding
from persona_lens.replication.paper import PaperFigure
from persona_lens.replication.preset import STAGES
from persona_lens.replication.result import Replication
from persona_lens.replication.tables import Stage
from persona_lens.statistics import Estimate

HEADINGS: dict[Stage, str] = {
    "extraction": "Directions from the model's own rollouts (section 2)",
    "layers": "Which layer (section B.4)",
    "dose-response": "What a dose does (sections 3.2, J.3)",
    "monitoring": "Does the prompt give the persona away? (sections 3.3, C)",
    "cosines": "How traits lie to each other (section M)",
    "finetuning": "Does the shift tell what finetuning did? (sections 4, G)",
    "projection-difference": "Can it be told before training? (sections 6, H, I)",
    "mitigation": "What holds a trait down (sections 5, J)",
    "new-facts": "Is what should be learnt still learnt? (sections J.1, J.7)",
    "real-chats": "Samples of real chats (section L)",
    "benchmarks": "The judge beside external benchmarks (section B.3)",
}
HEADS = ["of", "what", "ours [95 %]", "n", "interval over", "the paper's", "held"]
NOTHING_YET = "Not run yet."


def estimate_text(found: Estimate) -> str:
    """The number with its interval, to three digits."""
    if found.value is None:
        return "-"
    ends = "" if found.low is None or found.high is None else f" [{_short(found.low)}, {_short(found.high)}]"
    return _short(found.value) + ends


def _short(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 100 or value == int(value) else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def paper_text(theirs: PaperFigure | None, model: str) -> str:
    """The paper's number, with its section, and whose it is where it is not the paper's for this model."""
    if theirs is None:
        return ""
    by = {"replication": ", an independent replication", "reviewers": ", as reviewers quote it"}.get(theirs.source, "")
    of = f", {theirs.model}" if theirs.model and theirs.model != model else ""
    return f"{theirs} ({theirs.section}{by}{of})"


def finding_row(each: Finding, model: str) -> list[str]:
    """A row under `HEADS`."""
    holds = each.holds(model)
    held = "" if holds is None else "yes" if holds else "no"
    what = f"control: {each.what}" if each.is_control else each.what
    theirs = paper_text(each.papers(model), model)
    return [each.subject, what, estimate_text(each.ours), str(each.ours.n), each.over, theirs, held]


def stage_text(found: Replication, stage: Stage) -> str:
    """Why a stage has no numbers; empty where it has some."""
    if found.findings.get(stage):
        return ""
    return f"Left out: {found.left_out[stage]}." if stage in found.left_out else NOTHING_YET


def summary_lines(found: Replication) -> Iterator[str]:
    """What a reader should know before the tables."""
    preset = found.preset
    yield f"{found}."
    yield preset.limits.strip()
    if not preset.model.paper:
        yield (
            "The paper's numbers are those of its Qwen2.5-7B-Instruct, where it names the model: they are here to "
            "compare with, and another model need not agree."
        )
    yield "Numbers that the paper shows as a picture alone are marked so, and none was read off a picture."
    for piece, why in found.failures.items():
        yield f"Failed at the last try: {piece}: {why}"


def markdown(found: Replication) -> str:
    """The replication as Markdown."""
    model = found.preset.model.paper
    lines = [f"# Replication: {found.preset.name}", "", found.preset.description, ""]
    lines += [line for each in summary_lines(found) for line in (each, "")]
    for stage in STAGES:
        lines += [f"## {HEADINGS[stage]}", ""]
        if text := stage_text(found, stage):
            lines += [text, ""]
            continue
        lines += [_line(HEADS), _line(["---"] * len(HEADS))]
        lines += [_line(finding_row(each, model)) for each in found.findings[stage]]
        lines += ["", made_with(found, stage), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def made_with(found: Replication, stage: Stage) -> str:
    """Engine, judge, seed and versions of a finished stage."""
    record = found.records.get(stage)
    if record is None:
        return "This stage is not finished."
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    moods = found.preset.moods is not None and stage in ("finetuning", "projection-difference", "mitigation")
    judge = "a text classifier of each mood" if moods else _judges(record, stage)
    return f"Made with seed {record['seed']} by {record['engine']}; judged by {judge}; {versions}."


def _judges(record: dict[str, Any], stage: Stage) -> str:
    """The judge's name; of one that is fitted to each trait what all have in common, and where the rest stands."""
    names = list(dict.fromkeys(each for each in record["judges"].values() if each))
    if len(names) < 2:
        return "".join(names)
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(", ") for name in names), strict=False))
    shared = ", ".join(parts[0] for parts in common) or f"{len(names)} judges"
    return f"{shared}, fitted to each trait as stages/{stage}.json says"
