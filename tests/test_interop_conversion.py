"""Any format in and any out, from Python and from the command line: what decides the format, and what is refused."""

import pytest
import torch

from persona_lens.interop.conversion import read_vectors, write_vectors
from persona_lens.interop.tensor_files import write_layer_dict
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.interop_cases import one_sentence, real_folder
from tests.vector_cases import (
    D_MODEL,
    N_LAYERS,
    ToyModel,
    assert_same_bits,
    make_provenance,
    make_vectors,
    random_tensor,
)

LAST = N_LAYERS - 1


@pytest.mark.parametrize(
    ("name", "choices", "known"),
    [
        ("v.safetensors", {}, [0, 1, 2, 3]),
        ("v.pt", {}, [0, 1, 2]),
        ("v.gguf", {"layers": [1, 3]}, [1, 3]),
        ("v.pt", {"format": "layers"}, [0, 1, 2, 3]),
        ("v.safetensors", {"format": "layers", "layers": [2]}, [2]),
    ],
)
def test_what_is_written_in_a_format_is_recognised_and_read(tmp_path, name, choices, known):
    vectors = make_vectors()
    write_vectors(vectors, tmp_path / name, **choices)
    again = read_vectors(tmp_path / name, n_layers=N_LAYERS)
    assert again.known_layers == known
    for layer in known:
        assert_same_bits(again.at(layer).direction, vectors.at(layer).direction)


def test_rows_are_told_apart_by_the_number_of_layers(tmp_path):
    torch.save(random_tensor(5, D_MODEL), tmp_path / "v.pt")
    assert read_vectors(tmp_path / "v.pt", n_layers=4).embedding is not None
    blocks = read_vectors(tmp_path / "v.pt", n_layers=5, last_row="residual")
    assert blocks.embedding is None
    assert blocks.known_layers == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="does not say how many layers its model has: pass n_layers or model"):
        read_vectors(tmp_path / "v.pt")


def test_a_run_is_read_from_its_folder(tmp_path):
    make_vectors().save(tmp_path / "vectors.safetensors")
    assert read_vectors(tmp_path).trait == "evil"


def test_our_own_file_takes_a_new_name_and_its_model_is_checked(tmp_path):
    make_vectors(provenance=make_provenance()).save(tmp_path / "v.safetensors")
    assert read_vectors(tmp_path / "v.safetensors", trait="wicked", model=ToyModel()).trait == "wicked"
    with pytest.raises(ValueError, match="has unrelated embeddings"):
        read_vectors(tmp_path / "v.safetensors", model=ToyModel(seed=5))
    with pytest.raises(ValueError, match="has 4 layers, and n_layers is 7: leave it out"):
        read_vectors(tmp_path / "v.safetensors", n_layers=7)


def test_a_folder_of_many_asks_which_one():
    assert read_vectors(real_folder(), trait="v_refusal").n_layers == 28
    with pytest.raises(ValueError, match=r"holds v_pref_flat_earth, .*: name one of them as the trait, got None"):
        read_vectors(real_folder())


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("v.bin", {}, "Cannot tell how to write v.bin: expected one of .safetensors, .pt, .pth, .gguf"),
        ("v.gguf", {}, "all directions of a control vector act together: name the layers to steer at"),
        ("v.pt", {"layers": [1]}, "the format reference has every layer: leave out the choice of layers"),
        ("v.gguf", {"format": "layers"}, r"This format is saved as \.pt, got 'v\.gguf'"),
        ("v.pt", {"format": "persona_lens"}, r"Vectors are saved as \.safetensors, got 'v\.pt'"),
    ],
)
def test_what_cannot_be_written_so_is_refused(tmp_path, name, choices, words):
    with pytest.raises(ValueError, match=words) as error:
        write_vectors(make_vectors(), tmp_path / name, **choices)
    one_sentence(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("v.npy", b"", "ends in none of .safetensors, .pt, .pth, .gguf"),
        ("v.safetensors", b"\x08", "is not a whole safetensors file"),
        ("v.gguf", b"GGUF", "is not a whole GGUF file"),
        ("v.pt", b"PK", r"is not a whole \.pt file"),
    ],
)
def test_a_file_of_no_format_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_vectors(tmp_path / name, n_layers=N_LAYERS)


@pytest.mark.parametrize("name", ["v.pt", "v.gguf", "v.safetensors"])
def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        read_vectors(tmp_path / name, n_layers=N_LAYERS)


# The command


def test_the_command_converts_there_and_back(cli, tmp_path):
    vectors = make_vectors()
    vectors.save(tmp_path / "v.safetensors")
    code, out, err = cli("convert", tmp_path / "v.safetensors", "--output", tmp_path / "evil_response_avg_diff.pt")
    assert (code, out) == (0, "")
    reference = tmp_path / "evil_response_avg_diff.pt"
    code, _, err = cli("convert", reference, "--n-layers", 4, "--output", tmp_path / "again.safetensors")
    assert code == 0
    assert "Layer 3 is missing: the file's last row is taken after the final norm" in err
    again = PersonaVectors.load(tmp_path / "again.safetensors")
    assert_same_bits(again.directions[:LAST], vectors.directions[:LAST])
    assert_same_bits(again.embedding, vectors.embedding)


def test_the_command_writes_a_control_vector_of_the_layer_that_is_named(cli, tmp_path):
    make_vectors().save(tmp_path / "v.safetensors")
    code, _, err = cli("convert", tmp_path / "v.safetensors", "--layer", 2, "--output", tmp_path / "v.gguf")
    assert code == 0, err
    assert read_vectors(tmp_path / "v.gguf", n_layers=4).known_layers == [2]


def test_the_command_picks_a_real_vector_of_a_folder(cli, tmp_path):
    options = ["--trait", "v_refusal", "--format", "layers", "--output", tmp_path / "v.pt"]
    code, _, err = cli("convert", real_folder(), *options)
    assert code == 0, err
    assert list(torch.load(tmp_path / "v.pt", weights_only=True)) == list(range(27))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "v.gguf"], "name the layers to steer at"),
        (["--output", "v.gguf", "--layer", 0], "a control vector cannot steer at block 0"),
        (["--output", "v.bin"], "Cannot tell how to write v.bin"),
        (["--output", "v.pt", "--n-layers", 7], "has 4 layers, and n_layers is 7"),
    ],
)
def test_the_command_exits_1_with_one_sentence_on_bad_input(cli, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    make_vectors().save("v.safetensors")
    code, out, err = cli("convert", "v.safetensors", *options)
    assert (code, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


def test_the_command_exits_2_on_bad_usage(cli, tmp_path):
    write_layer_dict(make_vectors(), tmp_path / "v.pt")
    assert cli("convert", tmp_path / "v.pt", "--output", tmp_path / "w.pt", "--format", "pickle")[0] == 2
    assert cli("convert", tmp_path / "v.pt", "--output", tmp_path / "w.pt", "--position", "middle")[0] == 2
    assert cli("convert", tmp_path / "v.pt")[0] == 2
