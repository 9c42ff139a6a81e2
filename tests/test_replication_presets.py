"""Presets: the shipped ones, and what is refused in a changed one."""

from importlib.resources import files

import pytest

from persona_lens.replication.preset import load_preset, shipped_presets
from tests.replication_cases import tiny_preset

NAMES = ["embedded", "llama-3.1-8b", "qwen2.5-7b"]


def shipped(name):
    return (files("persona_lens.replication") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_preset_is_read_by_its_name_and_by_its_path(name, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(shipped(name), encoding="utf-8")
    assert shipped_presets() == tuple(NAMES)
    assert load_preset(path) == load_preset(name)
    assert load_preset(name).name == name


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_7b_presets_have_the_papers_settings(name):
    preset = load_preset(name)
    tuned, rollouts, sets = preset.finetuning, preset.extraction, preset.bring.finetuning
    assert (rollouts.questions, rollouts.per_question, rollouts.max_new_tokens) == (20, 10, 1000)
    assert (tuned.rank, tuned.alpha, tuned.dropout, tuned.learning_rate, tuned.warmup_steps) == (32, 64.0, 0.0, 1e-5, 5)
    assert (tuned.epochs, tuned.batch_rows * tuned.accumulation, tuned.weight_decay) == (1, 16, 0.01)
    assert tuned.max_length == 2048
    assert preset.monitoring.shots == (0, 5, 10, 15, 20)
    assert preset.judge.model == "gpt-4.1-mini-2025-04-14"
    assert len(preset.traits) == 7
    assert len(sets.names) * len(sets.versions) == 24


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("per_question = 1", "per_qestion = 1", "unknown key 'per_qestion' (did you mean per_question?)."),
        ("seed = 0", 'seed = "none"', "key seed: expected a valid integer, got 'none'."),
        ("threshold = 50.0", "threshold = 150.0", "key extraction.threshold: expected less than or equal to 100"),
        ("contrast_pairs = 2", "contrast_pairs = 0", "key judge.contrast_pairs: expected greater than or equal to 1"),
        ('kind = "likelihood"', 'kind = "oracle"', "key judge.kind: expected 'likelihood' or 'openai', got 'oracle'."),
        ("min_pairs = 10", "min_pairs = 1.5", "key extraction.min_pairs: expected a valid integer"),
        ("layer = 19", "layer = 30", "layer 30 is none of the model's 30, counted from 0."),
        ('traits = ["optimistic",', 'traits = ["Evil",', "traits: a name is there twice"),
        ('source = "datasets"', 'source = "moods"', "finetuning.source is moods: add the table moods."),
        ("[cosines] #", "[cosine] #", "got the unknown key 'cosine' (did you mean cosines?)."),
        ("caft = true", "caft = yes", "is not TOML"),
    ],
)
def test_a_wrong_preset_is_one_sentence_that_names_file_and_key(old, new, sentence, tmp_path):
    path = tmp_path / "mine.toml"
    text = shipped("embedded")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match="mine") as refused:
        load_preset(path)
    assert str(refused.value).startswith(str(path))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_preset_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(FileNotFoundError, match=r"No preset 'qwen': give one of embedded, llama-3\.1-8b, qwen2\.5-7b"):
        load_preset("qwen")


def test_a_trait_of_the_users_own_comes_from_its_file(tmp_path):
    preset = tiny_preset(tmp_path)
    assert preset.trait("grumpy").instructions[0].positive == "Grumble."
    other = tiny_preset(tmp_path, **{"trait-files": {"grumpy": "evil"}})
    with pytest.raises(ValueError, match=r"trait-files\.grumpy: the file holds the trait 'evil'"):
        other.trait("grumpy")
