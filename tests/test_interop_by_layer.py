"""Dicts of directions by layer: what other libraries read, what comes back, what is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.peer_environments import STEERING_VECTORS
from persona_lens.interop.tensor_files import read_layer_dict, write_layer_dict
from tests.interop_cases import hostile_torch_files, one_sentence, peer_python, run
from tests.vector_cases import (
    N_LAYERS,
    SEEDS,
    ToyModel,
    assert_same_bits,
    make_vectors,
)


@given(
    seed=SEEDS, layers=st.sets(st.integers(0, N_LAYERS - 1), min_size=1), ending=st.sampled_from(["pt", "safetensors"])
)
def test_a_dict_gives_back_the_same_bits_and_lacks_the_other_layers(tmp_path_factory, seed, layers, ending):
    path = tmp_path_factory.mktemp("dict") / f"evil.{ending}"
    vectors = make_vectors(seed=seed)
    write_layer_dict(vectors, path, layers=sorted(layers))
    again = read_layer_dict(path, n_layers=N_LAYERS)
    assert again.known_layers == sorted(layers)
    assert again.trait == "evil"
    for layer in layers:
        assert_same_bits(again.at(layer).direction, vectors.at(layer).direction)


def test_every_layer_that_there_is_is_written_by_default(tmp_path):
    write_layer_dict(make_vectors(missing={3: "unknown"}), tmp_path / "v.pt")
    assert list(torch.load(tmp_path / "v.pt", weights_only=True)) == [0, 1, 2]


def test_a_steering_vector_as_a_dict_is_read(tmp_path):
    activations = {2: torch.arange(6.0)}
    torch.save({"layer_activations": activations, "layer_type": "decoder_block"}, tmp_path / "v.pt")
    vectors = read_layer_dict(tmp_path / "v.pt", model=ToyModel(), trait="kind")
    assert (vectors.trait, vectors.known_layers) == ("kind", [2])
    assert torch.equal(vectors.at(2).direction, activations[2])
    assert vectors.check(ToyModel()) == "same"


def test_steering_vectors_reads_what_is_written_and_adds_it_where_we_do(tmp_path):
    """A block of its own kind of model, steered by it, gives out its input plus our direction of that layer."""
    vectors = make_vectors()
    write_layer_dict(vectors, tmp_path / "v.pt")
    script = """
import json, sys, torch
from torch import nn
from steering_vectors import SteeringVector
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(4))
    def forward(self, x):
        return [(x := layer(x)).clone() for layer in self.layers]  # what is added is added in place
vector = SteeringVector(torch.load(sys.argv[1], weights_only=True), "decoder_block")
model = Model()
with vector.apply(model, layer_config={"decoder_block": "layers.{num}"}):
    print(json.dumps([each[0, 0].tolist() for each in model(torch.zeros(1, 1, 6))]))
"""
    outputs = run(peer_python(STEERING_VECTORS, "PERSONA_LENS_STEERING_VECTORS_PYTHON"), script, tmp_path / "v.pt")
    expected = vectors.directions.cumsum(dim=0)
    torch.testing.assert_close(torch.tensor(json.loads(outputs)), expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no direction: expected one tensor"),
        ([torch.ones(6)], "expected a dict of tensors by layer, got list"),
        ({"mlp": torch.ones(6)}, "expected a number of a layer as each key, once, got 'mlp'"),
        ({True: torch.ones(6)}, "expected a number of a layer as each key, once, got 'True'"),
        ({1: torch.ones(6), "1": torch.ones(6)}, "expected a number of a layer as each key, once, got '1'"),
        ({4: torch.ones(6)}, "has a direction for layer 4, and the model has layers 0 to 3"),
        ({-1: torch.ones(6)}, "has a direction for layer -1, and the model has layers 0 to 3"),
        ({1: torch.ones(1, 6)}, r"layer 1: expected a tensor \[d_model\], got the shape \[1, 6\]"),
        ({1: "kind"}, r"layer 1: expected a floating-point tensor \[d_model\], got str"),
        ({1: torch.ones(6), 2: torch.ones(7)}, "directions of 6 and 7 numbers are of no one model"),
        ({1: torch.ones(6) / 0}, r"v\.pt: v: the direction at layer 1 holds NaN or infinite values"),
        ({"layer_activations": {1: torch.ones(6)}, "layer_type": "mlp"}, "has directions for 'mlp'"),
    ],
)
def test_a_dict_that_is_not_by_layer_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=words) as error:
        read_layer_dict(tmp_path / "v.pt", n_layers=N_LAYERS)
    one_sentence(error)


@pytest.mark.parametrize("kind", ["cut", "empty", "noise", "code"])
def test_a_hostile_dict_is_one_sentence_and_runs_nothing(tmp_path, kind):
    with pytest.raises(ValueError, match=r"is not a whole \.pt file") as error:
        read_layer_dict(hostile_torch_files(tmp_path)[kind], n_layers=N_LAYERS)
    one_sentence(error)
    assert not (tmp_path / "ran").exists()


def test_a_safetensors_file_that_is_cut_short_is_refused(tmp_path):
    save_file({"1": torch.ones(6)}, tmp_path / "v.safetensors")
    content = (tmp_path / "v.safetensors").read_bytes()
    (tmp_path / "v.safetensors").write_bytes(content[:-4])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_layer_dict(tmp_path / "v.safetensors", n_layers=N_LAYERS)


def test_the_number_of_layers_is_asked_for(tmp_path):
    write_layer_dict(make_vectors(), tmp_path / "v.pt")
    with pytest.raises(ValueError, match="does not say how many layers its model has: pass n_layers or model"):
        read_layer_dict(tmp_path / "v.pt")


@pytest.mark.parametrize(
    ("layers", "words"),
    [([3], "layer 3 has no direction"), ([4], "layer 4 is outside"), ([], "there is no layer to write")],
)
def test_a_layer_that_there_is_not_cannot_be_written(tmp_path, layers, words):
    with pytest.raises(ValueError, match=words):
        write_layer_dict(make_vectors(missing={3: "unknown"}), tmp_path / "v.pt", layers=layers)
