"""Sparse autoencoders in SAELens's form: features that are its own, and every setting that is not handled refused."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from persona_lens.interop.sparse_autoencoders import decompose, read_sae
from persona_lens.vectors.persona_vector import PersonaVector
from tests.interop_cases import one_sentence, run
from tests.sae_cases import LAYER, N_FEATURES, K, sae_folder, settings, slow_encode, weights
from tests.vector_cases import D_MODEL, ToyModel, make_provenance, make_vectors, random_tensor

ARCHITECTURES = ["standard", "jumprelu", "topk"]


@pytest.fixture
def sae(tmp_path):
    return read_sae(sae_folder(tmp_path / "sae"))


# Encoding


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_those_of_the_formula(tmp_path, architecture):
    found = read_sae(sae_folder(tmp_path / "sae", architecture))
    activations = random_tensor(20, D_MODEL, seed=7)
    expected = torch.stack([slow_encode(architecture, each) for each in activations])
    torch.testing.assert_close(found.encode(activations), expected, rtol=1e-4, atol=1e-5)
    if architecture == "topk":
        assert (found.encode(activations) > 0).sum(dim=-1).max() == K


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_those_of_sae_lens(tmp_path, architecture):
    python = os.environ.get("PERSONA_LENS_SAE_LENS_PYTHON")
    if not python:
        pytest.skip("PERSONA_LENS_SAE_LENS_PYTHON, a Python that has sae-lens, is not set")
    folder = sae_folder(tmp_path / "sae", architecture)
    activations = random_tensor(20, D_MODEL, seed=7)
    save_file({"activations": activations}, tmp_path / "activations.safetensors")
    script = """
import json, sys, warnings
warnings.simplefilter("ignore")
from safetensors.torch import load_file
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1], device="cpu")
sae.save_model(sys.argv[3])
print(json.dumps(sae.encode(load_file(sys.argv[2])["activations"]).tolist()))
"""
    theirs = json.loads(run(python, script, folder, tmp_path / "activations.safetensors", tmp_path / "again"))
    torch.testing.assert_close(read_sae(folder).encode(activations), torch.tensor(theirs), rtol=1e-5, atol=1e-6)
    again = read_sae(tmp_path / "again")
    assert torch.equal(again.encode(activations), read_sae(folder).encode(activations))


def test_the_decoders_bias_stays_in_the_input_where_the_settings_say_so(tmp_path):
    found = read_sae(sae_folder(tmp_path / "sae", apply_b_dec_to_input=False))
    shifted = found.encode(random_tensor(D_MODEL))
    held = weights()
    torch.testing.assert_close(shifted, (random_tensor(D_MODEL) @ held["W_enc"] + held["b_enc"]).relu())


def test_activations_of_another_width_are_refused(sae):
    with pytest.raises(ValueError, match=r"The SAE reads activations of 6 numbers, got 7: take them at layer 2 of toy"):
        sae.encode(torch.ones(7))


# Reading


@pytest.mark.parametrize(("point", "layer"), [("blocks.0.hook_resid_post", 0), ("blocks.5.hook_resid_pre", 4)])
def test_the_stream_before_a_block_is_the_output_of_the_one_below(tmp_path, point, layer):
    metadata = settings()["metadata"] | {"hook_name": point}
    assert read_sae(sae_folder(tmp_path / "sae", metadata=metadata)).layer == layer


def test_a_folder_of_a_sae_lens_before_version_6_is_read(tmp_path):
    """Its settings lie flat, and a standard SAE does not say so."""
    flat = {"hook_point": "blocks.2.hook_resid_post", "model_name": "old", "activation_fn_str": "relu"}
    found = read_sae(sae_folder(tmp_path / "sae", architecture=None, metadata=None, **flat))
    assert (found.architecture, found.layer, found.model_name, found.centred) == ("standard", 2, "old", None)


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("gated", {}, "the SAE is gated with relu, and standard, jumprelu and topk with relu are handled: use SAELens"),
        ("standard", {"activation_fn": "tanh-relu"}, "the SAE is standard with tanh-relu"),
        ("standard", {"activation_fn": "topk"}, "a topk SAE of a SAELens before version 6"),
        ("standard", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm', and only 'none'"),
        ("standard", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z', and only 'none' is handled"),
        ("standard", {"hook_head_index": 3}, "hook_head_index is"),
        ("standard", {"finetuning_scaling_factor": True}, "finetuning_scaling_factor is True, and only False"),
        ("standard", {"metadata": {"hook_name": "blocks.2.hook_mlp_out"}}, "the SAE reads blocks.2.hook_mlp_out, and"),
        ("standard", {"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "the SAE reads blocks.0.hook_resid_pre"),
        ("standard", {"metadata": {}}, "the SAE reads an unnamed point"),
        ("standard", {"d_sae": 13}, r"W_enc has the shape \[6, 12\], and cfg.json says \[6, 13\]"),
        ("topk", {"k": 0}, "a topk SAE has a k from 1 to its number of features, got 0"),
        ("topk", {"k": 13}, "a topk SAE has a k from 1 to its number of features, got 13"),
    ],
)
def test_what_would_make_the_features_wrong_is_refused(tmp_path, architecture, changes, words):
    if "hook_head_index" in changes:
        changes = {"metadata": settings()["metadata"] | changes}
    with pytest.raises(ValueError, match=words) as error:
        read_sae(sae_folder(tmp_path / "sae", architecture, **changes))
    one_sentence(error)


@pytest.mark.parametrize("content", ["{", "[]", "null", '"text"'])
def test_a_damaged_configuration_is_refused(tmp_path, content):
    folder = sae_folder(tmp_path / "sae")
    (folder / "cfg.json").write_text(content)
    with pytest.raises(ValueError, match="is no configuration of an SAE"):
        read_sae(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"W_dec": None}, "lacks W_dec, which a standard SAE has"),
        ({"b_dec": torch.full((D_MODEL,), torch.nan)}, "b_dec holds NaN or infinite values"),
        ({"b_dec": torch.ones(1, D_MODEL)}, r"b_dec: expected a tensor \[d_in\], got the shape \[1, 6\]"),
        ({"b_dec": torch.ones(D_MODEL, dtype=torch.int64)}, "b_dec: expected a floating-point tensor"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, change, words):
    tensors = {name: tensor for name, tensor in (weights() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=words):
        read_sae(sae_folder(tmp_path / "sae", tensors=tensors))


def test_weights_that_are_cut_short_are_refused(tmp_path):
    path = sae_folder(tmp_path / "sae") / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_sae(path.parent)


# Decomposing


def test_the_closest_feature_is_the_one_that_writes_the_direction(sae):
    vector = PersonaVector("planted", LAYER, 5 * sae.W_dec[7])
    found = decompose(vector, sae, top=3)
    assert found.features[0].number == 7
    assert found.features[0].cosine == pytest.approx(1)
    assert found.features[0].activation_difference is None
    assert decompose(-vector, sae, top=N_FEATURES).features[-1].cosine == pytest.approx(-1)


def test_cosines_fall_and_are_those_of_the_decoders_rows(sae):
    vector = make_vectors().at(LAYER)
    table = decompose(vector, sae, top=N_FEATURES).table()
    assert table["cosine"].is_monotonic_decreasing
    expected = torch.nn.functional.cosine_similarity(sae.W_dec[table.index.tolist()], vector.direction[None], dim=-1)
    assert table["cosine"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_with_class_means_each_feature_has_the_difference_of_its_activations(sae):
    positive, negative = random_tensor(D_MODEL, seed=8), random_tensor(D_MODEL, seed=9)
    found = decompose(make_vectors().at(LAYER), sae, positive_mean=positive, negative_mean=negative, top=4)
    difference = slow_encode("standard", positive) - slow_encode("standard", negative)
    for feature in found.features:
        assert feature.activation_difference == pytest.approx(float(difference[feature.number]), abs=1e-4)


def test_random_directions_show_what_a_cosine_is_worth(sae):
    """The control of a planted direction is below its cosine, and the same for the same seed."""
    found = decompose(PersonaVector("planted", LAYER, sae.W_dec[7]), sae, top=1)
    assert 0 < found.random_cosine < found.features[0].cosine
    assert decompose(make_vectors().at(LAYER), sae, top=1).random_cosine == found.random_cosine


def test_a_dead_feature_has_cosine_0(tmp_path):
    tensors = weights()
    tensors["W_dec"][0] = 0
    sae = read_sae(sae_folder(tmp_path / "sae", tensors=tensors))
    found = decompose(make_vectors().at(LAYER), sae, top=N_FEATURES)
    assert next(each.cosine for each in found.features if each.number == 0) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_vectors().at(1), "the vector has layer 1 and the SAE 2: pass an SAE of the vector's model"),
        (lambda: PersonaVector("evil", LAYER, torch.ones(7)), "the vector has d_model 7 and the SAE 6"),
        (
            lambda: make_vectors(provenance=make_provenance(ToyModel(normalization="LN", centred=True))).at(LAYER),
            "the vector is of a centred residual stream and the SAE of a raw one",
        ),
    ],
)
def test_a_vector_of_another_stream_is_refused(sae, make, words):
    with pytest.raises(ValueError, match=words):
        decompose(make(), sae, top=1)


def test_one_mean_alone_is_refused(sae):
    with pytest.raises(ValueError, match="a difference of activations needs both class means: pass the other one too"):
        decompose(make_vectors().at(LAYER), sae, positive_mean=torch.ones(D_MODEL), top=1)


@pytest.mark.parametrize("top", [0, N_FEATURES + 1])
def test_more_features_than_there_are_cannot_be_asked_for(sae, top):
    with pytest.raises(ValueError, match=rf"top is from 1 to the SAE's 12 features, got {top}"):
        decompose(make_vectors().at(LAYER), sae, top=top)
