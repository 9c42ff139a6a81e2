"""Vectors from elsewhere may lack layers: what is unknown is refused, NaN or left out, and never a zero direction."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from persona_lens.interventions.values import Ablate, Steer
from persona_lens.vectors.persona_vectors import PersonaVectors, cosine_matrix
from tests.vector_cases import D_MODEL, N_LAYERS, make_vectors, random_tensor

WHY = "its row is after the final norm"
LAST = N_LAYERS - 1


def lacking(**parts):
    return make_vectors(missing={LAST: WHY}, **parts)


def test_a_missing_layer_is_refused_with_its_reason():
    with pytest.raises(ValueError, match=rf"evil: layer {LAST} has no direction \({WHY}\): choose one of known_layers"):
        lacking().at(LAST)


def test_a_layer_outside_the_model_cannot_be_missing():
    with pytest.raises(ValueError, match=r"layer 4 is outside 0 to 3"):
        make_vectors(missing={N_LAYERS: WHY})


def test_vectors_without_any_layer_are_refused():
    with pytest.raises(ValueError, match="evil: every layer is missing, and one is needed"):
        make_vectors(missing=dict.fromkeys(range(N_LAYERS), WHY))


def test_a_missing_row_may_hold_anything_and_is_kept_as_zeros():
    directions = random_tensor(N_LAYERS, D_MODEL)
    directions[LAST] = math.nan
    vectors = PersonaVectors("evil", directions, torch.ones(N_LAYERS), missing={LAST: WHY})
    assert not vectors.directions[LAST].any()
    assert vectors.known_layers == [0, 1, 2]
    assert "missing=[3]" in repr(vectors)


def test_missing_layers_survive_saving(tmp_path):
    lacking().save(tmp_path / "v.safetensors")
    assert PersonaVectors.load(tmp_path / "v.safetensors").missing == {LAST: WHY}


def test_a_file_that_is_older_than_missing_layers_lacks_none(tmp_path):
    make_vectors().save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["persona_lens"])
    del header["missing"]
    save_file(tensors, tmp_path / "old.safetensors", metadata={"persona_lens": json.dumps(header)})
    assert PersonaVectors.load(tmp_path / "old.safetensors").known_layers == list(range(N_LAYERS))


def test_norms_projections_and_cosines_are_nan_where_a_layer_is_missing_and_as_ever_elsewhere():
    whole, vectors, other = make_vectors(), lacking(), make_vectors("optimistic", seed=2)
    means = random_tensor(5, N_LAYERS, D_MODEL)
    cache = {name: random_tensor(2, 3, D_MODEL, seed=i) for i, name in enumerate(vectors.hook_names)}
    for known, found in (
        (whole.norms, vectors.norms),
        (whole.project(means).T, vectors.project(means).T),
        (whole.project_cache(cache), vectors.project_cache(cache)),
        (whole.cosine_similarity(other), other.cosine_similarity(vectors)),
    ):
        assert found[LAST].isnan().all()
        assert torch.equal(found[:LAST], known[:LAST])


def test_a_sum_lacks_what_either_side_lacks():
    both = make_vectors(missing={0: "no direction.0"}) + lacking()
    assert both.missing == {0: "no direction.0", LAST: WHY}
    assert (2 * -both).missing == both.missing


def test_increments_lack_the_layer_and_the_one_above_it():
    increments = make_vectors(missing={1: "not in the file"}).incremental()
    assert increments.missing == {1: "not in the file", 2: "layer 1 below it is missing"}
    assert lacking().incremental().known_layers == [0, 1, 2]


def test_interventions_leave_out_a_missing_layer_and_say_where_they_act():
    assert Steer(lacking(), 2.0).layers == Ablate(lacking()).layers == (0, 1, 2)
    assert "layers 0 to 2" in str(Ablate(lacking()))


def test_cosines_at_a_missing_layer_are_refused():
    assert cosine_matrix([lacking(), make_vectors(seed=3)], 1).shape == (2, 2)
    with pytest.raises(ValueError, match="layer 3 has no direction"):
        cosine_matrix([make_vectors(seed=3), lacking()], LAST)
