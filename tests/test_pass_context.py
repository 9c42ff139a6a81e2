"""Whatever runs a forward pass is acted on alike: hook lists, training, checkpointing, adapters; not so suspended ones.

Also what is read of a pass as it begins: how much it has cached, and which tokens are padding.
"""

from contextlib import ExitStack

import pytest
import torch

from persona_lens.interventions.hooks import fwd_hooks, intervene, steer
from persona_lens.interventions.values import Ablate, Cap, Steer, When
from persona_lens.models.forward import forward
from persona_lens.models.loading import bridge_from_transformers
from persona_lens.models.pass_context import KnownPass, announce, announced, watch_passes
from persona_lens.models.structure import suspended
from tests import naive, tiny
from tests.intervention_cases import EXACT, IDS, TOKENS, hooks, logits, some_vectors, stream

EVERYWHERE = torch.ones_like(TOKENS).bool()
MASK = torch.tensor([[False, True, True, False, False, True, False], [True, False, False, False, True, True, True]])
KINDS = pytest.mark.parametrize("kind", ["steer", "steer by rows", "steer where", "ablate", "cap"])


def value(kind, model):
    vectors, other = some_vectors(model), some_vectors(model, "kind", seed=1)
    return {
        "steer": lambda: Steer(vectors, -1.5),
        "steer by rows": lambda: Steer(vectors, torch.tensor([[1.0, 0.0, -2.0, 0.5], [0.5, 3.0, 0.0, 0.0]])),
        "steer where": lambda: Steer(vectors, 2.0, when=When(other, above=0.1)),
        "ablate": lambda: Ablate([vectors, other]),
        "cap": lambda: Cap(vectors, 0.5, -0.5),
    }[kind]()


# --- hook lists ----------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("at", ["all", "mask"])
def test_hook_lists_do_what_the_context_does(tiny_model, kind, at):
    each, at = value(kind, tiny_model), MASK if at == "mask" else "all"
    with intervene(tiny_model, each, at=at):
        expected, expected_stream = logits(tiny_model), stream(tiny_model)
    hook_list = fwd_hooks(tiny_model, each, at=at)
    with torch.no_grad():
        assert torch.equal(tiny_model.run_with_hooks(TOKENS, fwd_hooks=hook_list), expected)
    with tiny_model.hooks(fwd_hooks=hook_list):
        assert torch.equal(logits(tiny_model), expected)
        assert torch.equal(stream(tiny_model), expected_stream)
    vectors = some_vectors(tiny_model)
    hook_list = fwd_hooks(tiny_model, Steer([vectors.at(3), vectors.at(1)], 2.0))
    assert [name for name, _ in hook_list] == ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    assert fwd_hooks(tiny_model, Steer(vectors, 0.0)) == []


def test_generation_inside_hook_lists_is_steered(tiny_model):
    from persona_lens.generation.decoding import generate

    each, options = value("steer", tiny_model), {"max_new_tokens": 4, "temperature": 0.0}
    with intervene(tiny_model, each):
        expected = generate(tiny_model, IDS, **options)
    with tiny_model.hooks(fwd_hooks=fwd_hooks(tiny_model, each)):
        assert generate(tiny_model, IDS, **options) == expected


# --- suspended -----------------------------------------------------------------------------------------------------


@KINDS
def test_a_suspended_model_is_the_plain_one_bit_for_bit(tiny_model, kind):
    plain = logits(tiny_model)
    with intervene(tiny_model, value(kind, tiny_model)):
        steered = logits(tiny_model)
        with suspended(tiny_model):
            assert torch.equal(logits(tiny_model), plain)
        assert torch.equal(logits(tiny_model), steered)
    assert not torch.equal(steered, plain)


def test_what_is_attached_while_the_model_is_suspended_acts(tiny_model):
    before, plain = hooks(tiny_model), logits(tiny_model)
    with intervene(tiny_model, value("steer", tiny_model)):
        expected = logits(tiny_model)
    with intervene(tiny_model, value("ablate", tiny_model)), suspended(tiny_model):
        with intervene(tiny_model, value("steer", tiny_model)):
            assert torch.equal(logits(tiny_model), expected)
        assert torch.equal(logits(tiny_model), plain)
    assert hooks(tiny_model) == before


# --- training ------------------------------------------------------------------------------------------------------


def gradients(hf_model, run):
    """The gradient of every parameter of the plain model, for a loss that weighs all logits."""
    hf_model.zero_grad()
    scores = run()
    (scores * torch.linspace(-1, 1, scores.numel()).reshape(scores.shape)).mean().backward()
    found = {
        name: parameter.grad.clone() for name, parameter in hf_model.named_parameters() if parameter.grad is not None
    }
    hf_model.zero_grad()
    return {name.replace("_original_component.", ""): gradient for name, gradient in found.items()}


def slow_edits(kind, vectors):
    def edit_of(direction):
        unit = direction / direction.norm()

        def edit(resid):
            inside = (resid @ unit)[..., None]
            return {
                "steer": resid - 1.5 * direction,
                "ablate": resid - inside * unit,
                "cap": resid + (inside.clamp(-0.5, 0.5) - inside) * unit,
            }[kind]

        return edit

    return {layer: edit_of(row.double()) for layer, row in enumerate(vectors.directions)}


@pytest.mark.parametrize("kind", ["steer", "ablate", "cap"])
def test_gradients_flow_through_as_through_the_formula(tiny_tokenizer, kind):
    plain, wrapped = tiny.llama(tiny_tokenizer), tiny.llama(tiny_tokenizer)
    names = [name for name, _ in plain.named_parameters()]
    bridge = bridge_from_transformers(wrapped, tiny_tokenizer)
    vectors = some_vectors(bridge)
    each = {"steer": Steer(vectors, -1.5), "ablate": Ablate(vectors), "cap": Cap(vectors, 0.5, -0.5)}[kind]
    with intervene(bridge, each):
        found = gradients(wrapped, lambda: bridge(TOKENS))
    with naive.edited(plain, slow_edits(kind, vectors)):
        expected = gradients(plain, lambda: plain(TOKENS).logits)
    assert set(names) <= set(found)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["steer", "ablate", "cap"])
def test_gradients_flow_to_the_lowest_layer_also_after_the_model_has_generated_in_the_same_context(tiny_model, kind):
    # generate() may run in inference mode; what it leaves behind must serve a training step all the same
    below = list(tiny_model.blocks[0].parameters())
    with intervene(tiny_model, value(kind, tiny_model)):
        tiny_model.generate(TOKENS[:1], max_new_tokens=2, do_sample=False, verbose=False)
        scores = tiny_model(TOKENS)
    found = [one for one in torch.autograd.grad(scores.square().mean(), below, allow_unused=True) if one is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in found)
    assert max(float(gradient.abs().max()) for gradient in found) > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward", ["inside", "after leaving"])
def test_gradient_checkpointing_changes_no_gradient(tiny_tokenizer, reentrant, backward):
    wrapped = tiny.llama(tiny_tokenizer).train()
    bridge = bridge_from_transformers(wrapped, tiny_tokenizer)
    wrapped.train()
    vectors, runs = some_vectors(bridge), []
    bridge.blocks[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def steered_gradients():
        with ExitStack() as stack:
            stack.enter_context(steer(bridge, vectors, 2.0))
            scores = wrapped(TOKENS, use_cache=False).logits
            if backward == "after leaving":
                stack.close()
            return gradients(wrapped, lambda: scores)

    expected = steered_gradients()
    wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
    wrapped.enable_input_require_grads()  # what reentrant checkpointing needs to see a gradient
    found = steered_gradients()
    assert len(runs) == 1 + 2  # the second time once more on the way back
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for a name that 5.23 renamed
@pytest.mark.parametrize("at", ["all", "response"])
def test_an_adapter_around_the_model_is_steered_too(tiny_tokenizer, at):
    peft = pytest.importorskip("peft")
    bridge = bridge_from_transformers(tiny.llama(tiny_tokenizer), tiny_tokenizer)
    config = peft.LoraConfig(r=2, target_modules=r".*(q_proj|down_proj)\._original_component", init_lora_weights=False)
    adapted = peft.get_peft_model(bridge.original_model, config)
    vectors, tokens = some_vectors(bridge), TOKENS[:1]
    lengths = None if at == "all" else [4]
    with torch.no_grad():
        plain = adapted(tokens).logits
        with steer(bridge, vectors, 2.0, at=at, prompt_lengths=lengths):
            found = adapted(tokens).logits
        places = slice(None) if at == "all" else slice(3, None)
        additions = {layer: 2 * row.double() for layer, row in enumerate(vectors.directions)}
        with naive.added_at(bridge.original_model, additions, places):
            expected = adapted(tokens).logits
    torch.testing.assert_close(found, expected, **EXACT)
    assert not torch.allclose(found, plain)
    assert adapter_gradients(bridge, adapted, vectors)


def adapter_gradients(bridge, adapted, vectors):
    """Whether the adapter can be trained under steering."""
    with steer(bridge, vectors, 2.0):
        adapted(TOKENS).logits.square().mean().backward()
    found = [weight.grad for name, weight in adapted.named_parameters() if "lora" in name and weight.grad is not None]
    return bool(found) and all(bool(gradient.isfinite().all()) for gradient in found)


# --- what is read of a pass ----------------------------------------------------------------------------------------


def test_the_cache_and_the_mask_of_a_pass_are_read_as_it_begins(tiny_model):
    before, padded = hooks(tiny_model), EVERYWHERE.clone()
    padded[0, -3:] = False
    with watch_passes(tiny_model, [2]) as current:
        forward(tiny_model, TOKENS, EVERYWHERE)
        assert current.cached is None
        _, past = forward(tiny_model, TOKENS, padded, keep_past=True)
        assert (current.cached, current.mask.tolist()) == (0, padded.tolist())
        forward(tiny_model, TOKENS[:, :2], EVERYWHERE[:, :2], past=past)
        assert current.cached == TOKENS.shape[1]
        assert current.mask.tolist() == torch.cat([padded, EVERYWHERE[:, :2]], dim=1).tolist()
        logits(tiny_model)
        assert (current.cached, current.number) == (None, 4)
    assert hooks(tiny_model) == before


def test_what_is_announced_holds_for_the_passes_inside_alone():
    outer, inner = KnownPass(rows=torch.arange(2)), KnownPass()
    with announce(outer):
        with pytest.raises(KeyError), announce(inner):
            raise KeyError
        assert announced() is outer
    assert announced() is None
