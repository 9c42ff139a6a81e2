"""The two model classes behind one contract: residual stream, padding, cached past, suspension, identity, errors."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from persona_lens.models.forward import forward
from persona_lens.models.loading import bridge_from_transformers
from persona_lens.models.structure import (
    from_paper_layer,
    identify,
    residual_basis,
    residual_points,
    suspended,
)
from tests import naive, tiny

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def rows(tiny_tokenizer):
    """Whole texts as token ids, of many lengths."""
    return [[*prompt, *response] for prompt, response in tiny.chat_rows(tiny_tokenizer)]


@pytest.fixture(params=["llama", "gpt2"])
def pair(request, tiny_model, tiny_gpt2, tiny_hf_model, tiny_hf_gpt2):
    """A tiny model and the plain Hugging Face model of equal weights, for each architecture."""
    return (tiny_model, tiny_hf_model) if request.param == "llama" else (tiny_gpt2, tiny_hf_gpt2)


@contextmanager
def captured(model):
    """The `[batch, pos, d_model]` output of every residual point, as the next forward pass leaves it."""
    stream = []
    handles = [
        point.register_forward_hook(lambda _module, _inputs, resid: stream.append(resid.detach().clone()))
        for point in residual_points(model)
    ]
    try:
        yield stream
    finally:
        for handle in handles:
            handle.remove()


def run_alone(model, ids):
    """The `[stream, pos, d_model]` residuals and the `[pos, d_vocab]` logits of one unpadded row."""
    tokens = torch.tensor([ids])
    with captured(model) as stream:
        logits, _ = forward(model, tokens, torch.ones_like(tokens).bool(), last_logits=None)
    return torch.stack(stream)[:, 0], logits[0]


def padded(rows, left):
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), 7)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        tokens[index, place], mask[index, place] = torch.tensor(row), True
    return tokens, mask


# --- the residual stream -------------------------------------------------------------------------------------------


def test_layer_l_is_hidden_state_l_plus_one_except_at_the_last_layer(tiny_model, tiny_hf_model, rows):
    stream, _ = run_alone(tiny_model, rows[0])
    with torch.no_grad():
        hidden = tiny_hf_model(torch.tensor([rows[0]]), output_hidden_states=True).hidden_states
        assert naive.relative_error(stream[:-1], torch.cat(hidden[:-1])) < RELATIVE
        assert naive.relative_error(stream[-1:], hidden[-1]) > 0.1  # Hugging Face has put its final norm on it
        assert naive.relative_error(tiny_hf_model.get_decoder().norm(stream[-1:]), hidden[-1]) < RELATIVE


def test_stream_and_logits_are_those_of_hugging_face(rows, pair):
    model, hf_model = pair
    stream, logits = run_alone(model, rows[1])
    assert naive.relative_error(stream, naive.residual_stream(hf_model, rows[1])) < RELATIVE
    torch.testing.assert_close(logits, naive.logits(hf_model, rows[1]), rtol=RELATIVE, atol=RELATIVE)


def test_both_classes_give_the_same_stream_and_logits_on_the_embedded_model(both_classes, load_embedded_model):
    text = "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nWhat is the sea?<|im_end|>\n"
    ids = load_embedded_model("TransformerBridge").tokenizer(text, add_special_tokens=False).input_ids
    of_bridge, bridge_logits = run_alone(load_embedded_model("TransformerBridge"), ids)
    of_hooked, hooked_logits = run_alone(load_embedded_model("HookedTransformer"), ids)
    assert naive.relative_error(of_hooked.transpose(0, 1), of_bridge.transpose(0, 1)) < 1e-4
    assert (hooked_logits - bridge_logits).norm() / bridge_logits.norm() < 1e-4


def test_the_unembedding_never_runs_when_no_logits_are_asked_for(tiny_model, rows):
    fired = []
    inside = list(tiny_model.unembed.modules())
    handles = [module.register_forward_hook(lambda *_: fired.append(1)) for module in inside]
    try:
        tokens = torch.tensor([rows[0]])
        logits, _ = forward(tiny_model, tokens, torch.ones_like(tokens).bool(), keep_past=True)
        assert logits is None
        assert fired == []
        forward(tiny_model, tokens, torch.ones_like(tokens).bool(), last_logits=1)
        assert fired
    finally:
        for handle in handles:
            handle.remove()


def test_last_logits_are_the_last_of_all_and_keep_no_gradient(tiny_model, rows):
    tokens = torch.tensor([rows[0]])
    _, every = run_alone(tiny_model, rows[0])
    last, _ = forward(tiny_model, tokens, torch.ones_like(tokens).bool(), last_logits=3)
    torch.testing.assert_close(last[0], every[-3:])
    assert not last.requires_grad


# --- padding and the cached past -----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_rows_equal_unpadded_ones(rows, pair, left):
    model, _ = pair
    tokens, mask = padded(rows, left)
    with captured(model) as stream:
        logits, _ = forward(model, tokens, mask, last_logits=None)
    for index, ids in enumerate(rows):
        alone, alone_logits = run_alone(model, ids)
        assert naive.relative_error(torch.stack(stream)[:, index, mask[index]], alone) < RELATIVE
        torch.testing.assert_close(logits[index, mask[index]], alone_logits, rtol=RELATIVE, atol=RELATIVE)


def test_continuing_selected_rows_of_a_past_equals_whole_runs(tiny_tokenizer, pair):
    model, _ = pair
    texts = tiny.chat_rows(tiny_tokenizer)
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts))
    _, past = forward(model, *padded(prompts, left=True), keep_past=True)
    origins = torch.tensor([prompts.index(prompt) for prompt, _ in texts])  # out of order, some twice
    tokens, mask = padded([response for _, response in texts], left=False)
    for _ in range(2):  # a selection is a copy: the past that it came from can be selected again
        with captured(model) as stream:
            forward(model, tokens, mask, past=past.select(origins))
        for index, (prompt, response) in enumerate(texts):
            alone, _ = run_alone(model, [*prompt, *response])
            error = naive.relative_error(torch.stack(stream)[:, index, mask[index]], alone[:, len(prompt) :])
            assert error < RELATIVE


def test_a_past_can_be_continued_many_times(tiny_model, rows):
    _, every = run_alone(tiny_model, rows[0])
    tokens = torch.tensor([rows[0]])
    one = torch.ones(1, 1, dtype=torch.bool)
    _, past = forward(tiny_model, tokens[:, :4], one.expand(1, 4), keep_past=True)
    for place in range(4, tokens.shape[1]):
        logits, past = forward(tiny_model, tokens[:, place : place + 1], one, past=past, last_logits=1)
        torch.testing.assert_close(logits[0, -1], every[place], rtol=RELATIVE, atol=RELATIVE)


# --- suspended -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, KeyError])
def test_suspended_silences_hooks_and_brings_them_back_also_after_an_exception(tiny_model, rows, error):
    _, plain = run_alone(tiny_model, rows[0])
    tiny_model.add_hook("blocks.1.hook_resid_post", lambda resid, hook: resid + torch.ones(32).to(resid))
    try:
        _, steered = run_alone(tiny_model, rows[0])
        with nullcontext() if error is None else pytest.raises(error), suspended(tiny_model):
            _, inside = run_alone(tiny_model, rows[0])
            if error is not None:
                raise error
        _, after = run_alone(tiny_model, rows[0])
    finally:
        tiny_model.reset_hooks()
    assert not torch.allclose(steered, plain)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    torch.testing.assert_close(after, steered, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for a name that 5.23 renamed
def test_suspended_turns_adapters_off_and_on_again_as_they_were(tiny_tokenizer, rows):
    peft = pytest.importorskip("peft")
    base = tiny.llama(tiny_tokenizer)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)  # an adapter that was loaded to be used, not trained
    bridge = bridge_from_transformers(adapted.base_model.model, tiny_tokenizer)
    _, with_adapter = run_alone(bridge, rows[0])
    with suspended(bridge):
        _, without = run_alone(bridge, rows[0])
    _, after = run_alone(bridge, rows[0])
    torch.testing.assert_close(without, naive.logits(tiny.llama(tiny_tokenizer), rows[0]), rtol=RELATIVE, atol=RELATIVE)
    torch.testing.assert_close(after, with_adapter, rtol=0, atol=0)
    assert not torch.allclose(with_adapter, without)
    assert not any(parameter.requires_grad for name, parameter in adapted.named_parameters() if "lora" in name)


# --- identity ------------------------------------------------------------------------------------------------------


def test_an_identity_is_that_of_the_weights_whatever_zeros_are_added(fresh_tiny_model, tiny_model):
    before = identify(fresh_tiny_model)
    assert before == identify(tiny_model)  # loaded apart
    # TransformerLens 3.9 adds zeros to a bridge's unembedding and 4 does not: vectors go from one to the other.
    holder = getattr(fresh_tiny_model, "original_model", fresh_tiny_model)
    holder.register_parameter("added_bias", torch.nn.Parameter(torch.zeros(32)))
    assert identify(fresh_tiny_model) == before
    with torch.no_grad():
        for weight in fresh_tiny_model.blocks[1].mlp.parameters():
            weight.mul_(1.01)
    assert identify(fresh_tiny_model).weights_hash != before.weights_hash


def test_unprocessed_weights_leave_the_stream_raw(pair):
    assert residual_basis(pair[0]) == "raw"


def test_centred_weights_are_recognised(make_tiny_model, tiny_hf_gpt2, model_class):
    model = make_tiny_model(model_class, tiny_hf_gpt2)
    if model_class == "HookedTransformer":
        model.load_and_process_state_dict(model.state_dict(), fold_ln=False)
    else:
        model.enable_compatibility_mode(disable_warnings=True)
    assert residual_basis(model) == "centred"


def test_both_classes_have_one_embedding_sample(both_classes, make_tiny_model):
    bridge, hooked = (identify(make_tiny_model(name)) for name in ("TransformerBridge", "HookedTransformer"))
    assert bridge.embedding_sample == hooked.embedding_sample


def test_the_papers_layer_twenty_is_layer_nineteen():
    assert from_paper_layer(20) == 19
    with pytest.raises(ValueError, match="counts layers from 1, got 0"):
        from_paper_layer(0)
