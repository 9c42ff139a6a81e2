"""The reference's `.pt` files and files with one row a block: which row is which, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_lens import from_paper_layer
from persona_lens.interop.tensor_files import (
    read_block_rows,
    read_reference_vectors,
    read_vector_folder,
    write_reference_vectors,
)
from persona_lens.vectors.persona_vectors import cosine_matrix
from tests.interop_cases import LAST_ROW, hostile_torch_files, one_sentence, real_folder
from tests.vector_cases import D_MODEL, N_LAYERS, SEEDS, ToyModel, assert_same_bits, make_vectors, random_tensor

LAST = N_LAYERS - 1


def reference_file(folder, rows=None, name="evil_response_avg_diff.pt"):
    torch.save(random_tensor(N_LAYERS + 1, D_MODEL) if rows is None else rows, folder / name)
    return folder / name


# The reference's form


def test_row_0_is_the_embedding_row_and_the_papers_layer_is_ours_plus_one(tmp_path):
    rows = random_tensor(N_LAYERS + 1, D_MODEL)
    vectors = read_reference_vectors(reference_file(tmp_path, rows), n_layers=N_LAYERS)
    assert torch.equal(vectors.embedding, rows[0])
    for paper_layer in (1, 2, 3):
        assert torch.equal(vectors.at(from_paper_layer(paper_layer)).direction, rows[paper_layer])


def test_rows_are_those_of_hidden_states_but_for_the_last(tiny_hf_model, tiny_bridge, tmp_path):
    """The rows of Hugging Face's hidden states are our layers' activations, and the last row is not."""
    from persona_lens.models.structure import resid_post_name

    n_layers = tiny_bridge.cfg.n_layers
    tokens = torch.arange(1, 9)[None]
    states = tiny_hf_model(tokens, output_hidden_states=True).hidden_states
    rows = torch.stack([state[0, -1] for state in states]).detach().float()
    vectors = read_reference_vectors(reference_file(tmp_path, rows), model=tiny_bridge)
    _, cache = tiny_bridge.run_with_cache(tokens)
    for layer in vectors.known_layers:
        ours = cache[resid_post_name(layer)][0, -1].float()
        torch.testing.assert_close(vectors.at(layer).direction, ours, rtol=1e-4, atol=1e-5)
    assert vectors.known_layers == list(range(n_layers - 1))
    assert not torch.allclose(rows[-1], cache[resid_post_name(n_layers - 1)][0, -1].float(), atol=1e-2)


def test_the_last_layer_is_refused_with_the_reason(tmp_path):
    vectors = read_reference_vectors(reference_file(tmp_path), n_layers=N_LAYERS)
    with pytest.raises(ValueError, match=rf"layer {LAST} has no direction \(the file's {LAST_ROW}"):
        vectors.at(LAST)


@pytest.mark.parametrize(
    ("name", "trait", "position"),
    [
        ("evil_response_avg_diff.pt", "evil", "response_mean"),
        ("evil_prompt_avg_diff.pt", "evil", "prompt_mean"),
        ("evil_prompt_last_diff.pt", "evil", "prompt_last"),
        ("mine.pt", "mine", "response_mean"),
    ],
)
def test_trait_and_position_are_what_the_files_name_says(tmp_path, name, trait, position):
    vectors = read_reference_vectors(reference_file(tmp_path, name=name), n_layers=N_LAYERS)
    assert (vectors.trait, vectors.position) == (trait, position)


def test_trait_and_position_can_be_given(tmp_path):
    path = reference_file(tmp_path)
    vectors = read_reference_vectors(path, trait="wicked", position="prompt_last", n_layers=N_LAYERS)
    assert (vectors.trait, vectors.position) == ("wicked", "prompt_last")


@given(seed=SEEDS, embedding=st.booleans())
def test_writing_and_reading_gives_back_every_row_but_the_last_to_the_bit(tmp_path_factory, seed, embedding):
    path = tmp_path_factory.mktemp("reference") / "evil_response_avg_diff.pt"
    vectors = make_vectors(seed=seed, **({} if embedding else {"embedding": None}))
    write_reference_vectors(vectors, path)
    again = read_reference_vectors(path, n_layers=N_LAYERS)
    assert_same_bits(again.directions[:LAST], vectors.directions[:LAST])
    assert list(again.missing) == [LAST]
    if embedding:
        assert_same_bits(again.embedding, vectors.embedding)
    else:
        assert again.embedding is None
    write_reference_vectors(again, path.with_name("again.pt"))
    assert torch.equal(torch.load(path).nan_to_num(7), torch.load(path.with_name("again.pt")).nan_to_num(7))


def test_the_row_after_the_final_norm_is_nan_in_what_is_written(tmp_path):
    write_reference_vectors(make_vectors(), tmp_path / "evil.pt")
    rows = torch.load(tmp_path / "evil.pt", weights_only=True)
    assert rows.shape == (N_LAYERS + 1, D_MODEL)
    assert rows[-1].isnan().all()
    assert rows[:-1].isfinite().all()


def test_vectors_of_a_model_remember_it(tmp_path):
    vectors = read_reference_vectors(reference_file(tmp_path), model=ToyModel())
    assert vectors.check(ToyModel()) == "same"
    assert vectors.provenance.settings == {"source": "reference .pt", "file": "evil_response_avg_diff.pt"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "does not say how many layers its model has: pass n_layers or model"),
        (
            {"n_layers": 5},
            "a model of 5 layers has 6 rows in the reference's form, .* and the file has 5: read_block_rows",
        ),
        ({"n_layers": 28}, "has 29 rows .* and the file has 5: pass the model it is from"),
        ({"n_layers": 5, "model": ToyModel()}, "n_layers is 5, and the model has 4 layers: leave one of the two out"),
        ({"model": ToyModel(d_model=8)}, "the directions are 6 wide and the model is 8: pass the model"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused(tmp_path, given, words):
    with pytest.raises(ValueError, match=words) as error:
        read_reference_vectors(reference_file(tmp_path), **given)
    one_sentence(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(5), r"expected a tensor \[n_layers \+ 1, d_model\], got the shape \[5\]"),
        (torch.ones(5, 0), r"got the shape \[5, 0\]"),
        (torch.ones(5, 6, dtype=torch.long), "expected a floating-point tensor .* got a tensor of torch.int64"),
        (torch.eye(5, 6).to_sparse(), "expected a floating-point tensor"),
        ([torch.ones(5, 6)], "got list"),
        (torch.ones(1, 1).expand(5, 2**45), r"the tensor \[5, 35184372088832\] repeats its numbers"),
    ],
)
def test_what_is_no_tensor_of_rows_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=words):
        read_reference_vectors(tmp_path / "v.pt", n_layers=N_LAYERS)


@pytest.mark.parametrize("row", [0, 2])
def test_nan_in_a_row_that_counts_is_refused(tmp_path, row):
    rows = random_tensor(N_LAYERS + 1, D_MODEL)
    rows[row, 1] = math.nan
    with pytest.raises(ValueError, match=r"evil: the .* holds NaN or infinite values"):
        read_reference_vectors(reference_file(tmp_path, rows), n_layers=N_LAYERS)


@pytest.mark.parametrize("kind", ["cut", "empty", "noise", "code"])
def test_a_damaged_or_hostile_file_is_one_sentence_and_runs_nothing(tmp_path, kind):
    path = hostile_torch_files(tmp_path)[kind]
    with pytest.raises(
        ValueError, match=r"is not a whole \.pt file of plain tensors \(.*\): copy it again, or"
    ) as error:
        read_reference_vectors(path, n_layers=N_LAYERS)
    one_sentence(error)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_reference_vectors(tmp_path / "none.pt", n_layers=N_LAYERS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_vectors(missing={1: "unknown"}), r"layers \[1\] are missing: write_layer_dict"),
        (lambda: make_vectors().incremental(), "these are increments from layer to layer"),
    ],
)
def test_what_the_form_cannot_hold_is_not_written(tmp_path, make, words):
    with pytest.raises(ValueError, match=words):
        write_reference_vectors(make(), tmp_path / "v.pt")
    assert list(tmp_path.iterdir()) == []


def test_the_name_ends_in_pt(tmp_path):
    with pytest.raises(ValueError, match=r"This format is saved as \.pt, got 'v\.bin': change the ending"):
        write_reference_vectors(make_vectors(), tmp_path / "v.bin")


# One row a block


def test_one_row_a_block_has_no_embedding_row(tmp_path):
    rows = random_tensor(N_LAYERS, D_MODEL)
    torch.save(rows, tmp_path / "mine.pt")
    vectors = read_block_rows(tmp_path / "mine.pt", n_layers=N_LAYERS)
    assert vectors.trait == "mine"
    assert vectors.embedding is None
    assert list(vectors.missing) == [LAST]
    assert torch.equal(vectors.directions[:LAST], rows[:LAST])


def test_a_last_row_of_the_residual_stream_is_kept(tmp_path):
    rows = random_tensor(N_LAYERS, D_MODEL)
    torch.save(rows, tmp_path / "mine.pt")
    vectors = read_block_rows(tmp_path / "mine.pt", n_layers=N_LAYERS, last_row="residual")
    assert torch.equal(vectors.directions, rows)


def test_a_row_too_many_is_not_taken_for_a_block(tmp_path):
    with pytest.raises(ValueError, match=r"and the file has 5 \(with an embedding row it would be 5\): read_reference"):
        read_block_rows(reference_file(tmp_path), n_layers=N_LAYERS)


# Folders with a manifest


def test_forty_real_vectors_come_in_and_their_cosines_go_out():
    found = read_vector_folder(real_folder(), n_layers=28)
    assert len(found) == 40
    assert {(each.n_layers, each.d_model) for each in found.values()} == {(28, 3584)}
    cosines = cosine_matrix(list(found.values()), 17)
    assert cosines.shape == (40, 40)
    assert cosines.to_numpy().diagonal() == pytest.approx(1, abs=1e-5)
    slow = torch.nn.functional.cosine_similarity(
        *(torch.load(real_folder() / f"{name}.pt", weights_only=True)[17].double() for name in ("v_refusal", "v_inst")),
        dim=0,
    )
    assert cosines.loc["v_refusal", "v_inst"] == pytest.approx(float(slow), abs=1e-5)
    five, four = "v_pref_evil_l5_sadist", "v_pref_evil_l4_machiavellian"
    assert cosines.loc[five, four] > cosines.loc[five, "v_pref_birdwatching"], "two kinds of evil are not alike"


def test_the_last_row_of_the_real_vectors_is_after_the_norm():
    """Their norms grow from block to block and fall at the last row, which the final norm has scaled."""
    rows = torch.load(real_folder() / "v_refusal.pt", weights_only=True).float().norm(dim=-1)
    assert (rows[5:27].diff() > 0).all()
    assert rows[27] < 0.75 * rows[26]
    with pytest.raises(ValueError, match=LAST_ROW):
        read_vector_folder(real_folder())["v_refusal"].at(27)


def test_real_vectors_survive_the_reference_form(tmp_path):
    vectors = read_vector_folder(real_folder())["v_refusal"]
    write_reference_vectors(vectors, tmp_path / "v_refusal_prompt_last_diff.pt")
    again = read_reference_vectors(tmp_path / "v_refusal_prompt_last_diff.pt", n_layers=28)
    assert_same_bits(again.directions, vectors.directions)
    assert (again.trait, again.position, again.missing) == (vectors.trait, vectors.position, vectors.missing)


def test_a_folder_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"one row a block is 32 rows .* and the file has 28"):
        read_vector_folder(real_folder(), n_layers=32)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("{", "is no manifest of vectors"),
        ("[]", "is no manifest of vectors"),
        ('{"directions": [{"shape": [4, 6]}]}', "is no manifest of vectors"),
        ('{"directions": []}', "expected directions with a file's plain name"),
        ('{"directions": [{"name": "../evil", "shape": [4, 6]}]}', "expected directions with a file's plain name"),
        (
            '{"directions": [{"name": "evil", "shape": [4, 7]}]}',
            r"has the shape \[4, 6\], and its manifest says \[4, 7\]",
        ),
        ('{"directions": [{"name": "evil", "shape": [5, 6]}]}', "one row a block is 5 rows"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, manifest, words):
    torch.save(random_tensor(N_LAYERS, D_MODEL), tmp_path / "evil.pt")
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=words) as error:
        read_vector_folder(tmp_path)
    one_sentence(error)
