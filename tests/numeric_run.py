"""A whole run on a tiny model, as fingerprints of what it made; as a module it prints those of a process of its own."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests import tiny


class BySide:
    """Finds the trait wherever it was asked for, since a random model shows none."""

    batch_size = 100

    def name(self, trait: Any) -> str:
        return "by side"

    def score(self, trait: Any, rollouts: Any, *, progress: bool = False) -> Any:
        from persona_lens.judges.scores import Score

        return [Score(90.0 if rollout.polarity == "positive" else 10.0, 100.0) for rollout in rollouts]


def run(folder: Path) -> dict[str, str]:
    """Rollouts, their coherence by the model itself, and their vectors; raises AssertionError where a hook is left."""
    from persona_lens import LikelihoodRatioJudge, extract_persona_vectors, load_trait
    from persona_lens.judges.scores import CombinedJudge
    from persona_lens.models.loading import bridge_from_transformers

    tokenizer = tiny.tokenizer(folder / "tokenizer")
    model = bridge_from_transformers(tiny.llama(tokenizer).float(), tokenizer)
    before = tiny.hook_counts(model)
    trait = load_trait("evil")
    trait = replace(trait, instructions=trait.instructions[:2])
    vectors = extract_persona_vectors(
        model,
        trait,
        judge=CombinedJudge(BySide(), LikelihoodRatioJudge(model, calibration_questions=2, neutral_samples=2)),
        questions=trait.extraction_questions[:2],
        per_question=1,
        max_new_tokens=4,
        threshold=50.0,
        min_coherence=0.0,
        min_pairs=1,
        output_dir=folder / "run",
        seed=3,
        progress=False,
    )
    assert tiny.hook_counts(model) == before
    assert bool(vectors.directions.any())
    return {
        "rollouts": _fingerprint((folder / "run" / "rollouts.jsonl").read_bytes()),
        "scores": _fingerprint((folder / "run" / "scores.jsonl").read_bytes()),
        "vectors": _fingerprint(vectors.directions.numpy().tobytes()),
    }


def _fingerprint(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*run(Path(sys.argv[1])).values())
