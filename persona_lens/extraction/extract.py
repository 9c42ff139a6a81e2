"""From contrasting responses to persona vectors: the difference in means at every layer, with its statistics.

v_l = mean over positive responses of a_l - mean over negative responses of a_l, where a_l is the mean residual stream
over a response's tokens at the output of block l (arXiv:2507.21509, section 2.2).
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from persona_lens.activations.means import NotFinite, refuse_not_finite, stream_means
from persona_lens.chat.batches import ChatTokens, Conversation, UnclosedBlock, fit_context, template_hash
from persona_lens.chat.templates import date_told, fixed_date
from persona_lens.generation.capture import CapturedMeans
from persona_lens.models.structure import Model
from persona_lens.storage.files import ensure_writable, zeros_on_disk
from persona_lens.traits.trait import Trait
from persona_lens.vectors.direction_statistics import METRICS, Design, LayerStatistics, direction_metrics
from persona_lens.vectors.persona_vector import Position
from persona_lens.vectors.persona_vectors import PersonaVectors
from persona_lens.vectors.provenance import Provenance


@fixed_date()
def extract_from_responses(
    model: Model,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    *,
    trait: Trait | str,
    position: Position = "response_mean",
    after: str | None = None,
    unclosed: Literal["error", "drop"] = "error",
    too_long: Literal["error", "truncate"] = "error",
    token_budget: int | None = None,
    spool_file: str | Path | None = None,
    captured: CapturedMeans | None = None,
    n_resamples: int = 200,
    n_placebo: int = 100,
    sampled_by: str = "",
    seed: int = 0,
    progress: bool = True,
) -> PersonaVectors:
    """Persona vectors from responses that show the trait and responses that do not.

    Every row is averaged; apply the keep rule before, where you want it.

    Args:
        model: Reads the responses, in either class.
        positive: Responses that show the trait.
        negative: Responses that do not. Empty responses of either side are left out and counted
            (`counts["positive_empty"]`), unless `position` reads the prompt: then plain texts may be compared, as
            `Conversation(text, "")`.
        trait: The trait or its name.
        position: The tokens that are averaged.
        after: Average only what follows this text, such as `"</think>"`.
        unclosed: Whether a response that never says `after` is an error, or dropped and counted
            (`counts["positive_unclosed"]`).
        too_long: Whether a row longer than the context is an error, or truncated and counted.
        token_budget: Padded tokens of a batch.
        spool_file: A `.npy` file for the row means [row, stream, d_model], by default a temporary one: memory does not
            grow with the rows.
        captured: Means kept while the responses were sampled; only rows without one are run.
        n_resamples: Bootstrap resamples of questions.
        n_placebo: Directions from shuffled sides.
        sampled_by: What made the responses, for the vectors' provenance.
        seed: Seed of the statistics.
        progress: Whether to show progress bars.

    Raises ValueError where a side is left without rows, a row is too long, or activations are not finite.
    Source: arXiv:2507.21509, section 2.2.
    """
    trait = trait.name if isinstance(trait, Trait) else trait
    counts: dict[str, int] = {}
    rows: list[tuple[Conversation, ChatTokens]] = []
    for side, responses in (("positive", positive), ("negative", negative)):
        # An empty response has no mean, but its prompt does.
        spoken = [row for row in responses if position != "response_mean" or not row.is_empty]
        tokenized = _tokenize(model.tokenizer, side, spoken, after, unclosed)
        n_empty, n_unclosed = len(responses) - len(spoken), len(spoken) - len(tokenized)
        if not tokenized:
            raise ValueError(
                f"{trait}: no {side} responses to average ({len(responses)} given, {n_empty} empty, {n_unclosed} never "
                "closed)."
            )
        counts |= {side: len(tokenized), f"{side}_empty": n_empty, f"{side}_unclosed": n_unclosed}
        rows += tokenized
    conversations, tokens = zip(*rows, strict=True)
    tokens, counts["truncated"] = fit_context(tokens, int(model.cfg.n_ctx), too_long=too_long)
    if position == "response_mean" and (n_idle := sum(row.n_averaged < 1 for row in tokens)):
        raise ValueError(f"{trait}: {n_idle} responses have no tokens left to average (after={after!r}): drop them.")
    design = Design(
        tuple(row.question or str(row.prompt) for row in conversations),
        tuple(row.instruction for row in conversations),
        tuple(index < counts["positive"] for index in range(len(rows))),
    )
    settings = {"position": position, "after": after, "unclosed": unclosed, "too_long": too_long, "seed": seed}
    settings |= {"sampled_by": sampled_by} if sampled_by else {}
    if today := date_told(model.tokenizer):
        settings["template_date"] = ", ".join(sorted({row.date or today for row in conversations}))
    with tempfile.TemporaryDirectory(prefix="persona_lens-") as scratch:
        path = Path(scratch) / "row_means.npy" if spool_file is None else Path(spool_file)
        captured = captured if position == "response_mean" else None
        means, norms = _spool_means(model, tokens, path, position, token_budget, captured, progress)
        directions = _difference_in_means(means, np.array(design.positive))
        statistics = _statistics(means, design, n_resamples, n_placebo, seed, progress)
        del means  # Windows removes no file that is mapped
    return PersonaVectors(
        trait=trait,
        directions=directions[1:],
        embedding=directions[0],
        residual_norm=torch.from_numpy(norms[1:]).float(),
        position=position,
        counts=counts,
        provenance=Provenance.of(model, settings=settings, template_hash=template_hash(model.tokenizer)),
        statistics=statistics,
    )


def _tokenize(
    tokenizer: Any, side: str, responses: Sequence[Conversation], after: str | None, unclosed: str
) -> list[tuple[Conversation, ChatTokens]]:
    """The rows with their token ids, without those that never close a block."""
    rows: list[tuple[Conversation, ChatTokens]] = []
    for number, row in enumerate(responses, start=1):
        try:
            rows.append((row, row.tokenize(tokenizer, after=after)))
        except UnclosedBlock as error:
            if unclosed == "error":
                raise ValueError(f"{error} With unclosed='drop' such rows are left out and counted.") from error
        except ValueError as error:
            raise ValueError(f"{side} row {number}: {error}") from error
    return rows


def refuse_other_means(path: Path, model: Model) -> None:
    """Raise ValueError, having changed nothing, where a file that is not empty holds no row means of the model.

    Raises OSError in one sentence where it could not be written.
    """
    ensure_writable(path)
    if not path.exists() or not path.stat().st_size:
        return
    shape = (int(model.cfg.n_layers) + 1, int(model.cfg.d_model))
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
        is_ours = rows.dtype == np.float32 and rows.shape[1:] == shape
    except (ValueError, EOFError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{path} holds something else: expected an array of float32 [row, {shape[0]}, {shape[1]}], the row means "
            "of an earlier extraction, which would be replaced. Choose another output, or move that file away."
        )


def _spool_means(
    model: Model,
    tokens: Sequence[ChatTokens],
    path: Path,
    position: Position,
    token_budget: int | None,
    captured: CapturedMeans | None,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Row means [row stream d_model] in a memory-mapped file, and the mean residual norm [stream]."""
    refuse_other_means(path, model)
    shape = (len(tokens), int(model.cfg.n_layers) + 1, int(model.cfg.d_model))
    rows, norms = zeros_on_disk(path, np.float32, shape), np.zeros(shape[1])
    to_run: list[int] = []
    for index, place in enumerate([None] * len(tokens) if captured is None else captured.places(tokens)):
        if captured is None or place is None:
            to_run.append(index)
            continue
        kept = captured.read(place)
        refuse_not_finite(kept.mean[None], [index])
        rows[index] = kept.mean.numpy()
        norms += kept.norm.double().numpy() / len(tokens)
    n_done = len(tokens) - len(to_run)
    with tqdm(total=len(tokens), initial=n_done, desc="extract", unit="row", disable=not progress) as bar:
        batches = stream_means(model, [tokens[index] for index in to_run], position=position, token_budget=token_budget)
        try:
            for batch in batches:
                rows[[to_run[place] for place in batch.rows]] = batch.means.numpy()
                norms += batch.norms.double().sum(dim=0).numpy() / len(tokens)
                bar.update(len(batch.rows))
        except NotFinite as error:
            raise NotFinite(to_run[error.row], error.layer) from error
    rows.flush()
    return rows, norms


def _difference_in_means(rows: np.ndarray, positive: np.ndarray) -> torch.Tensor:
    """[stream d_model]; layer by layer in float64, since float32 sums of many rows lose what the sides differ by."""
    difference = np.stack(
        [
            rows[positive, stream].mean(axis=0, dtype=np.float64)
            - rows[~positive, stream].mean(axis=0, dtype=np.float64)
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
    by_layer = {
        name: torch.tensor([metrics[name] for metrics in by_stream[1:]], dtype=torch.float32) for name in METRICS
    }
    return LayerStatistics(
        **by_layer, n_questions=design.n_questions, n_rows=len(rows), seed=seed, embedding=by_stream[0]
    )
