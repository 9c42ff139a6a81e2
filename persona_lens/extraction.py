"""From contrasting responses to persona vectors: the difference in means at every layer, and how good it is.

v_l = mean over positive responses of a_l - mean over negative responses of a_l, where a_l is the mean residual stream
over a response's tokens at the output of block l (arXiv:2507.21509, section 2.2).
Knows nothing about who made or judged the responses.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from persona_lens.activations import stream_means
from persona_lens.chat import Conversation, fit_context, template_hash
from persona_lens.direction_statistics import METRICS, Design, direction_metrics
from persona_lens.models import Model
from persona_lens.records import ensure_writable
from persona_lens.vectors import LayerStatistics, PersonaVectors, Position, Provenance


def extract_from_responses(
    model: Model,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    *,
    trait: str,
    position: Position = "response_mean",
    after: str | None = None,
    too_long: Literal["error", "truncate"] = "error",
    token_budget: int = 4096,
    spool: str | Path | None = None,
    n_resamples: int = 200,
    n_placebo: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> PersonaVectors:
    """Persona vectors from responses that show the trait and responses that do not.

    All positive rows and all negative rows are averaged: the keep rule, where it applies, comes before. Empty responses
    are never averaged and are counted (`counts["positive_empty"]`). With `after="</think>"` only what follows that text
    is averaged. Row means [row, stream, d_model] are spooled to `spool` (a `.npy` file), so memory stays flat in the
    number of rows; without it a temporary file serves. Statistics resample questions (`n_resamples`, `n_placebo`).

    Raises ValueError where a side is left without rows, a row is too long (unless `too_long="truncate"`, which is
    counted), or activations are not finite. Source: arXiv:2507.21509, section 2.2.
    """
    kept = {"positive": [row for row in positive if not row.is_empty]}
    kept["negative"] = [row for row in negative if not row.is_empty]
    for side, given in (("positive", positive), ("negative", negative)):
        if not kept[side]:
            raise ValueError(
                f"{trait}: no {side} responses to average ({len(given)} given, {len(given) - len(kept[side])} empty)."
            )
    conversations = [*kept["positive"], *kept["negative"]]
    tokens = [row.tokenize(model.tokenizer, after=after) for row in conversations]
    tokens, truncated = fit_context(tokens, int(model.cfg.n_ctx), too_long=too_long)
    if position == "response_mean" and (idle := [place for place, row in enumerate(tokens) if row.n_averaged < 1]):
        raise ValueError(f"{trait}: {len(idle)} responses have no tokens left to average (after={after!r}): drop them.")
    design = Design(
        tuple(row.question or str(row.prompt) for row in conversations),
        tuple(row.instruction for row in conversations),
        tuple([True] * len(kept["positive"]) + [False] * len(kept["negative"])),
    )
    counts = {
        "positive": len(kept["positive"]),
        "negative": len(kept["negative"]),
        "positive_empty": len(positive) - len(kept["positive"]),
        "negative_empty": len(negative) - len(kept["negative"]),
        "truncated": truncated,
    }
    settings = {"position": position, "after": after, "too_long": too_long, "seed": seed}
    with tempfile.TemporaryDirectory(prefix="persona_lens-") as scratch:
        path = Path(scratch) / "row_means.npy" if spool is None else Path(spool)
        ensure_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(tokens), int(model.cfg.n_layers) + 1, int(model.cfg.d_model))
        rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        norms = np.zeros(shape[1], dtype=np.float64)
        with tqdm(total=len(tokens), desc="extract", unit="row", disable=not progress) as bar:
            for batch in stream_means(model, tokens, position=position, token_budget=token_budget):
                rows[batch.rows] = batch.means.numpy()
                norms += batch.norms.double().sum(dim=0).numpy()
                bar.update(len(batch.rows))
        directions = _difference_in_means(rows, np.array(design.positive))
        statistics = _statistics(rows, design, n_resamples, n_placebo, seed, progress)
        rows.flush()
        del rows
    return PersonaVectors(
        trait=trait,
        directions=directions[1:],
        embedding=directions[0],
        residual_norm=torch.from_numpy(norms[1:] / len(tokens)).float(),
        position=position,
        counts=counts,
        provenance=Provenance.of(model, settings=settings, template_hash=template_hash(model.tokenizer)),
        statistics=statistics,
    )


def _difference_in_means(rows: np.ndarray, positive: np.ndarray) -> torch.Tensor:
    """[stream d_model]; layer by layer in float64, since float32 sums of many rows lose what the sides differ by."""
    difference = np.stack(
        [
            rows[positive, stream].mean(axis=0, dtype=np.float64) - rows[~positive, stream].mean(axis=0, dtype=np.float64)
            for stream in range(rows.shape[1])
        ]
    )
    return torch.from_numpy(difference).float()


def _statistics(
    rows: np.ndarray, design: Design, n_resamples: int, n_placebo: int, seed: int, progress: bool
) -> LayerStatistics:
    by_stream = [
        direction_metrics(rows[:, stream], design, n_resamples=n_resamples, n_placebo=n_placebo, seed=seed)
        for stream in tqdm(range(rows.shape[1]), desc="statistics", unit="layer", disable=not progress)
    ]
    by_layer = {name: torch.tensor([metrics[name] for metrics in by_stream[1:]]).float() for name in METRICS}
    return LayerStatistics(
        **by_layer, n_questions=design.n_questions, n_rows=len(rows), seed=seed, embedding=by_stream[0]
    )
