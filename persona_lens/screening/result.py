"""What a screening says: scores of samples and of data sets, with intervals and controls, read from a run's folder.

A sample's score is its projection difference or one of two cheaper forms (arXiv:2507.21509, sections 6 and I): `proxy`
puts the last prompt token in the place of the base model's response, `response` leaves it out.
Knows nothing about models.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from persona_lens.monitoring.result import MonitoredVector
from persona_lens.monitoring.thresholds import Threshold, calibrate_threshold
from persona_lens.screening.plan import SETTINGS, read_plan
from persona_lens.screening.samples import Sample
from persona_lens.screening.scores import TABLE
from persona_lens.statistics import Estimate, mean_estimate, spearman
from persona_lens.storage.files import read_json, write_json

if TYPE_CHECKING:
    import pandas

By = Literal["difference", "proxy", "response"]
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Screening:
    """A finished screening.

    Attributes:
        folder: Where it stands.
        settings: What it was made with.
        counts: What became of every row that was read: `read`, `rejected` by kind, `left_out` by reason, `planned`,
            `cut`, `repeated`.
        vectors: Names of the vectors, such as `evil@19`.
        datasets: Names of the data sets.
        rows: One row a sample, in the order of the data, indexed by its number: `dataset`, `id`, `line`, `unit`,
            `prompt_tokens`, `response_tokens` and `base_tokens`, `cut`, `group` (the same for one prompt), `family`
            (the first of near-duplicates), and for every vector its projections `evil@19.response`, `.prompt`, `.base`.
    """

    folder: Path
    settings: Mapping[str, Any] = field(repr=False)
    counts: Mapping[str, Any]
    vectors: tuple[str, ...]
    datasets: tuple[str, ...]
    rows: "pandas.DataFrame" = field(repr=False)

    @property
    def _rows(self) -> Any:
        # pandas' stubs take a column for whatever a column may be.
        return self.rows

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
        fitting = [each for each in self.vectors if name in (None, each, each.rpartition("@")[0])]
        if len(fitting) != 1:
            raise ValueError(f"Expected one of the vectors {', '.join(self.vectors)}, got {name!r}: name one of them.")
        return fitting[0]

    def score(self, vector: str | None = None, by: By | None = None) -> "pandas.Series":
        """Each sample's score, in the units of the residual stream; NaN where it has none.

        `by` is `difference` (response minus base response), `proxy` (response minus last prompt token) or `response`.
        Raises ValueError for a difference where no base responses were asked for.
        """
        return self._score(vector, by)

    def _score(self, vector: str | None, by: By | None) -> Any:
        name, by = self.vector(vector), self.by if by is None else by
        if by not in get_args(By):
            raise ValueError(f"by is one of {', '.join(get_args(By))}, got {by!r}.")
        if by == "difference" and self.by != "difference":
            raise ValueError(f"There are no base responses (base={self.base!r}): screen again with base='generate'.")
        response = self._rows[f"{name}.response"]
        if by == "response":
            return response.rename("score")
        other = "base" if by == "difference" else "prompt"
        return (response - self._rows[f"{name}.{other}"]).rename("score")

    def dataset_score(self, dataset: str, vector: str | None = None, by: By | None = None) -> Estimate:
        """A data set's score: the mean over its samples that have one, with its 95 % interval over prompts."""
        chosen = self._rows["dataset"] == dataset
        return mean_estimate(self._score(vector, by)[chosen].to_numpy(), self._rows["group"][chosen].to_numpy())

    def dataset_scores(self, by: By | None = None) -> "pandas.DataFrame":
        """Every data set on every vector: `n` samples with a score, `missing` without, `score`, `low`, `high`."""
        import pandas

        found = []
        for dataset in self.datasets:
            size = int((self._rows["dataset"] == dataset).sum())
            for vector in self.vectors:
                estimate = self.dataset_score(dataset, vector, by)
                numbers = {"score": estimate.value, "low": estimate.low, "high": estimate.high}
                row = {"dataset": dataset, "vector": vector, "n": estimate.n, "missing": size - estimate.n}
                found.append({**row, **numbers})
        return pandas.DataFrame(found)

    def ranking(self, vector: str | None = None, by: By | None = None) -> "pandas.DataFrame":
        """The samples that have a score, highest first; equal ones in the order of the data."""
        scored = self._rows.assign(score=self.score(vector, by)).dropna(subset=["score"])
        return scored.sort_values("score", ascending=False, kind="stable")

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        """The texts of samples, by their numbers, with the base response where there is one."""
        plan, texts = read_plan(self.folder), self._base_responses(rows)
        found: dict[int, Sample] = {}
        for unit in sorted(set(self._rows.loc[list(rows), "unit"].tolist())):
            for row in plan.unit(int(unit)):
                text = json.loads(row.text)
                base = text.get("base_response") or texts.get(row.row)
                messages = tuple(text["messages"])
                found[row.row] = Sample(row.row, row.dataset, row.id, row.line, messages, text["response"], base)
        return [found[row] for row in rows]

    def _base_responses(self, rows: Sequence[int]) -> dict[int, str]:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(
            self.folder / TABLE, columns=["row", "base_response"], filters=[("row", "in", list(map(int, rows)))]
        )
        return {row["row"]: row["base_response"] for row in table.to_pylist() if row["base_response"]}

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
        scores = self._score(name, by)[self._rows["dataset"] == benign].dropna()
        trait, _, layer = name.rpartition("@")
        return calibrate_threshold(
            scores.to_numpy(),
            vector=MonitoredVector(trait, int(layer), self.settings["fingerprints"][self.vectors.index(name)]),
            percentile=percentile,
            of=by,
            chats=self._rows["group"][scores.index].tolist(),
            source=benign,
            seed=seed,
        )

    def controls(self, by: By | None = None) -> "pandas.DataFrame":
        """What else could make a data set's score: length, and rows that repeat others.

        For each data set and vector: Spearman's rank correlation of the samples' scores with their response tokens,
        `spearman_length`; the share of samples that nearly repeat an earlier one, `repeated`; and the score without
        these, `score_without_repeats`, with its interval.
        """
        import pandas

        found = []
        for dataset in self.datasets:
            rows = self._rows[self._rows["dataset"] == dataset]
            first = rows["family"] == rows.index
            for vector in self.vectors:
                scores = self._score(vector, by)[rows.index]
                known = scores.notna()
                once = mean_estimate(scores[first].to_numpy(), rows["group"][first].to_numpy())
                found.append(
                    {
                        "dataset": dataset,
                        "vector": vector,
                        "spearman_length": spearman(
                            scores[known].to_numpy(), rows["response_tokens"][known].to_numpy(dtype=float)
                        ),
                        "repeated": float(1 - first.mean()),
                        "score_without_repeats": once.value,
                        "low": once.low,
                        "high": once.high,
                    }
                )
        return pandas.DataFrame(found)


def write_summary(folder: Path) -> None:
    """Write what a program wants to know of a run beside its table."""
    found = read_screening(folder)
    table = json.loads(found.dataset_scores().to_json(orient="records") or "[]")
    controls = json.loads(found.controls().to_json(orient="records") or "[]")
    write_json(folder / SUMMARY, {**found.settings, "counts": found.counts, "scores": table, "controls": controls})


def read_screening(folder: str | os.PathLike[str]) -> Screening:
    """The result of a run's folder; raises FileNotFoundError where it holds none that is finished."""
    import pandas
    import pyarrow.parquet

    folder = Path(folder)
    if not (folder / TABLE).exists():
        raise FileNotFoundError(f"{folder} holds no finished screening: make one with `screen`.")
    settings = read_json(folder / SETTINGS)
    schema = pyarrow.parquet.read_schema(folder / TABLE)
    # Base responses are the bulk of it, and read when they are wanted.
    wanted = [name for name in schema.names if name != "base_response"]
    rows = pandas.read_parquet(folder / TABLE, columns=wanted).set_index("row")
    names = tuple(each["name"] for each in settings["datasets"])
    return Screening(folder, settings, read_plan(folder).counts, tuple(settings["vectors"]), names, rows)
