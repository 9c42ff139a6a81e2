"""What commands read: a run's folder, vectors, and pairs of responses from files."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from persona_lens.cli.output import say

if TYPE_CHECKING:
    from persona_lens.chat.batches import Conversation
    from persona_lens.judges.scores import Judge
    from persona_lens.models.structure import Model
    from persona_lens.traits.trait import Trait
    from persona_lens.vectors.persona_vector import PersonaVector
    from persona_lens.vectors.persona_vectors import PersonaVectors


class KeepSettings(NamedTuple):
    """The keep rule's settings."""

    threshold: float
    min_coherence: float
    min_pairs: int
    negative_below: float | None = None


class Responses(NamedTuple):
    """The responses that extraction contrasts, and what sampled them where that is known."""

    positive: "list[Conversation]"
    negative: "list[Conversation]"
    sampled_by: str = ""


class ResponseFiles(NamedTuple):
    """Where responses are read from: two files of one side each, or rollouts with their scores."""

    positive: Path | None
    negative: Path | None
    rollouts: Path | None
    scores: Path | None

    def read(self, trait: str, keep: KeepSettings, limit: int | None, output: Path) -> Responses | None:
        """The responses, after the keep rule where they are judged; None where no file is named."""
        from persona_lens.storage.files import ensure_writable

        if not any(self):
            return None
        if output.suffix != ".safetensors":
            raise typer.BadParameter(f"--output must end in .safetensors, got {output}")
        ensure_writable(output)
        positive, negative, rollouts, scores = self
        if positive and negative and not (rollouts or scores):
            return _read_two_sides(trait, positive, negative, keep, limit)
        if rollouts and scores and not (positive or negative):
            return _read_judged(trait, rollouts, scores, keep, limit)
        raise typer.BadParameter("give --positive and --negative, or --rollouts and --scores, or none of the four")


def _read_two_sides(trait: str, positive: Path, negative: Path, keep: KeepSettings, limit: int | None) -> Responses:
    from persona_lens.interop.responses import pair_by_row, read_messages, read_reference_csv
    from persona_lens.judges.keep import keep_pairs

    if positive.suffix != negative.suffix or positive.suffix not in (".csv", ".jsonl"):
        raise typer.BadParameter("--positive and --negative must both be .csv or both .jsonl")
    if positive.suffix == ".jsonl":
        return Responses(read_messages(positive)[:limit], read_messages(negative)[:limit])
    pairs = pair_by_row(read_reference_csv(positive, trait), read_reference_csv(negative, trait))
    kept, report = keep_pairs(pairs, trait=trait, **keep._asdict())
    say(f"{report}.")
    return Responses([one.conversation for one, _ in kept[:limit]], [other.conversation for _, other in kept[:limit]])


def _read_judged(trait: str, rollouts: Path, scores: Path, keep: KeepSettings, limit: int | None) -> Responses:
    from persona_lens.judges.keep import keep_pairs, pair_rollouts
    from persona_lens.judges.scores import read_scores
    from persona_lens.rollouts.rows import read_rollouts

    pairs = pair_rollouts(read_scores(scores, read_rollouts(rollouts)))
    kept, report = keep_pairs(pairs, trait=trait, **keep._asdict())
    say(f"{report}.")
    return Responses(
        [one.rollout.conversation() for one, _ in kept[:limit]],
        [other.rollout.conversation() for _, other in kept[:limit]],
        "; ".join(dict.fromkeys(side.rollout.engine for pair in kept[:limit] for side in pair)),
    )


class Run(NamedTuple):
    """What a command reads of a run's folder, or of a vectors file, which is in no folder of its own."""

    vectors: "PersonaVectors"
    trait: "Trait"
    folder: Path | None
    max_new_tokens: int

    def likelihood_judge(self, model: "Model", folder: Path, seed: int) -> "Judge":
        """The likelihood judge with the run's calibration, or with a new one that is kept in the folder."""
        from persona_lens.extraction.pipeline import calibrated_judge

        source = self.folder or folder
        return calibrated_judge(model, self.trait, source, max_new_tokens=self.max_new_tokens, seed=seed)


def load_vectors(path: Path) -> "PersonaVectors":
    """The vectors of a run's folder, or of a vectors file."""
    from persona_lens.vectors.persona_vectors import PersonaVectors

    return PersonaVectors.load(path / "vectors.safetensors" if path.is_dir() else path)


def load_vector(path: Path, layer: int | None) -> "PersonaVector":
    """The vector at a layer, by default at the selected one."""
    vectors = load_vectors(path)
    return vectors.at(selected_layer(path, vectors) if layer is None else layer)


def load_run(path: Path, trait: str | None, max_new_tokens: int | None) -> Run:
    """A run's folder, or a vectors file; trait and length limit are the run's own where none is given."""
    from persona_lens.traits.trait import load_trait

    vectors = load_vectors(path)
    trait_file = path / "trait.json"
    if trait is None and not trait_file.exists():
        raise typer.BadParameter(f"--trait is needed: {path} is not a folder with the trait.json of a run")
    if max_new_tokens is None and (summary := path / "summary.json").exists():
        max_new_tokens = _length_limit(summary)
    return Run(vectors, load_trait(trait or str(trait_file)), path if path.is_dir() else None, max_new_tokens or 1000)


def _length_limit(summary: Path) -> int | None:
    """The length limit of the run that a summary describes."""
    from persona_lens.storage.files import DAMAGE, read_json

    try:
        limit = read_json(summary)["plan"]["max_new_tokens"]
        if limit is not None and not (isinstance(limit, int) and limit > 0):
            raise ValueError(f"its limit is {limit!r}")
    except DAMAGE as error:
        raise ValueError(f"{summary} is not a run's summary ({error}): pass --max-new-tokens.") from error
    return limit


def selected_layer(path: Path, vectors: "PersonaVectors") -> int:
    """The layer that the run's sweep recommends, or without a sweep that of the best held-out AUC."""
    from persona_lens.evaluation.layer_selection import LayerSweep
    from persona_lens.extraction.pipeline import best_layer

    if (path / "layer_sweep.json").exists():
        return LayerSweep.load(path).best().layer
    layer = best_layer(vectors)
    if layer is None:
        raise ValueError("No layer was selected, and the vectors have no statistics to choose by: pass --layer.")
    return layer
