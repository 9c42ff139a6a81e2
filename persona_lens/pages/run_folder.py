"""The contents of a run's folder: trait, vectors, judge, judged rollouts, sweep and confirmation, where it has them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from persona_lens.evaluation.dose_response import DoseResponse
from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
from persona_lens.extraction.pipeline import best_layer
from persona_lens.judges.keep import KeepReport, keep_pairs, pair_rollouts
from persona_lens.judges.likelihood_ratio import Calibration
from persona_lens.judges.scores import ScoredRollout, read_scores
from persona_lens.monitoring.result import Monitoring
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.storage.files import DAMAGE
from persona_lens.traits.trait import Trait, load_trait
from persona_lens.vectors.persona_vectors import PersonaVectors

FILES = {
    "trait.json": "the trait: instructions, questions, rubric",
    "rollouts.jsonl": "the sampled responses",
    "scores.jsonl": "the judge’s scores of them",
    "vectors.safetensors": "the direction at every layer",
    "summary.json": "what was kept, the judge’s diagnostics, the layers’ numbers",
    "calibration.json": "the judge’s fitted constants",
    "calibration_rollouts.jsonl": "the responses that the judge was calibrated on",
    "layer_sweep.json": "layers and coefficients, swept",
    "sweep_rollouts.jsonl": "the steered responses of the sweep",
    "sweep_scores.jsonl": "the judge’s scores of those",
    "dose_response.json": "the choice, confirmed on other questions",
    "dose_rollouts.jsonl": "the steered responses of the confirmation",
    "dose_scores.jsonl": "the judge’s scores of those",
    "response_means.npy": "mean activations, read while sampling",
    "row_means.npy": "mean activations of the kept responses",
    "example_tokens.jsonl": "every token’s projection, for a few of the kept responses",
}
"""The files of a run, and what they hold."""

MAKERS = {
    "trait.json": "persona-lens extract",
    "rollouts.jsonl": "persona-lens extract",
    "scores.jsonl": "persona-lens judge",
    "vectors.safetensors": "persona-lens extract",
    "summary.json": "persona-lens extract",
    "layer_sweep.json": "persona-lens select-layer",
    "dose_response.json": "persona-lens select-layer",
}
"""The files that a report is made of, and the commands that make them."""

PAGE = "report.html"

# Each of these alone is something to report.
_SHOWN = ("summary.json", "vectors.safetensors", "rollouts.jsonl", "layer_sweep.json", "dose_response.json")

Part = TypeVar("Part")


class JudgedPair(NamedTuple):
    """A positive and a negative rollout, and why the keep rule dropped them; None where it did not."""

    positive: ScoredRollout | None
    negative: ScoredRollout | None
    dropped: str | None


@dataclass(frozen=True)
class Run:
    """What a run's folder holds; None or empty for what it does not.

    Attributes:
        folder: Where it lies.
        trait: The trait's words.
        summary: The record of the extraction.
        report: How many pairs were kept, and by which rule.
        calibration: The likelihood-ratio judge's constants and diagnostics.
        vectors: The directions.
        scored: The judged rollouts.
        sweep: Layers and coefficients.
        confirmed: The choice on other questions.
        examples: A few kept responses token by token, each chat under its rollout's key.
        files: Name and bytes of each file.
    """

    folder: Path
    trait: Trait | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    report: KeepReport | None = None
    calibration: Calibration | None = None
    vectors: PersonaVectors | None = None
    scored: tuple[ScoredRollout, ...] = ()
    sweep: LayerSweep | None = None
    confirmed: DoseResponse | None = None
    examples: Monitoring | None = None
    files: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """The trait's name, from whatever has it."""
        return next(iter(self._names.values()), self.folder.name)

    @property
    def _names(self) -> dict[str, str]:
        """What each file says that the trait is called."""
        return {
            **({} if self.trait is None else {"trait.json": self.trait.name}),
            **({} if self.vectors is None else {"vectors.safetensors": self.vectors.trait}),
            **({} if self.sweep is None else {"layer_sweep.json": self.sweep.trait}),
            **({} if self.confirmed is None else {"dose_response.json": self.confirmed.trait}),
        }

    def __post_init__(self) -> None:
        names = list(self._names.items())
        for file, name in names[1:]:
            if name != names[0][1]:
                raise ValueError(
                    f"{self.folder}: {file} is about {name!r} and {names[0][0]} about {names[0][1]!r}: "
                    "a report is of one run, so move the files of the other one away."
                )

    @property
    def model_name(self) -> str | None:
        """The model that the vectors came from, None where that is unknown."""
        provenance = self.vectors and self.vectors.provenance
        return provenance.model.name if provenance else None

    @property
    def judge_name(self) -> str | None:
        """The judge of the rollouts, or of the sweep where there are none; None where nothing was judged."""
        if self.summary.get("judge"):
            return str(self.summary["judge"])
        return self.sweep.judge if self.sweep is not None else None

    @property
    def missing(self) -> dict[str, str]:
        """The files of a whole run that this folder lacks, and the command that makes each of them."""
        names = {name for name, _ in self.files}
        return {name: maker for name, maker in MAKERS.items() if name not in names}

    def choice(self, min_coherence: float) -> LayerChoice | None:
        """The recommended cell of the sweep, None where there is no sweep or no cell is coherent enough."""
        try:
            return None if self.sweep is None else self.sweep.best(min_coherence)
        except ValueError:
            return None

    @cached_property
    def pairs(self) -> tuple[JudgedPair, ...]:
        """Every pair of the judged rollouts under the run's own keep rule; none where there are no scores."""
        rule = self.report or KeepReport(0, 0)
        pairs = []
        for pair in pair_rollouts(self.scored):
            _, report = keep_pairs(
                [pair],
                trait=self.name,
                threshold=rule.threshold,
                min_coherence=rule.min_coherence,
                min_pairs=0,
                negative_below=rule.negative_below,
            )
            pairs.append(JudgedPair(*pair, next(iter(report.dropped), None)))
        return tuple(pairs)


def read_run(folder: str | Path) -> Run:
    """Everything that a run's folder holds, whatever it lacks.

    Raises FileNotFoundError where it is no folder or holds nothing of a run, ValueError that names the file where one
    is cut short or damaged, or is of another trait than the others.
    """
    folder = Path(folder)
    files = {name: folder / name for name in FILES if (folder / name).is_file()}
    if not any(name in files for name in _SHOWN):
        what = "holds no run" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"{folder} {what}: expected a folder with one of {', '.join(_SHOWN)}; make one with `persona-lens extract` "
            "or `persona-lens demo`."
        )
    summary = _read(files.get("summary.json"), _summary) or {}
    report = _read(files.get("summary.json"), lambda _: _keep_report(summary))
    return Run(
        folder,
        _read(files.get("trait.json"), load_trait),
        summary,
        report,
        _read(files.get("calibration.json"), lambda path: Calibration.from_dict(_json(path)["calibration"]))
        or _read(files.get("summary.json"), lambda _: _calibration(summary)),
        _read(files.get("vectors.safetensors"), PersonaVectors.load),
        _read(files.get("rollouts.jsonl") and files.get("scores.jsonl"), _scored) or (),
        _read(files.get("layer_sweep.json"), lambda path: LayerSweep.load(path.parent)),
        _read(files.get("dose_response.json"), lambda path: DoseResponse.load(path.parent)),
        _read(files.get("example_tokens.jsonl"), Monitoring.load),
        tuple(sorted((file.name, file.stat().st_size) for file in folder.iterdir() if _is_of_the_run(file))),
    )


def findings(run: Run, *, min_coherence: float = 75.0) -> dict[str, Any]:
    """The run's numbers as JSON: the recommended layer and coefficient, the pairs kept, the judge, what is missing.

    A part is None where the folder does not hold it, and `best` also where no cell has a mean coherence of at least
    `min_coherence`.
    """
    choice = run.choice(min_coherence)
    return {
        "trait": run.name,
        "model": run.model_name,
        "best": None if choice is None else asdict(choice),
        "unsteered": None if run.sweep is None else run.sweep.baseline.summary(),
        "confirmed": None if run.confirmed is None else str(run.confirmed),
        "best_layer_held_out": None if run.vectors is None else best_layer(run.vectors),
        "pairs": None if run.report is None else asdict(run.report),
        "judge": run.judge_name,
        "judge_diagnostics": None if run.calibration is None else dict(run.calibration.diagnostics),
        "missing": run.missing,
    }


def _is_of_the_run(file: Path) -> bool:
    return file.is_file() and file.name != PAGE  # an older page is no part of it


def _read(path: Path | None, read: Callable[[Path], Part]) -> Part | None:
    """What `read` makes of a file that is there; whatever is wrong with it becomes a sentence that names it."""
    if path is None:
        return None
    try:
        return read(path)
    except DAMAGE as error:
        message = str(error) if isinstance(error, ValueError) else repr(error)
        named = message if path.name in message else f"{path} is not whole ({message})"
        remedy = "finish the run with the command that began it, or take the file from a copy"
        raise ValueError(f"{named.rstrip('.')}; {remedy}.") from error


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _summary(path: Path) -> dict[str, Any]:
    summary = _json(path)
    if summary["format_version"] != 1:
        raise ValueError(f"format version {summary['format_version']}, this persona_lens reads 1")
    for name in ("plan", "pairs"):
        if not isinstance(summary[name], dict):
            raise ValueError(f"{name} should be a JSON object, got {type(summary[name]).__name__}")
    return summary


def _keep_report(summary: Mapping[str, Any]) -> KeepReport:
    report = KeepReport(**summary["pairs"])
    below = report.threshold if report.negative_below is None else report.negative_below
    for value in (report.pairs, report.kept, report.threshold, report.min_coherence, below, *report.dropped.values()):
        if not isinstance(value, int | float):
            raise ValueError(f"pairs should hold numbers, got {value!r}")
    return report


def _calibration(summary: Mapping[str, Any]) -> Calibration | None:
    calibration = summary.get("judge_calibration")
    return None if calibration is None else Calibration.from_dict(calibration)


def _scored(scores: Path) -> tuple[ScoredRollout, ...]:
    return tuple(read_scores(scores, read_rollouts(scores.with_name("rollouts.jsonl"))))
