"""Files of persona vectors: what is saved comes back to the bit, and whatever else a file may be is refused."""

import math
import os
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch
import torch

from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.vector_cases import (
    D_MODEL,
    N_LAYERS,
    assert_same_bits,
    make_provenance,
    make_statistics,
    make_vectors,
    random_tensor,
)


def assert_same_value(left, right):
    """Equality of all fields, tensors bit by bit and NaN equal to NaN."""
    for each in fields(left):
        ours, theirs = getattr(left, each.name), getattr(right, each.name)
        if isinstance(ours, torch.Tensor):
            assert_same_bits(ours, theirs)
        elif each.name == "statistics" and ours is not None:
            assert_same_value(ours, theirs)
        else:
            assert repr(ours) == repr(theirs), each.name


# Saving


@pytest.mark.parametrize("kind", [Path, str])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: make_vectors(provenance=make_provenance(), statistics=make_statistics()), id="everything"),
        pytest.param(lambda: make_vectors(statistics=make_statistics(embedding=False)), id="layer statistics alone"),
        pytest.param(lambda: make_vectors(position="prompt_mean").incremental(), id="increments"),
        pytest.param(
            lambda: PersonaVectors.from_directions(random_tensor(D_MODEL, N_LAYERS).T, trait="Böse 悪"),
            id="bare transposed directions",
        ),
    ],
)
def test_saving_and_loading_gives_back_the_same_bits_and_keeps_what_is_missing_missing(tmp_path, make, kind):
    v, path = make(), kind(tmp_path / "mine.safetensors")
    v.save(path)
    assert_same_value(PersonaVectors.load(path), v)


def test_saving_replaces_an_older_file_and_leaves_nothing_else(tmp_path):
    make_vectors().save(tmp_path / "evil.safetensors")
    make_vectors(seed=3).save(tmp_path / "evil.safetensors")
    assert os.listdir(tmp_path) == ["evil.safetensors"]
    assert_same_value(PersonaVectors.load(tmp_path / "evil.safetensors"), make_vectors(seed=3))


def test_a_save_that_fails_leaves_the_older_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "evil.safetensors"
    make_vectors().save(path)

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=r"Cannot write .*evil.safetensors \(No space left on device\): free disk space"):
        make_vectors(seed=3).save(path)
    assert os.listdir(tmp_path) == ["evil.safetensors"]
    assert_same_value(PersonaVectors.load(path), make_vectors())


@pytest.mark.parametrize(("folder", "fact"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_saving_where_there_is_no_folder_is_refused_in_one_sentence(tmp_path, folder, fact):
    (tmp_path / "file").write_text("")
    path = f"{folder}/evil.safetensors"
    with pytest.raises(OSError, match=rf"Cannot write .*{path} \({fact}\): name a file in an existing folder"):
        make_vectors().save(tmp_path / path)


def test_saving_under_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"saved as .safetensors, got 'evil.pt': change the ending"):
        make_vectors().save(tmp_path / "evil.pt")


# Loading


def test_loading_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"evil.safetensors"):
        PersonaVectors.load(tmp_path / "evil.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path, kept):
    path = tmp_path / "evil.safetensors"
    make_vectors().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"evil.safetensors is not a whole safetensors file .*: copy it or save it again"
    ):
        PersonaVectors.load(path)


def test_a_pickle_is_refused_unread(tmp_path):
    torch.save({"directions": torch.ones(2, 3)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        PersonaVectors.load(tmp_path / "evil.pt")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_someone_else_is_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"directions": torch.ones(2, 3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"was not saved by persona_lens: .*PersonaVectors.from_directions"):
        PersonaVectors.load(path)


def save_with_header(path, header, **tensors):
    safetensors.torch.save_file(tensors, path, metadata={"persona_lens": header})


def test_a_file_of_another_format_version_is_refused(tmp_path):
    save_with_header(tmp_path / "v.safetensors", '{"format_version": 2}', directions=torch.ones(2, 3))
    with pytest.raises(ValueError, match="has format version 2, and this persona_lens reads 1: install"):
        PersonaVectors.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize("header", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "provenance": 3}'])
def test_a_damaged_header_is_refused(tmp_path, header):
    save_with_header(tmp_path / "v.safetensors", header, directions=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"v.safetensors has a damaged header \(.*\): copy it or save it again"):
        PersonaVectors.load(tmp_path / "v.safetensors")


def test_tensors_that_make_no_vectors_are_refused_with_the_file(tmp_path):
    path = tmp_path / "v.safetensors"
    make_vectors().save(path)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()["persona_lens"]
    save_with_header(path, header, directions=torch.full((2, 3), math.nan), residual_norm=torch.ones(2))
    with pytest.raises(ValueError, match=r"v.safetensors does not hold whole persona vectors: .*layer 0 holds NaN"):
        PersonaVectors.load(path)
