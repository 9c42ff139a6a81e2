"""What the commands read: models, and pairs of responses from files.

Knows nothing about what is done with them.
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from persona_lens.cli.output import say

if TYPE_CHECKING:
    from persona_lens.chat.batches import Conversation
    from persona_lens.models.structure import Model
    from persona_lens.traits.trait import Trait
    from persona_lens.vectors.persona_vectors import PersonaVectors

# One, whatever the machine: the number of threads decides how sums round, and so which text a seed gives. A number that
# followed the cores or the load would give another text elsewhere or tomorrow; and threads that share a busy core make
# every kernel wait, so that one can be several times as fast as two.
DEFAULT_THREADS = 1


class ModelClass(StrEnum):
    """TransformerLens's two model classes."""

    BRIDGE = "TransformerBridge"
    HOOKED = "HookedTransformer"


class KeepChoices(NamedTuple):
    """The keep rule's settings."""

    threshold: float
    min_coherence: float
    min_pairs: int
    negative_below: float | None = None


class Sides(NamedTuple):
    """What extraction contrasts, and what sampled it where that is known."""

    positive: "list[Conversation]"
    negative: "list[Conversation]"
    sampled_by: str = ""


def read_sides(
    trait: str,
    positive: Path | None,
    negative: Path | None,
    rollouts: Path | None,
    scores: Path | None,
    choices: KeepChoices,
    limit: int | None,
    output: Path,
) -> Sides | None:
    """The responses that the options name, after the keep rule where they are judged; None where they name none."""
    from persona_lens.storage.files import ensure_writable

    paths = (positive, negative, rollouts, scores)
    if not any(paths):
        return None
    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"--output must end in .safetensors, got {output}")
    ensure_writable(output)
    if positive and negative and not (rollouts or scores):
        return _given(trait, positive, negative, choices, limit)
    if rollouts and scores and not (positive or negative):
        return _judged(trait, rollouts, scores, choices, limit)
    raise typer.BadParameter("give --positive and --negative, or --rollouts and --scores, or none of the four")


def _given(trait: str, positive: Path, negative: Path, choices: KeepChoices, limit: int | None) -> Sides:
    from persona_lens.extraction.responses import pair_by_row, read_messages, read_reference_csv
    from persona_lens.judges.keep import keep_pairs

    if positive.suffix != negative.suffix or positive.suffix not in (".csv", ".jsonl"):
        raise typer.BadParameter("--positive and --negative must both be .csv or both .jsonl")
    if positive.suffix == ".jsonl":
        return Sides(read_messages(positive)[:limit], read_messages(negative)[:limit])
    pairs = pair_by_row(read_reference_csv(positive, trait), read_reference_csv(negative, trait))
    kept, report = keep_pairs(pairs, trait=trait, **choices._asdict())
    say(f"{report}.")
    return Sides([one.conversation for one, _ in kept[:limit]], [other.conversation for _, other in kept[:limit]])


def _judged(trait: str, rollouts: Path, scores: Path, choices: KeepChoices, limit: int | None) -> Sides:
    from persona_lens.judges.keep import keep_pairs, pair_rollouts
    from persona_lens.judges.scores import read_scores
    from persona_lens.rollouts.rows import read_rollouts

    pairs = pair_rollouts(read_scores(scores, read_rollouts(rollouts)))
    kept, report = keep_pairs(pairs, trait=trait, **choices._asdict())
    say(f"{report}.")
    return Sides(
        [one.rollout.conversation() for one, _ in kept[:limit]],
        [other.rollout.conversation() for _, other in kept[:limit]],
        "; ".join(dict.fromkeys(side.rollout.engine for pair in kept[:limit] for side in pair)),
    )


class Run(NamedTuple):
    """What a command reads of a run."""

    vectors: "PersonaVectors"
    trait: "Trait"
    folder: Path | None
    max_new_tokens: int


def load_vectors(path: Path) -> "PersonaVectors":
    """The vectors of a run's folder, or of a vectors file."""
    from persona_lens.vectors.persona_vectors import PersonaVectors

    return PersonaVectors.load(path / "vectors.safetensors" if path.is_dir() else path)


def load_run(path: Path, trait: str | None, max_new_tokens: int | None) -> Run:
    """A run's folder, or a vectors file; the trait and the length limit are the run's own where none is given."""
    from persona_lens.traits.trait import load_trait

    vectors = load_vectors(path)
    own = path / "trait.json"
    if trait is None and not own.exists():
        raise typer.BadParameter(f"--trait is needed: {path} is not a folder with the trait.json of a run")
    if max_new_tokens is None and (summary := path / "summary.json").exists():
        max_new_tokens = _own_limit(summary)
    return Run(vectors, load_trait(trait or str(own)), path if path.is_dir() else None, max_new_tokens or 1000)


def _own_limit(summary: Path) -> int | None:
    """The length limit of the run that a summary is of."""
    from persona_lens.storage.files import DAMAGE, read_json

    try:
        found = read_json(summary)["plan"]["max_new_tokens"]
        if found is not None and not (isinstance(found, int) and found > 0):
            raise ValueError(f"its limit is {found!r}")
    except DAMAGE as error:
        raise ValueError(f"{summary} is not a run's summary ({error}): pass --max-new-tokens.") from error
    return found


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


def checked_position(text: str) -> Any:
    """A position's name, or bad usage."""
    allowed = ("response_mean", "prompt_mean", "prompt_last")
    if text not in allowed:
        raise typer.BadParameter(f"--position is one of {', '.join(allowed)}; got {text}")
    return text


def load(name: str, model_class: ModelClass, threads: int | None) -> "Model":
    """Load the model of a command, without progress bars, to run on `threads` CPU threads (`set_threads`)."""
    import torch
    from transformers.utils import logging

    from persona_lens.models.loading import load_model

    set_threads(threads)
    logging.disable_progress_bar()
    used = torch.get_num_threads()
    say(f"Loading {name} as {model_class.value}, on {used} CPU thread{'s' * (used > 1)} ...")
    return load_model(name, model_class=model_class.value)


def set_threads(threads: int | None) -> None:
    """Run on `threads` CPU threads, by default on `DEFAULT_THREADS`."""
    import torch

    torch.set_num_threads(threads or DEFAULT_THREADS)
