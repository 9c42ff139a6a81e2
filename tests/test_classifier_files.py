"""The classifier's file: saved whole, read exactly, refused where it is damaged or foreign."""

import json
import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from persona_lens.judges.classifier import TextClassifier
from tests.classifier_cases import MIXED, NEGATIVE, POSITIVE, fit, fitted


@pytest.fixture(scope="module")
def classifier():
    return fitted()


def test_a_loaded_classifier_gives_the_same_probabilities_to_the_bit(classifier, tmp_path):
    classifier.save(tmp_path / "cheerful.safetensors")
    loaded = TextClassifier.load(tmp_path / "cheerful.safetensors")
    assert loaded.probability(MIXED).tobytes() == classifier.probability(MIXED).tobytes()
    assert (loaded.labels, loaded.validation) == (classifier.labels, classifier.validation)
    assert loaded.weights_hash == classifier.weights_hash


def test_the_file_is_safetensors_with_a_json_header(classifier, tmp_path):
    classifier.save(str(tmp_path / "cheerful.safetensors"))
    with safetensors.safe_open(tmp_path / "cheerful.safetensors", "np") as file:
        header = json.loads(file.metadata()["persona_lens_classifier"])
        assert sorted(file.keys()) == ["coefficients", "idf", "intercept"]
    assert header["format_version"] == 1
    assert header["labels"] == ["cheerful", "gloomy"]
    assert header["terms"] == list(classifier.terms)


def test_saving_replaces_an_older_file_and_leaves_nothing_else(classifier, tmp_path):
    fit(POSITIVE[:9], NEGATIVE).save(tmp_path / "c.safetensors")
    classifier.save(tmp_path / "c.safetensors")
    assert os.listdir(tmp_path) == ["c.safetensors"]
    assert TextClassifier.load(tmp_path / "c.safetensors").weights_hash == classifier.weights_hash


def test_a_save_that_fails_leaves_the_older_file_whole(classifier, tmp_path, monkeypatch):
    classifier.save(tmp_path / "c.safetensors")

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=r"Cannot write .*c.safetensors \(No space left on device\): free disk space"):
        fit(POSITIVE[:9], NEGATIVE).save(tmp_path / "c.safetensors")
    assert os.listdir(tmp_path) == ["c.safetensors"]
    assert TextClassifier.load(tmp_path / "c.safetensors").weights_hash == classifier.weights_hash


def test_saving_under_another_ending_is_refused(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"saved as .safetensors, got 'c.pkl': change the ending"):
        classifier.save(tmp_path / "c.pkl")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_was_cut_short_is_refused(classifier, tmp_path, kept):
    path = tmp_path / "c.safetensors"
    classifier.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"c.safetensors is not a whole safetensors file .*: copy it or save it again"):
        TextClassifier.load(path)


@pytest.mark.parametrize("metadata", [None, {"persona_lens": '{"format_version": 1}'}])
def test_a_file_of_something_else_is_refused(tmp_path, metadata):
    safetensors.numpy.save_file({"idf": np.ones(2)}, tmp_path / "v.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"v.safetensors holds no text classifier: name a file that"):
        TextClassifier.load(tmp_path / "v.safetensors")


def resave(path, **changes):
    """The saved classifier with parts of its header or its tensors changed; a part that becomes None is gone."""
    with safetensors.safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["persona_lens_classifier"])
    for name, value in changes.items():
        (tensors if name in tensors else header)[name] = value
    tensors = {name: value for name, value in tensors.items() if value is not None}
    header = {name: value for name, value in header.items() if value is not None}
    safetensors.numpy.save_file(tensors, path, metadata={"persona_lens_classifier": json.dumps(header)})


def test_a_file_of_another_format_version_is_refused(classifier, tmp_path):
    classifier.save(tmp_path / "c.safetensors")
    resave(tmp_path / "c.safetensors", format_version=2)
    with pytest.raises(ValueError, match="has format version 2, and this persona_lens reads 1: install"):
        TextClassifier.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": None},
        {"terms": ["one", "two"]},
        {"terms": [1, 2]},
        {"labels": ["cheerful"]},
        {"reading": {"input": "filename"}},
        {"validation": {"auc": 1.0}},
        {"idf": None},
        {"idf": np.ones((2, 2))},
        {"intercept": np.ones(0)},
        {"intercept": np.array([np.nan])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_damaged_contents_are_refused(classifier, tmp_path, change):
    classifier.save(tmp_path / "c.safetensors")
    resave(tmp_path / "c.safetensors", **change)
    with pytest.raises(ValueError, match=r"c.safetensors has damaged contents \(.*\): copy it or save it again"):
        TextClassifier.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("header", ["", "[]", "3", "{"])
def test_a_damaged_header_is_refused(tmp_path, header):
    metadata = {"persona_lens_classifier": header}
    safetensors.numpy.save_file({"idf": np.ones(2)}, tmp_path / "c.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="damaged contents"):
        TextClassifier.load(tmp_path / "c.safetensors")
