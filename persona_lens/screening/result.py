"""What a screening says: scores of samples and of data sets, with intervals and controls, read from a run's folder.

A sample's score is its projection difference or one of two cheaper forms (arXiv:2507.21509, sections 6 and I): `proxy`
puts the last prompt token in the place of the base model's response, `response` leaves it out.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from persona_lens.monitoring.result import MonitoredVector
from persona_lens.monitoring.thresholds import Threshold, calibrate_threshold
from persona_lens.screening.batches import TEXTS, score_schema
from persona_lens.screening.plan import SUMMARY, ScreeningPlan, read_plan
from persona_lens.screening.samples import Sample
from persona_lens.statistics import Estimate, mean_estimate, spearman
from persona_lens.storage.files import write_json

if TYPE_CHECKING:
    import pandas

By = Literal["difference", "proxy", "response"]


@dataclass(frozen=True)
class Screening:
    """A finished screening; of its scores only the columns that are asked for are read.

    `plots.screening` draws it, and `pages.screening_html` makes a page of it.

    Attributes:
        folder: Where it stands.
        settings: What it was made with.
        counts: What became of every row that was read: `read`, `rejected` by kind, `left_out` by reason, `planned`,
            `cut`, `repeated` (None where near-duplicates were not detected).
        vectors: Names of the vectors, such as `evil@19`.
        datasets: Names of the data sets.
    """

    folder: Path
    settings: Mapping[str, Any] = field(repr=False)
    counts: Mapping[str, Any]
    vectors: tuple[str, ...]
    datasets: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Screening":
        """The result of a run's folder; raises FileNotFoundError where it holds none that is finished."""
        plan = read_plan(Path(folder))
        if plan.missing():
            raise FileNotFoundError(f"{folder} holds no finished screening: make one with `screen`.")
        datasets = tuple(dataset["name"] for dataset in plan.settings["datasets"])
        return cls(plan.folder, plan.settings, plan.counts, tuple(plan.settings["vectors"]), datasets)

    @cached_property
    def _plan(self) -> ScreeningPlan:
        return read_plan(self.folder)

    @cached_property
    def rows(self) -> "pandas.DataFrame":
        """One row a sample, in the order of the data, indexed by its number; read once, when it is first asked for.

        Columns: `dataset`, `id`, `line`, `unit`, `prompt_tokens`, `response_tokens`, `base_tokens`, `cut`, `group` (the
        same for one prompt), `family` (the first of near-duplicates), and for every vector its projections
        `evil@19.response`, `.prompt`, `.base`. Texts are read by `samples`.
        """
        return self._plan.scores([name for name in score_schema(self.vectors).names if name not in ("row", *TEXTS)])

    def _read(self, *columns: str) -> Any:
        """Columns of `rows`; the others are not read."""
        return self.rows[list(columns)] if "rows" in vars(self) else self._plan.scores(list(columns))

    @property
    def base(self) -> str:
        """Where base responses came from."""
        return self.settings["base"]

    @property
    def by(self) -> By:
        """The form of score that was asked for."""
        plain: dict[str, By] = {"proxy": "proxy", "none": "response"}
        return plain.get(self.base, "difference")

    def vector(self, name: str | None = None) -> str:
        """A vector's name: the only one where none is given, and a trait where it has one layer.

        Raises ValueError for a name that is not here, or none where there are several.
        """
        fitting = [full for full in self.vectors if name in (None, full, full.rpartition("@")[0])]
        if len(fitting) != 1:
            raise ValueError(f"Expected one of the vectors {', '.join(self.vectors)}, got {name!r}: name one of them.")
        return fitting[0]

    def score(self, vector: str | None = None, by: By | None = None) -> "pandas.Series":
        """Each sample's score, in the units of the residual stream; NaN where it has none.

        `by` is `difference` (response minus base response), `proxy` (response minus last prompt token) or `response`.
        Raises ValueError for a difference where no base responses were asked for.
        """
        return self._scored(vector, by)["score"]

    def _scored(self, vector: str | None, by: By | None, *columns: str) -> Any:
        """Each sample's `score`, beside other columns."""
        name, by = self.vector(vector), self.by if by is None else by
        if by not in get_args(By):
            raise ValueError(f"by is one of {', '.join(get_args(By))}, got {by!r}.")
        if by == "difference" and self.by != "difference":
            raise ValueError(f"There are no base responses (base={self.base!r}): screen again with base='generate'.")
        other = {"difference": f"{name}.base", "proxy": f"{name}.prompt", "response": None}[by]
        table = self._read(*columns, f"{name}.response", *([other] if other else []))
        score = table[f"{name}.response"]
        return table[list(columns)].assign(score=score - table[other] if other else score)

    def dataset_score(self, dataset: str, vector: str | None = None, by: By | None = None) -> Estimate:
        """A data set's score: the mean over its samples that have one, with its 95 % interval over prompts."""
        table = self._scored(vector, by, "dataset", "group")
        return _mean(table[table["dataset"] == dataset])

    def dataset_scores(self, by: By | None = None) -> "pandas.DataFrame":
        """Every data set on every vector: `n` samples with a score, `missing` without, `score`, `low`, `high`."""

        def numbers(table: Any) -> dict[str, Any]:
            mean = _mean(table)
            missing = len(table) - mean.n
            return {"n": mean.n, "missing": missing, "score": mean.value, "low": mean.low, "high": mean.high}

        return self._by_dataset(by, numbers)

    table = dataset_scores

    def controls(self, by: By | None = None) -> "pandas.DataFrame":
        """What else could make a data set's score: length, and rows that repeat others.

        For each data set and vector: Spearman's rank correlation of the samples' scores with their response tokens,
        `spearman_length`; the share of samples that nearly repeat an earlier one, `repeated` (NaN where near-duplicates
        were not detected); and the score without these, `score_without_repeats`, with its interval.
        """
        detected = self.counts["repeated"] is not None

        def numbers(table: Any) -> dict[str, Any]:
            scored, first = table[table["score"].notna()], table["family"] == table.index
            once = _mean(table[first]) if detected else Estimate(None, None, None, 0)
            lengths = scored["response_tokens"].to_numpy(dtype=float)
            return {
                "spearman_length": spearman(scored["score"].to_numpy(), lengths),
                "repeated": float(1 - first.mean()) if detected else float("nan"),
                "score_without_repeats": once.value,
                "low": once.low,
                "high": once.high,
            }

        return self._by_dataset(by, numbers, "family", "response_tokens")

    def _by_dataset(self, by: By | None, numbers: Callable[[Any], dict[str, Any]], *columns: str) -> "pandas.DataFrame":
        """`numbers` of every data set on every vector; the scores of one vector are in memory at a time."""
        import pandas

        found: dict[tuple[str, str], dict[str, Any]] = {}
        for vector in self.vectors:
            table = self._scored(vector, by, "dataset", "group", *columns)
            for dataset in self.datasets:
                found[dataset, vector] = numbers(table[table["dataset"] == dataset])
        pairs = [(dataset, vector) for dataset in self.datasets for vector in self.vectors]
        return pandas.DataFrame([{"dataset": pair[0], "vector": pair[1], **found[pair]} for pair in pairs])

    def ranking(self, vector: str | None = None, by: By | None = None) -> "pandas.DataFrame":
        """The samples that have a score, highest first; equal ones in the order of the data."""
        scored: Any = self.rows.assign(score=self.score(vector, by)).dropna(subset=["score"])
        return scored.sort_values("score", ascending=False, kind="stable")

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        """The texts of samples, by their numbers, with the base response where there is one."""
        if not len(rows):
            return []
        units = self._read("unit").loc[list(rows), "unit"].tolist()
        samples = {sample.row: sample for sample in self._plan.samples(list(rows), units)}
        return [samples[row] for row in rows]

    def threshold(
        self, vector: str | None = None, *, benign: str, percentile: float = 95.0, by: By | None = None, seed: int = 0
    ) -> Threshold:
        """The score that only the rest of the hundred of a benign data set's samples exceed.

        The paper takes the 95th percentile of 20,000 samples of benign chats (section K). Raises ValueError for a data
        set that is not here or too small.
        """
        name, by = self.vector(vector), self.by if by is None else by
        if benign not in self.datasets:
            raise ValueError(f"Expected one of the data sets {', '.join(self.datasets)}, got {benign!r}.")
        table = self._scored(name, by, "dataset", "group")
        scored = table[(table["dataset"] == benign) & table["score"].notna()]
        trait, _, layer = name.rpartition("@")
        fingerprint = self.settings["fingerprints"][self.vectors.index(name)]
        return calibrate_threshold(
            scored["score"].to_numpy(),
            vector=MonitoredVector(trait, int(layer), fingerprint),
            percentile=percentile,
            of=by,
            chats=scored["group"].tolist(),
            source=benign,
            seed=seed,
        )


def _mean(table: Any) -> Estimate:
    """The mean of `score`, with its interval over prompts."""
    return mean_estimate(table["score"].to_numpy(), table["group"].to_numpy())


def write_summary(screening: Screening) -> None:
    """Write what a program wants to know of a run beside its scores."""
    tables = {"scores": screening.dataset_scores(), "controls": screening.controls()}
    records = {name: json.loads(table.to_json(orient="records") or "[]") for name, table in tables.items()}
    write_json(screening.folder / SUMMARY, {**screening.settings, "counts": screening.counts, **records})
