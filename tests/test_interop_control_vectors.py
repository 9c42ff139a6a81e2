"""GGUF control vectors: what llama.cpp and repeng read, what comes back, and the block that has no direction."""

import json
import struct
import sys

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peer_environments import REPENG
from persona_lens.interop.control_vectors import read_control_vector, write_control_vector
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Steer
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.interop_cases import one_sentence, peer_python, run
from tests.vector_cases import (
    D_MODEL,
    N_LAYERS,
    SEEDS,
    assert_same_bits,
    make_provenance,
    make_vectors,
    random_tensor,
)

ABOVE_0 = range(1, N_LAYERS)


def gguf_file(path, tensors, architecture="controlvector"):
    """A GGUF file of tensors by name, as any tool might write it."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def direction(length=D_MODEL, fill=1.0):
    return torch.full((length,), fill).numpy()


@given(seed=SEEDS, layers=st.sets(st.sampled_from(ABOVE_0), min_size=1))
def test_a_control_vector_gives_back_the_same_bits_and_lacks_the_other_layers(tmp_path_factory, seed, layers):
    path = tmp_path_factory.mktemp("gguf") / "mine.gguf"
    vectors = make_vectors(seed=seed)
    write_control_vector(vectors, path, layers=list(layers))
    again = read_control_vector(path, n_layers=N_LAYERS)
    assert again.trait == "evil"
    assert again.known_layers == sorted(layers)
    for layer in layers:
        assert_same_bits(again.at(layer).direction, vectors.at(layer).direction)


def test_the_file_is_what_llama_cpp_expects(tmp_path):
    """`direction.N` of float32 for block N, one-dimensional, under the architecture that it knows."""
    vectors = make_vectors(provenance=make_provenance())
    write_control_vector(vectors, tmp_path / "v.gguf", layers=ABOVE_0)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: reader.get_field(name).contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "general.name": "evil",
        "controlvector.model_hint": "toy-0",
        "controlvector.layer_count": 3,
    }
    assert {each.name: (each.tensor_type.name, list(each.shape)) for each in reader.tensors} == {
        f"direction.{layer}": ("F32", [D_MODEL]) for layer in ABOVE_0
    }
    for each in reader.tensors:
        assert each.data.tolist() == vectors.directions[int(each.name[len("direction.") :])].tolist()


def test_repeng_reads_what_is_written_and_is_read(tmp_path):
    vectors = make_vectors()
    write_control_vector(vectors, tmp_path / "ours.gguf", layers=ABOVE_0, model_hint="llama")
    script = """
import json, sys
from repeng import ControlVector
vector = ControlVector.import_gguf(sys.argv[1])
(vector * 2).export_gguf(sys.argv[2])
print(json.dumps([vector.model_type, {layer: row.tolist() for layer, row in vector.directions.items()}]))
"""
    python = peer_python(REPENG, "PERSONA_LENS_REPENG_PYTHON")
    model_type, found = json.loads(run(python, script, tmp_path / "ours.gguf", tmp_path / "theirs.gguf"))
    assert model_type == "llama"
    assert found == {str(layer): vectors.directions[layer].tolist() for layer in ABOVE_0}
    theirs = read_control_vector(tmp_path / "theirs.gguf", n_layers=N_LAYERS)
    assert theirs.known_layers == list(ABOVE_0)
    assert torch.equal(theirs.directions[1:], (2 * vectors).directions[1:])


@pytest.mark.slow
def test_repeng_steers_with_the_file_as_we_steer_with_the_vectors(tmp_path, tiny_hf_model, tiny_bridge):
    """The same logits: `direction.N` acts at the output of block N, our layer N."""
    n_layers, d_model = tiny_bridge.cfg.n_layers, tiny_bridge.cfg.d_model
    vectors = PersonaVectors.from_directions(random_tensor(n_layers, d_model), trait="evil")
    layers = [1, n_layers - 1]
    write_control_vector(vectors, tmp_path / "v.gguf", layers=layers, model_hint="llama")
    tiny_hf_model.save_pretrained(tmp_path / "model")
    script = """
import json, sys, torch
from repeng import ControlModel, ControlVector
from transformers import AutoModelForCausalLM
vector = ControlVector.import_gguf(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float64)
controlled = ControlModel(model, list(vector.directions))
controlled.set_control(vector, 1.5)
with torch.no_grad():
    print(json.dumps(controlled(input_ids=torch.arange(1, 9)[None]).logits.tolist()))
"""
    python = peer_python(REPENG, "PERSONA_LENS_REPENG_PYTHON")
    theirs = torch.tensor(json.loads(run(python, script, tmp_path / "v.gguf", tmp_path / "model")), dtype=torch.float64)
    steered = [Steer(vectors.at(layer), 1.5) for layer in layers]
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad(), intervene(tiny_bridge, *steered):
        ours = tiny_bridge(tokens)
    # Norms in float32 set the bound: without any steering the two environments' logits are 1.7e-6 apart.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)
    with torch.no_grad():
        assert not torch.allclose(tiny_bridge(tokens), theirs, atol=1e-2)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (range(N_LAYERS), r"evil: a control vector cannot steer at block 0, .* as in layers=range\(1, 4\)"),
        ([], r"name each layer to write once, and at least one, got \[\]"),
        ([2, 2], r"name each layer to write once, and at least one, got \[2, 2\]"),
        ([3], "layer 3 has no direction"),
    ],
)
def test_a_block_that_the_form_cannot_express_is_never_lost_silently(tmp_path, layers, words):
    with pytest.raises(ValueError, match=words):
        write_control_vector(make_vectors(missing={3: "unknown"}), tmp_path / "v.gguf", layers=layers)
    assert list(tmp_path.iterdir()) == []


def test_the_name_ends_in_gguf(tmp_path):
    with pytest.raises(ValueError, match=r"Control vectors are saved as \.gguf, got 'v\.bin'"):
        write_control_vector(make_vectors(), tmp_path / "v.bin", layers=[1])


def test_half_precision_is_read(tmp_path):
    path = gguf_file(tmp_path / "v.gguf", {"direction.2": direction().astype("float16")})
    assert read_control_vector(path, n_layers=N_LAYERS).at(2).norm == pytest.approx(D_MODEL**0.5)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"direction.0": direction()}, "expected tensors direction.1 and so on, each once, got 'direction.0'"),
        ({"direction.one": direction()}, "got 'direction.one'"),
        ({"blk.1.weight": direction()}, "got 'blk.1.weight'"),
        ({"direction.1": direction(), "direction.01": direction()}, "got 'direction.01'"),
        ({"direction.4": direction()}, "has a direction for layer 4, and the model has layers 0 to 3"),
        ({"direction.1": direction(), "direction.2": direction(7)}, "directions of 6 and 7 numbers"),
        ({"direction.1": direction().astype("int32")}, "direction.1 is of I32, and a direction is of F32 or F16"),
        ({"direction.1": direction().reshape(2, 3)}, r"got the shape \[2, 3\]"),
        ({"direction.1": direction(fill=float("nan"))}, r"v\.gguf: v: the direction at layer 1 holds NaN"),
        ({}, "holds no direction"),
    ],
)
def test_a_file_of_other_tensors_is_refused(tmp_path, tensors, words):
    with pytest.raises(ValueError, match=words) as error:
        read_control_vector(gguf_file(tmp_path / "v.gguf", tensors), n_layers=N_LAYERS)
    one_sentence(error)


def test_a_models_file_is_refused(tmp_path):
    path = gguf_file(tmp_path / "v.gguf", {"direction.1": direction()}, architecture="llama")
    with pytest.raises(ValueError, match="is a GGUF file of architecture 'llama', and a control vector has"):
        read_control_vector(path, n_layers=N_LAYERS)


@pytest.mark.parametrize("kept", [0, 3, 8, 30, 60, 120, 250])
def test_a_control_vector_that_is_cut_short_is_refused(tmp_path, kept):
    write_control_vector(make_vectors(), tmp_path / "v.gguf", layers=ABOVE_0)
    (tmp_path / "v.gguf").write_bytes((tmp_path / "v.gguf").read_bytes()[:kept])
    with pytest.raises(ValueError, match="is not a whole GGUF file") as error:
        read_control_vector(tmp_path / "v.gguf", n_layers=N_LAYERS)
    one_sentence(error)


def test_a_control_vector_with_an_absurd_count_is_refused(tmp_path):
    (tmp_path / "v.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62))
    with pytest.raises(ValueError, match="is not a whole GGUF file"):
        read_control_vector(tmp_path / "v.gguf", n_layers=N_LAYERS)


def test_without_gguf_the_install_command_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'gguf.*pip install "persona-lens\[interop\]"'):
        write_control_vector(make_vectors(), tmp_path / "v.gguf", layers=[1])
