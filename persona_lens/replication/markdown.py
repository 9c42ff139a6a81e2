"""The report's tables with the paper's number beside ours, the same on the page and in Markdown."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from persona_lens.replication.reported_number import PaperFigure, ReportedNumber
from persona_lens.replication.result import Replication
from persona_lens.statistics import Estimate

HEADS = ["of", "what", "ours [95 %]", "n", "interval over", "the paper's", "held"]


def estimate_text(estimate: Estimate) -> str:
    """The number with its interval, to three digits."""
    value, low, high, _ = estimate
    if value is None:
        return "-"
    return _short(value) + ("" if low is None or high is None else f" [{_short(low)}, {_short(high)}]")


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


def number_row(number: ReportedNumber, model: str) -> list[str]:
    """A row under `HEADS`."""
    holds = number.holds(model)
    held = "" if holds is None else "yes" if holds else "no"
    what = f"control: {number.what}" if number.is_control else number.what
    theirs = paper_text(number.papers(model), model)
    return [number.subject, what, estimate_text(number.ours), str(number.ours.n), number.over, theirs, held]


def stage_text(replication: Replication, stage: str) -> str:
    """Why a stage has no numbers; empty where it has some."""
    if replication.numbers.get(stage):
        return ""
    return f"Left out: {replication.left_out[stage]}." if stage in replication.left_out else "Not run yet."


def summary_lines(replication: Replication) -> Iterator[str]:
    """What a reader should know before the tables."""
    preset = replication.preset
    yield f"{replication}."
    yield preset.limits.strip()
    if not preset.model.paper:
        yield (
            "The paper's numbers are those of its Qwen2.5-7B-Instruct, where it names the model: they are here to "
            "compare with, and another model need not agree."
        )
    yield "Numbers that the paper shows as a picture alone are marked so, and none was read off a picture."
    for piece, why in replication.failures.items():
        yield f"Failed at the last try: {piece}: {why}"


def markdown(replication: Replication) -> str:
    """The replication as Markdown."""
    model = replication.preset.model.paper
    lines = [f"# Replication: {replication.preset.name}", "", replication.preset.description, ""]
    for line in summary_lines(replication):
        lines += [line, ""]
    for name, stage in replication.stages.items():
        lines += [f"## {stage.heading}", ""]
        if text := stage_text(replication, name):
            lines += [text, ""]
            continue
        lines += [_line(HEADS), _line(["---"] * len(HEADS))]
        lines += [_line(number_row(number, model)) for number in replication.numbers[name]]
        lines += ["", made_with(replication, name), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def made_with(replication: Replication, stage: str) -> str:
    """Engine, judge, seed and versions of a finished stage."""
    record = replication.records.get(stage)
    if record is None:
        return "This stage is not finished."
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    judge = replication.stages[stage].judged_by or judge_text(record, stage)
    return f"Made with seed {record['seed']} by {record['engine']}; judged by {judge}; {versions}."


def judge_text(record: dict[str, Any], stage: str) -> str:
    """The judge's name; of one that is fitted to each trait what all names have in common, and where the rest is."""
    names = list(dict.fromkeys(name for name in record["judges"].values() if name))
    if len(names) < 2:
        return "".join(names)
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(", ") for name in names), strict=False))
    shared = ", ".join(parts[0] for parts in common) or f"{len(names)} judges"
    return f"{shared}, fitted to each trait as stages/{stage}.json says"
