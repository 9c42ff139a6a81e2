"""A replication as a value: what a folder holds of it, number by number, beside the paper's.

It is read from the folder's files alone, so an interrupted run that was finished later gives the same result.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from persona_lens.replication.preset import Preset
from persona_lens.replication.reported_number import ReportedNumber
from persona_lens.replication.set_numbers import (
    benchmark_numbers,
    chat_numbers,
    fact_numbers,
    finetuning_numbers,
    grid_contrast,
    mitigation_numbers,
    projection_numbers,
    tuned_sets,
)
from persona_lens.replication.stages import Stage, all_stages
from persona_lens.replication.trait_numbers import (
    cosine_numbers,
    dose_numbers,
    extraction_numbers,
    layer_numbers,
    monitoring_numbers,
)
from persona_lens.storage.files import JsonLines, read_json, write_json

FORMAT_VERSION = 1
PRESET, SETTINGS, REPORT, FAILURES = "preset.json", "settings.json", "report.json", "failures.json"
BENCHMARKS = "benchmarks.jsonl"

_READERS: dict[str, Callable[[Preset, Path], Iterable[ReportedNumber]]] = {
    "extraction": extraction_numbers,
    "layers": layer_numbers,
    "dose-response": dose_numbers,
    "monitoring": monitoring_numbers,
    "cosines": cosine_numbers,
    "finetuning": lambda preset, folder: finetuning_numbers(tuned_sets(preset, folder), preset.seed),
    "projection-difference": lambda preset, folder: projection_numbers(
        tuned_sets(preset, folder), preset.seed, grid_contrast(preset)
    ),
    "mitigation": mitigation_numbers,
    "new-facts": fact_numbers,
    "real-chats": chat_numbers,
    "benchmarks": lambda preset, folder: benchmark_numbers(preset, folder, JsonLines(folder / BENCHMARKS).read()),
}


@dataclass(frozen=True)
class Replication:
    """What a replication's folder holds.

    Attributes:
        folder: Where it is.
        preset: The settings that it was made with.
        numbers: Every number, by stage.
        records: What each finished stage was made with: settings, versions, seed, engine, judge.
        left_out: Why a stage did not run, by stage.
        failures: What went wrong at the last try, by piece.
        stages: Every stage by its name, in order.
    """

    folder: Path
    preset: Preset
    numbers: dict[str, tuple[ReportedNumber, ...]] = field(repr=False)
    records: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=all_stages, repr=False)

    @property
    def all_numbers(self) -> list[ReportedNumber]:
        """Every number, in the order of the stages."""
        return [number for stage in self.stages for number in self.numbers.get(stage, ())]

    @property
    def compared(self) -> list[ReportedNumber]:
        """The numbers that have an interval, and a printed number of the paper's to compare with."""
        return [number for number in self.all_numbers if number.holds(self.preset.model.paper) is not None]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "preset": self.preset.model_dump(mode="json", by_alias=True, exclude={"cost"}),
            "stages": {
                stage: {
                    "left_out": self.left_out.get(stage, ""),
                    "record": self.records.get(stage),
                    "findings": [number.as_json(self.preset.model.paper) for number in self.numbers.get(stage, ())],
                }
                for stage in self.stages
            },
            "failures": self.failures,
        }

    def save(self) -> Path:
        """Write report.json into the folder, whole or not at all."""
        write_json(self.folder / REPORT, self.as_json())
        return self.folder / REPORT

    @classmethod
    def load(cls, folder: str | Path, *, extra_stages: Sequence[Stage] = ()) -> "Replication":
        """What `replicate` left in a folder, as far as it has come; `extra_stages` as `replicate` took them.

        The numbers of stages on moods, which version 0.1.0 had, are those of the folder's report.json, unless
        `extra_stages` can read them.
        Raises FileNotFoundError where it holds no replication, ValueError where a file of it is damaged.
        """
        folder = Path(folder)
        if not (folder / PRESET).exists():
            raise FileNotFoundError(f"{folder} holds no replication: make one with `persona-lens replicate`.")
        kept = read_json(folder / PRESET)
        preset = Preset.model_validate_json(json.dumps(kept["preset"]))
        stages = all_stages(extra_stages)
        if preset.finetuning.source == "moods":
            of_moods = {name: _reported(stage) for name, stage in stages.items() if "finetuning" in stage.needs}
            stages |= of_moods
        numbers = {name: tuple((stage.numbers or _READERS[name])(preset, folder)) for name, stage in stages.items()}
        records = {name: read_json(path) for name in stages if (path := stage_record(folder, name)).exists()}
        failures = read_json(folder / FAILURES) if (folder / FAILURES).exists() else {}
        return cls(folder, preset, numbers, records, kept["left_out"], failures, stages)

    def __str__(self) -> str:
        held = sum(bool(number.holds(self.preset.model.paper)) for number in self.compared)
        return (
            f"{self.preset.name}: {len(self.all_numbers)} numbers; {len(self.compared)} stand beside a printed one of "
            f"the paper's, of which {held} have an interval that holds it"
        )


def stage_record(folder: Path, stage: str) -> Path:
    """The file that says what a finished stage was made with."""
    return folder / "stages" / f"{stage}.json"


def _reported(stage: Stage) -> Stage:
    """The stage with the numbers that report.json has of it, and no pictures, which need what they were made from."""

    def numbers(preset: Preset, folder: Path) -> list[ReportedNumber]:
        report = read_json(folder / REPORT)["stages"] if (folder / REPORT).exists() else {}
        return [ReportedNumber.from_json(row) for row in report.get(stage.name, {}).get("findings", [])]

    return replace(stage, numbers=numbers, pictures=lambda _: (), judged_by="a text classifier of each mood")
