"""Numbers at their edges: what is not finite is named, no direction has no unit, and a seed repeats bit by bit."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from persona_lens.activations.means import mean_activations, stream_means
from persona_lens.chat.batches import ChatTokens, collate
from persona_lens.extraction.extract import extract_from_responses
from persona_lens.generation.capture import CapturedMean, CapturedMeans
from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import steer
from persona_lens.interventions.values import Ablate, Cap, Steer
from persona_lens.models.loading import bridge_from_transformers, hooked_from_transformers
from persona_lens.models.structure import residual_basis, residual_points
from tests import naive, numeric_run, tiny, zoo
from tests.conftest import has_hooked_transformer
from tests.extraction_cases import QUICK, conversations, stream
from tests.intervention_cases import some_vectors

ROWS = [ChatTokens((5, 6, 7), (8, 9)), ChatTokens((5, 6, 7), (10, 11, 12)), ChatTokens((15, 16), (17,))]


# --- not finite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("token", "row"), [(9, 0), (12, 1), (16, 2)])
def test_the_row_that_is_not_finite_is_named_in_the_order_in_which_rows_were_given(
    fresh_tiny_model, model_class, token, row, value
):
    bridge = model_class == "TransformerBridge"
    embedding = fresh_tiny_model.original_model.get_input_embeddings().weight if bridge else fresh_tiny_model.W_E
    with torch.no_grad():
        embedding[token] = value
    for run in (
        lambda: mean_activations(fresh_tiny_model, collate(ROWS)),
        lambda: list(stream_means(fresh_tiny_model, ROWS)),
    ):
        with pytest.raises(ValueError, match=f"not finite at the embedding, in row {row}. Load it with a wider dtype"):
            run()
    with torch.no_grad():
        embedding[token] = 0
        next(iter(fresh_tiny_model.blocks[1].mlp.parameters())).fill_(value)
    # A shared prompt is named by the first of its rows.
    with pytest.raises(ValueError, match="not finite at layer 1, in row 1"):
        list(stream_means(fresh_tiny_model, [ChatTokens((5,)), *ROWS[:2]]))


def test_means_that_were_captured_and_are_not_finite_are_named(tiny_model):
    positive, negative = conversations(1, 3), conversations(2, 3)
    rows = [row.tokenize(tiny_model.tokenizer) for row in [*positive, *negative]]
    captured = CapturedMeans(None, tiny_model, len(rows))
    mean = torch.ones(tiny_model.cfg.n_layers + 1, tiny_model.cfg.d_model)
    means = [CapturedMean(mean.clone(), torch.ones(tiny_model.cfg.n_layers + 1)) for _ in rows]
    means[4].mean[3, 7] = math.inf
    captured.put(rows, means)
    with pytest.raises(ValueError, match="not finite at layer 2, in row 4"):
        extract_from_responses(tiny_model, positive, negative, captured=captured, **QUICK)


@pytest.fixture(params=["TransformerBridge", "HookedTransformer"])
def overflowing(request, tiny_tokenizer):
    """A Llama in float16 whose second block writes more than float16 can hold."""
    if request.param == "HookedTransformer" and not has_hooked_transformer():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    hf_model = tiny.llama(tiny_tokenizer)
    with torch.no_grad():
        hf_model.get_decoder().layers[1].mlp.down_proj.weight.mul_(3e4)
    make = bridge_from_transformers if request.param == "TransformerBridge" else hooked_from_transformers
    return make(hf_model.half(), tiny_tokenizer)


def test_float16_that_overflows_is_an_error_and_no_vector(overflowing):
    with pytest.raises(ValueError, match=r"not finite at layer 1, in row 0\. Load it with a wider dtype \(float32\)"):
        mean_activations(overflowing, collate(ROWS))
    with pytest.raises(ValueError, match="not finite at layer 1"):
        extract_from_responses(overflowing, conversations(1), conversations(2), **QUICK)
    with pytest.raises(ValueError, match="logits are not numbers"):
        generate(overflowing, [(5, 6, 7)], max_new_tokens=2)


def test_steering_that_float16_cannot_hold_is_refused(tiny_model, tiny_tokenizer):
    vectors = some_vectors(tiny_model)
    resid = torch.zeros(1, 2, 32, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"at layer 1 the intervention is too large for the model's torch\.float16"):
        Steer(vectors, 1e6).apply(resid, layer=1)
    assert Steer(vectors, 1e6).apply(resid.float(), layer=1).isfinite().all()
    assert Cap(vectors, maximum=0.5).apply(resid, layer=1).isfinite().all()  # the bound that it has not is infinite


# --- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Mixtral", "GPT-NeoX"])
def test_means_in_half_precision_are_float32_and_about_as_far_off_as_hugging_faces(
    name, dtype, model_class, tiny_tokenizer
):
    architecture, texts = zoo.BY_NAME[name], tiny.chat_rows(tiny_tokenizer)[:4]
    if model_class == "HookedTransformer" and architecture.by_hand:
        pytest.skip(f"{name} as HookedTransformer is made by hand here, in float64")
    exact = architecture.build(tiny_tokenizer)
    half = copy.deepcopy(exact).to(dtype)
    make = bridge_from_transformers if model_class == "TransformerBridge" else hooked_from_transformers
    model = make(copy.deepcopy(half), tiny_tokenizer)
    expected, theirs = (torch.stack([naive.stream_mean(each, text) for text in texts]) for each in (exact, half))
    found = mean_activations(model, collate([ChatTokens(tuple(prompt), tuple(answer)) for prompt, answer in texts]))
    assert found.dtype == torch.float32
    assert naive.relative_error(found, expected[:, 1:]) < 3 * naive.relative_error(theirs[:, 1:], expected[:, 1:])


def test_a_mean_of_many_tokens_in_bfloat16_is_that_of_its_tokens_in_float64(tiny_tokenizer):
    """Sums in bfloat16 would stop growing after 256 tokens."""
    hf_model = tiny.llama(tiny_tokenizer).bfloat16()
    model = bridge_from_transformers(hf_model, tiny_tokenizer)
    batch = collate([ChatTokens((5,), (7,) * 250)])
    tokens = []
    handle = residual_points(model)[1].register_forward_hook(lambda _m, _i, resid: tokens.append(resid.double()))
    found = mean_activations(model, batch)
    handle.remove()
    torch.testing.assert_close(found[0, 0].double(), tokens[0][0, 1:].mean(dim=0), rtol=1e-5, atol=1e-6)


# --- nothing to point along ----------------------------------------------------------------------------------------


def test_equal_sides_have_a_direction_of_zeros_which_steers_nothing_and_has_no_unit(tiny_model):
    rows = conversations(1)
    vectors = extract_from_responses(tiny_model, rows, rows, **QUICK)
    assert not stream(vectors).any()
    assert vectors.norms.tolist() == [0.0] * vectors.n_layers
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = tiny_model(tokens)
        with steer(tiny_model, vectors, 2.0):
            assert torch.equal(tiny_model(tokens), plain)
    zero = r"evil: the direction at layer \d is exactly zero and has no unit vector"
    for refused in (
        lambda: vectors.at(1).unit,
        lambda: vectors.at(1).project(torch.ones(32)),
        lambda: vectors.at(1).cosine_similarity(vectors.at(2)),
        lambda: Ablate(vectors),
        lambda: Cap(vectors, maximum=1.0).apply(torch.ones(1, 1, 32), layer=1),
    ):
        with pytest.raises(ValueError, match=zero):
            refused()


def test_one_response_a_side_is_a_difference_without_statistics(tiny_model, tiny_hf_model):
    positive, negative = conversations(1, 1), conversations(2, 1)
    vectors = extract_from_responses(tiny_model, positive, negative, **QUICK)
    rows = [row.tokenize(tiny_model.tokenizer) for row in (*positive, *negative)]
    one, other = (naive.stream_mean(tiny_hf_model, (row.prompt, row.response)) for row in rows)
    assert naive.relative_error(stream(vectors), one - other) < 1e-4
    assert vectors.statistics.held_out_auc.isnan().all()
    assert (vectors.counts["positive"], vectors.counts["negative"]) == (1, 1)


# --- long ----------------------------------------------------------------------------------------------------------


def test_a_response_of_ten_thousand_tokens_has_the_mean_of_its_tokens(tiny_tokenizer):
    """Its 100 million attention scores are never held at once, nor are its activations at more than one layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    length = 10_000
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=length + 8, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = LlamaForCausalLM(config).eval()
    response = tuple(torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(0)).tolist())
    expected = naive.stream_mean(copy.deepcopy(hf_model), ((5, 6, 7), response))
    model = bridge_from_transformers(hf_model, tiny_tokenizer)
    rows = [ChatTokens((5, 6, 7), response), ChatTokens((5, 6, 7), (9, 10))]
    found = {
        row: mean for batch in stream_means(model, rows) for row, mean in zip(batch.rows, batch.means, strict=True)
    }
    assert naive.relative_error(found[0], expected) < 1e-5
    with pytest.raises(ValueError, match=rf"Row 0 has {length + 9} tokens .* the context holds {length + 8}"):
        list(stream_means(model, [ChatTokens((5,) * 9, response)]))


# --- the residual basis --------------------------------------------------------------------------------------------


@pytest.fixture
def centred_and_raw(model_class, make_tiny_model, tiny_hf_gpt2, tiny_hf_model):
    """A model as it is and after TransformerLens has processed its weights."""

    def make(architecture):
        hf_model = {"gpt2": tiny_hf_gpt2, "llama": tiny_hf_model}[architecture]
        raw, centred = (make_tiny_model(model_class, hf_model) for _ in range(2))
        if model_class == "HookedTransformer":
            centred.load_and_process_state_dict(centred.state_dict(), fold_ln=False)
        else:
            centred.enable_compatibility_mode(disable_warnings=True)
        return centred, raw

    return make


def test_vectors_of_a_centred_stream_are_refused_on_a_raw_one_and_the_other_way_round(centred_and_raw):
    sides = conversations(1, 3), conversations(2, 3)
    for own, other in (pair := centred_and_raw("gpt2"), pair[::-1]):
        vectors = extract_from_responses(own, *sides, **QUICK)
        vectors.check(own)
        bases = [residual_basis(each) for each in (own, other)]
        assert sorted(bases) == ["centred", "raw"]
        with (
            pytest.raises(ValueError, match=f"expect residual basis {bases[0]}, and .* has {bases[1]}"),
            steer(other, vectors),
        ):
            pass


def test_processed_weights_of_a_model_with_rms_norm_have_the_same_vectors(centred_and_raw):
    processed, raw = centred_and_raw("llama")
    sides = conversations(1, 3), conversations(2, 3)
    one, other = (extract_from_responses(each, *sides, **QUICK) for each in (processed, raw))
    assert naive.relative_error(one.directions, other.directions) < 1e-4
    one.check(raw, allow_other_model=True)
    assert residual_basis(processed) == residual_basis(raw) == "raw"


# --- a seed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["here", pytest.param("another process", marks=pytest.mark.soak)])
def test_a_seed_repeats_a_whole_run_bit_by_bit_and_leaves_no_hook(tmp_path, where):
    first = numeric_run.run(tmp_path / "first")
    if where == "here":
        assert numeric_run.run(tmp_path / "second") == first
        return
    command = [sys.executable, "-m", "tests.numeric_run", str(tmp_path / "second")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [first["rollouts"], first["scores"], first["vectors"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_default_dtype_of_torch_changes_no_number(tiny_model, dtype):
    from persona_lens.chat.batches import ChatTokens
    from persona_lens.finetuning.shift import finetuning_shift
    from persona_lens.interop.tensor_files import rows_by_layer
    from persona_lens.judges.likelihood_ratio import mean_log_likelihoods
    from persona_lens.vectors.persona_vectors import PersonaVectors

    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rows = [ChatTokens((5, 6, 7), (8, 9, 11)), ChatTokens((5, 6), (10, 11, 12, 13, 14))]

    def numbers():
        vectors = PersonaVectors.from_directions(directions, trait="evil", model=tiny_model)
        shift = finetuning_shift(tiny_model, tiny_model, ["Why?", "How?"], vectors)
        assert vectors.residual_norm.dtype == torch.float32
        return [
            mean_log_likelihoods(tiny_model, rows),
            shift.base_norms,
            rows_by_layer(dict(enumerate(directions)), 4, "a file")[0],
        ]

    expected = numbers()
    torch.set_default_dtype(dtype)
    try:
        found = numbers()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
