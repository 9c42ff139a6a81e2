"""What is done with a screening: samples flagged by projection, by a judge or by either, and splits to train on.

The paper finds a projection filter and a judge complementary (arXiv:2507.21509, section K), and checks a ranking by
finetuning on its highest, random and lowest samples (section L).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_lens.judges.scores import Judge, score_rollouts
from persona_lens.monitoring.thresholds import Threshold
from persona_lens.rollouts.rows import Rollout
from persona_lens.screening.result import By, Screening
from persona_lens.screening.samples import Sample
from persona_lens.storage.files import ensure_writable, write_whole
from persona_lens.traits.trait import Trait, load_trait

if TYPE_CHECKING:
    import pandas

Thresholds = float | Threshold | Mapping[str, float | Threshold]
"""A threshold of the only vector, or one by the name of each vector that counts."""


def judge_samples(
    screening: Screening,
    trait: Trait | str,
    *,
    judge: Judge,
    rows: Sequence[int] | None = None,
    progress: bool = True,
) -> "pandas.Series":
    """A judge's trait scores, 0 to 100, of samples by their numbers (default: all); NaN where it gave none.

    They are kept in the run's folder, one file a judge, and an interrupted call goes on there.
    """
    import pandas

    trait = load_trait(trait) if isinstance(trait, str) else trait
    rows = screening.rows.index.tolist() if rows is None else list(rows)
    name = hashlib.sha256(judge.name(trait).encode()).hexdigest()[:8]
    rollouts = [_rollout(sample, trait) for sample in screening.samples(rows)]
    output = screening.folder / f"judge-{name}.jsonl"
    scored = score_rollouts(rollouts, trait, judge=judge, output_file=output, progress=progress)
    return pandas.Series([row.trait_score for row in scored], index=rows, name="judge", dtype=float)


def _rollout(sample: Sample, trait: Trait) -> Rollout:
    """A sample as judges take it, its row being its sample number, which makes its key its own."""
    system = [message["content"] for message in sample.messages if message["role"] == "system"]
    return Rollout(
        trait=trait.name,
        polarity="neutral",
        instruction=None,
        system_prompt="\n\n".join(system),
        question=sample.messages[-1]["content"],
        sample=sample.row,
        response=sample.response,
        response_tokens=None,
        finish_reason="stop",
        engine=f"data set {sample.dataset}",
        seed=0,
        condition=sample.dataset,
    )


def count_flagged(
    screening: Screening,
    thresholds: Thresholds,
    *,
    judged: "pandas.Series | None" = None,
    judge_threshold: float = 50.0,
    by: By | None = None,
) -> "pandas.DataFrame":
    """How many samples of each data set each filter takes out.

    `projection` counts those above a threshold on any of the vectors, `judge` those whose judge's score is at least
    `judge_threshold`, `union` and `both` those that either and both take; without a judge there is `projection` alone.
    A sample without a score is not taken, and is counted in `unscored`. Raises ValueError without a threshold.
    """
    import pandas

    if isinstance(thresholds, Mapping) and not thresholds:
        raise ValueError("There is no threshold to flag by: give one for a vector, such as that of benign chats.")
    datasets: Any = screening.rows["dataset"]
    flagged: Any = flag_samples(screening, thresholds, by=by)
    names = _by_vector(screening, thresholds)
    scored: Any = pandas.DataFrame({name: screening.score(name, by).notna() for name in names}).all(axis=1)
    table = []
    for dataset in screening.datasets:
        rows: Any = datasets.index[datasets == dataset]
        above = flagged[rows].to_numpy()
        counts = {"n": len(rows), "unscored": int((~scored[rows]).sum()), "projection": int(above.sum())}
        if judged is not None:
            taken = (judged.reindex(rows) >= judge_threshold).to_numpy()
            counts |= {
                "judge": int(taken.sum()),
                "union": int((taken | above).sum()),
                "both": int((taken & above).sum()),
            }
        table.append({"dataset": dataset, **counts})
    return pandas.DataFrame(table)


def flag_samples(screening: Screening, thresholds: Thresholds, *, by: By | None = None) -> "pandas.Series":
    """Whether each sample's score is above a threshold, on any of the vectors that have one."""
    import pandas

    flagged = pandas.Series(False, index=screening.rows.index, name="flagged")
    for name, threshold in _by_vector(screening, thresholds).items():
        value = threshold.value if isinstance(threshold, Threshold) else threshold
        flagged |= screening.score(name, by) > value  # a missing score exceeds nothing
    return flagged


def _by_vector(screening: Screening, thresholds: Thresholds) -> dict[str, float | Threshold]:
    if isinstance(thresholds, Mapping):
        return {screening.vector(name): threshold for name, threshold in thresholds.items()}
    return {screening.vector(): thresholds}


def write_split(
    screening: Screening,
    output_dir: str | os.PathLike[str],
    n: int,
    *,
    vector: str | None = None,
    by: By | None = None,
    rows: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Path]:
    """The `n` samples that score highest, `n` random ones and the `n` lowest, as training data: three JSON-lines files.

    Of each family of near-duplicates only the first counts. `rows` are the samples to choose among (default: all with
    a score). Rows have `messages`, `id`, `dataset`, `line` and `score`. Raises ValueError where there are fewer than
    2n samples, so that highest and lowest would overlap.
    """
    ranked: Any = screening.ranking(vector, by)
    ranked = ranked[ranked["family"] == ranked.index]
    if rows is not None:
        ranked = ranked[ranked.index.isin(list(rows))]
    if n < 1 or len(ranked) < 2 * n:
        raise ValueError(f"A split of {n} needs {2 * n} different samples with a score, got {len(ranked)}: lower n.")
    drawn = np.sort(np.random.default_rng(seed).choice(len(ranked), size=n, replace=False))
    folder = Path(output_dir)
    ensure_writable(folder / "high.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name, part in {"high": ranked.iloc[:n], "random": ranked.iloc[drawn], "low": ranked.iloc[-n:]}.items():
        lines = [
            {"messages": sample.conversation, "id": sample.id, "dataset": sample.dataset, "line": sample.line}
            | {"score": float(score)}
            for sample, score in zip(screening.samples(part.index.tolist()), part["score"], strict=True)
        ]
        paths[name] = folder / f"{name}.jsonl"
        write_whole(paths[name], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return paths
