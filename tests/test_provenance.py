"""Where vectors came from, and the models that they are accepted or refused on."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from persona_lens.models.structure import identify, resid_post_name
from persona_lens.vectors.persona_vectors import PersonaVectors
from persona_lens.vectors.provenance import HOOK_POINT
from tests.vector_cases import D_MODEL, N_LAYERS, OtherClassOfToyModel, ToyModel, make_provenance, make_vectors


def vectors_of(model=None, **parts):
    return make_vectors(provenance=make_provenance(model, **parts))


def test_vectors_remember_the_model_that_they_were_made_with():
    model: Any = ToyModel()
    v = PersonaVectors.from_directions(torch.ones(N_LAYERS, D_MODEL), trait="mine", model=model)
    assert v.provenance is not None
    assert v.provenance.model == identify(model)
    assert v.provenance.settings == {"source": "from_directions"}
    assert str(torch.__version__).startswith(v.provenance.library_versions["torch"])
    assert v.provenance.created.endswith("+00:00")


def test_the_hook_point_of_a_provenance_is_the_one_that_models_names():
    assert HOOK_POINT.format(layer=7) == resid_post_name(7)


@pytest.mark.parametrize("settings", [{"model": object()}, {"temperature": math.nan}])
def test_settings_that_are_no_json_are_refused_before_anything_is_saved(settings):
    with pytest.raises(ValueError, match="settings that JSON can hold"):
        make_provenance(settings=settings)


# Accepted models


@pytest.mark.parametrize(
    ("make_model", "relation"),
    [
        pytest.param(ToyModel, "same", id="the model itself"),
        pytest.param(OtherClassOfToyModel, "same", id="the same weights in another class"),
        pytest.param(lambda: ToyModel().finetuned(), "adapted", id="finetuned"),
        pytest.param(lambda: ToyModel().with_changed_blocks(), "adapted", id="an adapter in the blocks alone"),
    ],
)
def test_a_model_of_the_same_base_is_accepted_as_what_it_is(make_model, relation):
    assert vectors_of(ToyModel()).check(make_model()) == relation
    assert vectors_of(ToyModel()).at(0).check(make_model()) == relation


def test_an_unrelated_model_of_equal_shape_needs_permission():
    for vector in (vectors_of(ToyModel()), vectors_of(ToyModel()).at(0)):
        with pytest.raises(ValueError, match=r"come from toy-0, and toy-1 has unrelated .*allow_other_model=True"):
            vector.check(ToyModel(seed=1))
        assert vector.check(ToyModel(seed=1), allow_other_model=True) == "other"


@pytest.mark.parametrize("sample", [(1.0,) * 256, (), (1.0, 2.0)])
def test_embeddings_that_cannot_be_compared_are_unrelated(sample):
    provenance = make_provenance()
    found = replace(provenance.model, weights_hash="another", embedding_sample=sample)
    assert provenance.relation_to(found) == "other"


def test_vectors_without_provenance_fit_any_model_of_their_shape_as_unknown():
    assert make_vectors().check(ToyModel(seed=1)) == "unknown"
    assert make_vectors().at(0).check(ToyModel(seed=1)) == "unknown"


# Refused models

ANOTHER_WIDTH = "d_model 6, and toy-0 has 8: use the model that"
ANOTHER_DEPTH = "n_layers 4, and toy-0 has 5: use the model that"


@pytest.mark.parametrize(
    ("make", "model", "mismatch"),
    [
        (lambda: make_vectors(), {"d_model": 8}, ANOTHER_WIDTH),
        (lambda: make_vectors().at(0), {"d_model": 8}, ANOTHER_WIDTH),
        (lambda: make_vectors(), {"n_layers": 5}, ANOTHER_DEPTH),
        (lambda: vectors_of(ToyModel()), {"n_layers": 5}, ANOTHER_DEPTH),
        (lambda: vectors_of(ToyModel()).at(0), {"n_layers": 5}, ANOTHER_DEPTH),
        (
            lambda: vectors_of(hook_point="blocks.{layer}.hook_resid_mid"),
            {},
            r"hook point blocks.\{layer\}.hook_resid_mid, and toy-0 has blocks",
        ),
        (
            lambda: vectors_of(ToyModel(normalization="LN")),
            {"normalization": "LN", "centred": True},
            "residual basis raw, and toy-0 has centred: load the model with weights",
        ),
    ],
)
def test_no_permission_lets_an_unfitting_model_through(make, model, mismatch):
    with pytest.raises(ValueError, match=f"evil: the vectors expect {mismatch}"):
        make().check(ToyModel(**model), allow_other_model=True)


def test_a_vector_of_unknown_origin_above_the_last_block_is_refused():
    with pytest.raises(ValueError, match="layer 3 is outside 0 to 1"):
        make_vectors().at(3).check(ToyModel(n_layers=2))
