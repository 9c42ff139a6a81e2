"""On a device without float64, as Apple's GPUs are, nothing of ours is made in float64, and the numbers are equal."""

import copy

import pytest
import torch

from persona_lens.activations.means import attached_projections, mean_activations
from persona_lens.chat.batches import ChatTokens, collate
from persona_lens.generation.decoding import generate
from persona_lens.generation.sampling import row_uniforms, sample
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Ablate, Cap, Steer
from persona_lens.models.forward import forward
from persona_lens.models.loading import bridge_from_transformers
from persona_lens.models.structure import identify
from tests.float32_device import Placed, float32_device, on_device
from tests.vector_cases import random_tensor


@pytest.fixture
def on_cpu(tiny_hf_model, tiny_tokenizer):
    return bridge_from_transformers(copy.deepcopy(tiny_hf_model).float(), tiny_tokenizer)


@pytest.fixture
def placed(tiny_hf_model, tiny_tokenizer):
    return on_device(bridge_from_transformers(copy.deepcopy(tiny_hf_model).float(), tiny_tokenizer))


def test_the_pretended_device_refuses_float64_and_meeting_the_cpu():
    with float32_device() as device:
        there = torch.ones(3, device=device)
        assert (there + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(TypeError, match="no"):
            there.double()
        with pytest.raises(TypeError, match="no"):
            torch.ones(3, dtype=torch.float64).to(device)
        with pytest.raises(AssertionError, match="two devices"):
            torch.add(there, torch.ones(3))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("size", [40, 1000, 5000])
def test_a_device_without_float64_draws_the_tokens_that_the_cpu_draws(temperature, top_p, size):
    logits = 4 * random_tensor(64, size)
    uniforms = row_uniforms(3, [str(row) for row in range(64)], 1)[:, 0]
    expected = sample(logits, uniforms, temperature=temperature, top_p=top_p)
    with float32_device() as device:
        found = sample(logits.to(device), uniforms, temperature=temperature, top_p=top_p)
        assert found.device == device
        assert found.cpu().tolist() == expected.tolist()


def test_a_model_there_generates_the_tokens_that_it_generates_on_the_cpu(on_cpu, placed):
    from persona_lens.models.loading import _probe_logits

    prompts = [(1, 60, 70), (1, 80, 90, 100, 110)]
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 1, "keys": ["a", "b"], "progress": False}
    expected = [row.tokens for row in generate(on_cpu, prompts, **settings)]
    with float32_device():
        assert [row.tokens for row in generate(placed, prompts, **settings)] == expected
        probe = _probe_logits(placed.original_model, placed.original_model)
    assert (probe.device.type, probe.dtype) == ("cpu", torch.float64)


def some_vectors(model):
    from persona_lens.vectors.persona_vectors import PersonaVectors

    return PersonaVectors.from_directions(random_tensor(4, 32), trait="evil", residual_norm=torch.ones(4))


@pytest.mark.parametrize("kind", ["steer", "steer rows", "ablate", "cap"])
def test_interventions_there_do_what_they_do_on_the_cpu(on_cpu, placed, kind):
    vector = some_vectors(on_cpu).at(1)
    make = {
        "steer": lambda: Steer(vector, 2.0),
        "steer rows": lambda: Steer(vector, torch.tensor([2.0, -1.0])),
        "ablate": lambda: Ablate(vector),
        "cap": lambda: Cap(vector, maximum=0.1),
    }[kind]
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])

    def logits(model):
        with intervene(model, make()):
            return forward(model, tokens, torch.ones(2, 3).bool(), last_logits=1)[0].cpu()

    expected = logits(on_cpu)
    with float32_device():
        found = logits(placed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_means_and_projections_there_are_those_of_the_cpu(on_cpu, placed):
    batch = collate([ChatTokens((5, 6, 7), (8, 9)), ChatTokens((5, 6), (10, 11, 12))])
    vectors = some_vectors(on_cpu)

    def read(model):
        means = mean_activations(model, batch)
        with attached_projections(model, [vectors.at(1), vectors.at(3)]) as found:
            forward(model, batch.tokens, batch.attention_mask, last_logits=0)
        return means, found.read()

    expected = read(on_cpu)
    with float32_device():
        found = read(placed)
        identity = identify(placed)
    for one, other in zip(found, expected, strict=True):
        assert not isinstance(one, Placed)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert identity == identify(on_cpu)
