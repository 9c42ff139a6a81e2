"""Every stage on a tiny model: what it does is what was planned, and what it leaves is a whole report."""

import json
import shutil

import pytest

from tests.replication_cases import Counted, exact, made_up_moods, tiny_preset


@pytest.fixture(scope="module")
def babble():
    """Every response has its full length, as a plan counts it; what a random model says passes for coherent.

    The moods are made up, and so are the multiple-choice questions: real ones exceed the tiny context.
    """
    from persona_lens.capability import Question

    asked = tuple(Question(f"Is {number}?", ("Yes", "No"), 0) for number in range(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("persona_lens.generation.stop_tokens", lambda _: frozenset())
        patch.setattr("persona_lens.judges.likelihood_ratio.MIN_COHERENCE", 0.0)
        patch.setattr("persona_lens.experiments.finetuning_materials.load_moods", made_up_moods)
        patch.setattr("persona_lens.experiments.moods._sounds", dict)
        patch.setattr("persona_lens.experiments.finetuning_materials._whole_sentences", lambda row: row)
        study = __import__("sys").modules["persona_lens.experiments.finetuning_study"]
        patch.setattr(study, "mmlu_sample", lambda: asked)
        patch.setattr("persona_lens.replication.grid_stages.mmlu_sample", lambda: asked)
        yield


@pytest.fixture(scope="module")
def on_moods(babble, tiny_bridge, tmp_path_factory):
    """A finished replication on moods: its folder, and the work of each of its stages."""
    from persona_lens.replication.preset import STAGES
    from persona_lens.replication.run import replicate

    folder = tmp_path_factory.mktemp("moods")
    preset, counts = tiny_preset(folder), {}
    for stage in STAGES[:8]:
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            found = replicate(preset, folder / "run", model=tiny_bridge, only=[stage], progress=False)
            assert found.failures == {}
            counts[stage] = exact(counted.work)
    return preset, folder / "run", counts


def test_stages_on_moods(on_moods):
    from persona_lens.experiments.moods import split_prompts
    from persona_lens.replication import mood_work
    from persona_lens.replication.mood_work import MoodPrompts
    from persona_lens.replication.work import stage_work

    preset, folder, counts = on_moods
    split = split_prompts(made_up_moods(), 0)
    print({p: len(getattr(split, p)) for p in ("vectors", "finetuning", "judge", "evaluation")})
    for stage, found in counts.items():
        print(stage, found, exact(stage_work(preset, stage, {})))
    assert 0
