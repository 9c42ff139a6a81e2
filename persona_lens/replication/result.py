"""A replication as a value: what a folder holds of it, number by number, beside the paper's.

It is read from the folder's files alone, so an interrupted run that was finished later gives the same result.
Knows nothing about models.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona_lens.replication.finding import Finding
from persona_lens.replication.preset import STAGES, Preset
from persona_lens.replication.set_findings import (
    benchmark_findings,
    brought_findings,
    finetuning_findings,
    mitigation_findings,
    projection_findings,
)
from persona_lens.replication.tables import Stage
from persona_lens.replication.trait_findings import (
    cosine_findings,
    dose_findings,
    extraction_findings,
    layer_findings,
    monitoring_findings,
)
from persona_lens.storage.files import JsonLines, read_json, write_json

FORMAT_VERSION = 1
PRESET, SETTINGS, REPORT, FAILURES = "preset.json", "settings.json", "report.json", "failures.json"
BENCHMARKS = "benchmarks.jsonl"

_READERS: dict[Stage, Callable[[Preset, Path], Iterator[Finding]]] = {
    "extraction": extraction_findings,
    "layers": layer_findings,
    "dose-response": dose_findings,
    "monitoring": monitoring_findings,
    "cosines": cosine_findings,
    "finetuning": finetuning_findings,
    "projection-difference": projection_findings,
    "mitigation": mitigation_findings,
}


@dataclass(frozen=True)
class Replication:
    """What a replication's folder holds.

    Attributes:
        folder: Where it is.
        preset: The settings that it was made with.
        findings: Every number, by stage.
        records: What each finished stage was made with: settings, versions, seed, engine, judge.
        left_out: Why a stage did not run, by stage.
        failures: What went wrong at the last try, by piece.
    """

    folder: Path
    preset: Preset
    findings: dict[Stage, tuple[Finding, ...]] = field(repr=False)
    records: dict[Stage, dict[str, Any]] = field(default_factory=dict, repr=False)
    left_out: dict[Stage, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def all_findings(self) -> list[Finding]:
        """Every number, in the order of the stages."""
        return [each for found in self.findings.values() for each in found]

    @property
    def compared(self) -> list[Finding]:
        """The numbers that stand beside a printed one of the paper's and have an interval."""
        return [each for each in self.all_findings if each.holds(self.preset.model.paper) is not None]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        model = self.preset.model.paper
        return {
            "format_version": FORMAT_VERSION,
            "preset": self.preset.model_dump(mode="json", by_alias=True, exclude={"cost"}),
            "stages": {
                stage: {
                    "left_out": self.left_out.get(stage, ""),
                    "record": self.records.get(stage),
                    "findings": [each.as_json(model) for each in self.findings.get(stage, ())],
                }
                for stage in STAGES
            },
            "failures": self.failures,
        }

    def save(self) -> Path:
        """Write report.json into the folder, whole or not at all."""
        write_json(self.folder / REPORT, self.as_json())
        return self.folder / REPORT

    def __str__(self) -> str:
        held = sum(bool(each.holds(self.preset.model.paper)) for each in self.compared)
        numbers, compared = len(self.all_findings), len(self.compared)
        return (
            f"{self.preset.name}: {numbers} numbers; {compared} stand beside a printed one of the paper's, of which "
            f"{held} have an interval that holds it"
        )


def read_replication(folder: str | Path) -> Replication:
    """What `replicate` left in a folder, as far as it has come.

    Raises FileNotFoundError where it holds no replication, ValueError where a file of it is damaged.
    """
    folder = Path(folder)
    if not (folder / PRESET).exists():
        raise FileNotFoundError(f"{folder} holds no replication: make one with `persona-lens replicate`.")
    kept = read_json(folder / PRESET)
    preset = Preset.model_validate_json(json.dumps(kept["preset"]))
    findings: dict[Stage, tuple[Finding, ...]] = {
        stage: tuple(read(preset, folder)) for stage, read in _READERS.items()
    }
    rest = tuple(brought_findings(folder))
    findings["new-facts"] = tuple(each for each in rest if each.figure == "facts.accuracy")
    findings["real-chats"] = tuple(each for each in rest if each.figure == "chats.score")
    rows = JsonLines(folder / BENCHMARKS).read()
    findings["benchmarks"] = tuple(benchmark_findings(preset, folder, rows))
    records: dict[Stage, dict[str, Any]] = {
        stage: read_json(path) for stage in STAGES if (path := stage_record(folder, stage)).exists()
    }
    failed = folder / FAILURES
    failures = read_json(failed) if failed.exists() else {}
    return Replication(folder, preset, findings, records, kept["left_out"], failures)


def stage_record(folder: Path, stage: Stage) -> Path:
    """The file that says what a finished stage was made with."""
    return folder / "stages" / f"{stage}.json"
