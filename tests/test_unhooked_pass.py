"""Passes go around a bridge's unused hook points, miss none that is used, and leave the bridge as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

TOKENS = torch.tensor([[7, 40, 99, 130, 12, 5], [3, 81, 24, 200, 17, 9]])
MASK = torch.ones_like(TOKENS, dtype=torch.bool)


@pytest.fixture(params=["llama", "gpt2"])
def bridge(request, make_tiny_model, tiny_hf_gpt2):
    return make_tiny_model("TransformerBridge", tiny_hf_gpt2 if request.param == "gpt2" else None)


def final(model: Any, mask: torch.Tensor = MASK) -> torch.Tensor:
    from persona_lens.models.forward import forward

    logits, _ = forward(model, TOKENS, mask, last_logits=None)
    assert logits is not None
    return logits


def state(bridge: Any) -> list[Any]:
    """Every module where it stands, with its hooks, and which attention is taken."""
    return [
        *((name, id(child)) for module in bridge.modules() for name, child in module._modules.items()),
        *((id(module), list(module._forward_hooks), list(module._forward_pre_hooks)) for module in bridge.modules()),
        bridge.original_model.config._attn_implementation,
    ]


def fired(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the hook points that a pass runs."""
    from transformer_lens.hook_points import HookPoint

    names: list[str] = []
    forward = HookPoint.forward

    def counted(self: Any, *args: Any) -> Any:
        names.append(str(self.name))
        return forward(self, *args)

    monkeypatch.setattr(HookPoint, "forward", counted)
    final(bridge)
    return names


def test_of_a_block_only_an_entry_or_exit_runs_and_only_where_it_is_read(make_tiny_model, monkeypatch):
    bridge = make_tiny_model("TransformerBridge")
    assert not [name for name in fired(bridge, monkeypatch) if name.startswith("blocks.")]
    monkeypatch.undo()
    bridge.blocks[0].hook_in.add_hook(lambda resid, hook: None)
    bridge.blocks[2].hook_out.add_hook(lambda resid, hook: None)
    ran = [name for name in fired(bridge, monkeypatch) if name.startswith("blocks.")]
    assert ran == ["blocks.0.hook_in", "blocks.2.hook_out"]


def test_in_float32_the_fused_attention_agrees_with_the_one_in_steps(make_tiny_model, tiny_hf_model):
    from persona_lens.models.unhooked_pass import unhooked

    bridge = make_tiny_model("TransformerBridge", copy.deepcopy(tiny_hf_model).float())  # the fixture is everyone's
    mask = MASK.clone()
    mask[1, :2] = False
    assert unhooked(bridge).get_decoder().layers[1].self_attn.config._attn_implementation == "sdpa"
    assert bridge.original_model.config._attn_implementation == "eager"
    with torch.no_grad():
        expected = bridge(TOKENS, attention_mask=mask.long())
    torch.testing.assert_close(final(bridge, mask)[mask], expected[mask], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:A forward hook edited")
def test_every_hook_in_a_block_acts_as_it_does_in_the_bridge(bridge):
    """Each point of a block in turn is doubled, and then read: a pass that went around it would not change."""
    points = {id(point): point for name, point in bridge.hook_dict.items() if name.startswith("blocks.1.")}
    acting = 0
    with torch.no_grad():
        plain = bridge(TOKENS)
        for point in points.values():
            point.add_hook(lambda value, hook: value * 2)
            try:
                expected = bridge(TOKENS)
                torch.testing.assert_close(final(bridge), expected, atol=1e-10, rtol=0)
            finally:
                point.remove_hooks()
            acting += not torch.equal(expected, plain)
    assert acting >= 8


def assert_acts(bridge, plain):
    """The pass computes what the bridge does, and something else than before."""
    with torch.no_grad():
        expected = bridge(TOKENS)
    assert not torch.equal(final(bridge), plain)
    torch.testing.assert_close(final(bridge), expected, atol=1e-10, rtol=0)


def test_hooks_of_torch_and_a_forward_that_a_library_set_act(bridge):
    wrapper = bridge.blocks[1].mlp
    with torch.no_grad():
        torch.testing.assert_close(final(bridge), bridge(TOKENS), atol=1e-10, rtol=0)
    plain = final(bridge)
    for module in (wrapper, wrapper._modules["_original_component"], bridge.blocks[1]):
        handle = module.register_forward_hook(lambda _module, _inputs, out: out * 0.5)
        assert_acts(bridge, plain)
        handle.remove()
    vars(wrapper)["forward"] = lambda *given, **named: type(wrapper).forward(wrapper, *given, **named) * 1.5
    assert_acts(bridge, plain)
    del vars(wrapper)["forward"]


def test_a_hook_on_all_modules_acts_as_it_does_in_the_bridge(bridge):
    ran = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: ran.append(module))
    try:
        with torch.no_grad():
            bridge(TOKENS)
        expected, ran[:] = set(ran), []
        final(bridge)
    finally:
        handle.remove()
    assert {id(module) for module in ran} >= {id(module) for module in expected if module is not bridge}


def test_a_block_that_another_library_has_wrapped_is_refused_by_its_number(make_tiny_model):
    bridge = make_tiny_model("TransformerBridge")

    class Control(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *given, **named):
            return self.block(*given, **named)

    bridge.original_model.model.layers[2] = Control(bridge.original_model.model.layers[2])
    with pytest.raises(ValueError, match="Block 2 of the bridge should be TransformerLens's own, got Control"):
        final(bridge)


def test_weights_that_a_wrapper_holds_apart_act(make_tiny_model, tiny_hf_gpt2):
    bridge = make_tiny_model("TransformerBridge", tiny_hf_gpt2)
    plain = final(bridge)
    with torch.no_grad():
        bridge.blocks[0].attn.q.weight *= 0.5  # a copy: GPT-2 itself holds queries, keys and values in one matrix
    assert_acts(bridge, plain)


def test_a_bridge_in_compatibility_mode_is_left_alone(make_tiny_model, monkeypatch):
    bridge = make_tiny_model("TransformerBridge")
    bridge.enable_compatibility_mode()
    assert [name for name in fired(bridge, monkeypatch) if name.startswith("blocks.1.attn")]


def test_a_module_put_around_a_wrapper_is_run(bridge):
    """As an adapter is: in place of a wrapper that an earlier pass has taken off."""
    plain = final(bridge)
    original = bridge.blocks[1]._modules["_original_component"]

    class Halved(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.base(hidden) * 0.5

    original.mlp = Halved(original.mlp)
    assert_acts(bridge, plain)


def test_the_bridge_is_as_it_was_after_a_pass_and_after_one_that_failed(bridge):
    with torch.no_grad():
        bridge(TOKENS)  # the bridge wires points of its own in its first pass
    before = state(bridge)
    final(bridge)
    assert state(bridge) == before

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = bridge.blocks[1].hook_out.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        final(bridge)
    handle.remove()
    assert state(bridge) == before


@pytest.mark.embedded
def test_the_embedded_model_computes_what_its_bridge_computes(embedded_bridge):
    with torch.no_grad():
        expected = embedded_bridge(TOKENS)
    torch.testing.assert_close(final(embedded_bridge), expected, atol=5e-4, rtol=0)
