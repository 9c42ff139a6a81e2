"""Finetuning shifts against the obvious way: both plain Hugging Face models, one prompt at a time, subtracted."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from persona_lens.finetuning.shift import FinetuningShift, finetuning_shift
from persona_lens.interventions.hooks import steer
from persona_lens.models.loading import bridge_from_transformers
from persona_lens.models.structure import identify
from persona_lens.rollouts.collection import plan_rollouts
from persona_lens.traits.trait import load_trait
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests import naive, tiny
from tests.chat_cases import counted
from tests.intervention_cases import some_vectors
from tests.shift_cases import (
    CLOSE,
    PEFT_WARNS,
    QUESTIONS,
    assert_same,
    question_tokens,
    random_adapter,
    slow_differences,
)
from tests.vector_cases import random_tensor, slow_projection


@pytest.fixture(scope="module")
def changed_hf_model(tiny_hf_model):
    """As finetuning leaves it: other blocks, the same embeddings."""
    changed = copy.deepcopy(tiny_hf_model)
    with torch.no_grad():
        for seed, block in enumerate(naive.blocks(changed)):
            for parameter in block.parameters():
                parameter += 0.02 * random_tensor(*parameter.shape, seed=seed)
    return changed


@pytest.fixture(scope="module")
def finetuned(model_class, make_tiny_model, changed_hf_model):
    return make_tiny_model(model_class, changed_hf_model)


# --- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_budget", [1, 60, 4096])
def test_it_is_the_difference_of_the_last_prompt_tokens_along_the_unit_vectors(
    tiny_model, finetuned, tiny_hf_model, changed_hf_model, tiny_tokenizer, token_budget
):
    vectors = [some_vectors(tiny_model), some_vectors(tiny_model, "kind", seed=1)]
    found = finetuning_shift(tiny_model, finetuned, QUESTIONS, vectors, token_budget=token_budget)
    slow = slow_differences(tiny_hf_model, changed_hf_model, tiny_tokenizer)
    for prompt in range(len(QUESTIONS)):
        for layer in range(4):
            expected = [slow_projection(slow[prompt, layer], each.directions[layer]) for each in vectors]
            assert found.projections[prompt, :, layer].tolist() == pytest.approx(expected, abs=CLOSE)
    torch.testing.assert_close(found.norms.double(), slow.norm(dim=-1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(found.mean_norms.double(), slow.mean(dim=0).norm(dim=-1), rtol=0, atol=CLOSE)
    assert float(slow.norm(dim=-1).min()) > 100 * CLOSE
    assert (found.traits, found.questions) == (("evil", "kind"), tuple(QUESTIONS))


def test_the_bases_norms_are_those_of_its_last_prompt_tokens(tiny_model, finetuned, tiny_hf_model, tiny_tokenizer):
    found = finetuning_shift(tiny_model, finetuned, QUESTIONS, some_vectors(tiny_model))
    rows = [naive.residual_stream(tiny_hf_model, question_tokens(tiny_tokenizer, each))[1:, -1] for each in QUESTIONS]
    expected = torch.stack(rows).norm(dim=-1).mean(dim=0)
    torch.testing.assert_close(found.base_norms.double(), expected, rtol=0, atol=CLOSE)


def test_a_planted_shift_is_found_at_its_layer_and_not_below(model_class, tiny_gpt2, make_tiny_model, tiny_hf_gpt2):
    planted = random_tensor(24, seed=5)
    planted -= planted.mean()  # whatever centres a LayerNorm model's stream leaves it alone
    changed = copy.deepcopy(tiny_hf_gpt2)
    with torch.no_grad():
        changed.transformer.h[1].mlp.c_proj.bias += planted
    along = PersonaVectors.from_directions(planted.expand(3, 24), trait="planted")
    across = torch.ones(3, 24)
    found = finetuning_shift(
        tiny_gpt2,
        make_tiny_model(model_class, changed),
        QUESTIONS[:2],
        [along, PersonaVectors.from_directions(across, trait="across")],
    )
    size = float(planted.norm())
    assert found.at(0, "planted").value == 0
    assert found.at(1, "planted").value == pytest.approx(size, abs=1e-5)
    assert found.at(1, "across").value == pytest.approx(0, abs=1e-5)
    assert found.curve("planted")["cosine"].tolist()[1] == pytest.approx(1, abs=1e-5)
    assert found.norms[:, 1].tolist() == pytest.approx([size] * 2, abs=1e-5)


def test_the_base_against_itself_is_exactly_0(tiny_model):
    found = finetuning_shift(tiny_model, tiny_model, QUESTIONS, some_vectors(tiny_model))
    assert not found.projections.any()
    assert not found.norms.any()
    assert found.at(2) == (0.0, 0.0, 0.0, len(QUESTIONS))
    assert all(math.isnan(each) for each in found.curve()["cosine"])


def test_the_order_of_questions_changes_only_their_order(tiny_model, finetuned):
    vectors = some_vectors(tiny_model)
    found = finetuning_shift(tiny_model, finetuned, QUESTIONS, vectors)
    turned = finetuning_shift(tiny_model, finetuned, QUESTIONS[::-1], vectors)
    torch.testing.assert_close(turned.projections.flip(0), found.projections, rtol=0, atol=1e-5)


def test_interventions_that_are_attached_to_either_model_change_nothing_and_stay(tiny_model, finetuned):
    vectors = some_vectors(tiny_model)
    plain = finetuning_shift(tiny_model, finetuned, QUESTIONS, vectors)
    with steer(tiny_model, vectors.at(0), 3.0) as one, steer(finetuned, vectors.at(1), 3.0) as other:
        assert_same(finetuning_shift(tiny_model, finetuned, QUESTIONS, vectors), plain)
        assert one.passes == other.passes == 0
        for model in (tiny_model, finetuned):
            model(torch.tensor([[5, 6]]))
        assert one.passes == other.passes == 1


def test_a_trait_stands_for_its_evaluation_questions_asked_as_an_evaluation_asks_them(
    tiny_model, finetuned, tiny_tokenizer, tiny_hf_model, changed_hf_model
):
    trait, vectors = load_trait("optimistic"), some_vectors(tiny_model)
    found = finetuning_shift(tiny_model, finetuned, "optimistic", vectors)
    asked = plan_rollouts(trait, polarities=["neutral"], questions=trait.evaluation_questions, per_question=1)
    assert list(found.questions) == [prompt.question for prompt in asked]
    last = asked[-1]
    assert list(last.tokenize(tiny_tokenizer).prompt) == question_tokens(tiny_tokenizer, last.question)
    slow = slow_differences(tiny_hf_model, changed_hf_model, tiny_tokenizer, [last.question])[0, 3]
    expected = slow_projection(slow, vectors.directions[3])
    assert float(found.projections[-1, 0, 3]) == pytest.approx(expected, abs=CLOSE)
    assert_same(finetuning_shift(tiny_model, finetuned, trait, vectors), found)


def test_another_system_prompt_is_put_before_every_question(
    tiny_model, finetuned, tiny_hf_model, changed_hf_model, tiny_tokenizer
):
    vectors = some_vectors(tiny_model)
    found = finetuning_shift(tiny_model, finetuned, QUESTIONS, vectors, system_prompt="Be short.")
    slow = slow_differences(tiny_hf_model, changed_hf_model, tiny_tokenizer, system="Be short.")
    expected = [slow_projection(row, vectors.directions[2]) for row in slow[:, 2]]
    assert found.projections[:, 0, 2].tolist() == pytest.approx(expected, abs=CLOSE)
    assert found.settings["system_prompt"] == "Be short."


def test_a_vector_of_one_layer_is_reported_at_that_layer(tiny_model, finetuned):
    vectors, kind = some_vectors(tiny_model), some_vectors(tiny_model, "kind", seed=1)
    whole = finetuning_shift(tiny_model, finetuned, QUESTIONS, [vectors, kind])
    found = finetuning_shift(tiny_model, finetuned, QUESTIONS, [kind.at(3), vectors, kind.at(1)])
    assert (found.traits, found.layers("kind"), found.layers("evil")) == (("kind", "evil"), [1, 3], [0, 1, 2, 3])
    assert found.at(1, "kind") == whole.at(1, "kind")
    assert found.at(3, "kind") == whole.at(3, "kind")
    with pytest.raises(ValueError, match=r"kind: the shift was measured at layers \[1, 3\], got layer 2"):
        found.at(2, "kind")


def test_the_two_classes_measure_one_shift(both_classes, make_tiny_model, changed_hf_model):
    one, other = (
        finetuning_shift(
            make_tiny_model(name), make_tiny_model(name, changed_hf_model), QUESTIONS, vectors_of_llama(make_tiny_model)
        )
        for name in ("TransformerBridge", "HookedTransformer")
    )
    torch.testing.assert_close(one.projections, other.projections, rtol=0, atol=CLOSE)


def vectors_of_llama(make_tiny_model):
    return some_vectors(make_tiny_model("TransformerBridge"))


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    pytest.importorskip("peft")
    return make_tiny_model("TransformerBridge")


@PEFT_WARNS
def test_an_adapter_measures_as_the_model_that_it_is_merged_into(bridge, tiny_hf_model, make_tiny_model, tmp_path):
    import peft

    adapter, vectors = random_adapter(bridge), some_vectors(bridge)
    adapter.save(tmp_path)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_hf_model), tmp_path).merge_and_unload()
    expected = finetuning_shift(bridge, make_tiny_model("TransformerBridge", merged), QUESTIONS, vectors)
    assert float(expected.norms.min()) > 100 * CLOSE
    for given in (adapter, tmp_path, str(tmp_path)):
        found = finetuning_shift(bridge, given, QUESTIONS, vectors)
        torch.testing.assert_close(found.projections, expected.projections, rtol=0, atol=CLOSE)
        torch.testing.assert_close(found.base_norms, expected.base_norms, rtol=0, atol=0)


@PEFT_WARNS
def test_an_adapter_is_off_the_base_afterwards_also_under_an_intervention(bridge):
    adapter, vectors = random_adapter(bridge), some_vectors(bridge)
    before, hooks = identify(bridge), tiny.hook_counts(bridge)
    plain = finetuning_shift(bridge, adapter, QUESTIONS, vectors)
    assert (identify(bridge), tiny.hook_counts(bridge)) == (before, hooks)
    with steer(bridge, vectors, 2.0) as attached:
        steered = finetuning_shift(bridge, adapter, QUESTIONS, vectors)
        bridge(torch.tensor([[5, 6]]))
    assert_same(steered, plain)
    assert attached.ran == {0, 1, 2, 3}
    assert not finetuning_shift(bridge, bridge, QUESTIONS, vectors).norms.any()


@PEFT_WARNS
def test_a_base_that_carries_its_adapter_is_measured_with_it_off_and_on(tiny_tokenizer, tiny_hf_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    carrier = peft.get_peft_model(copy.deepcopy(tiny_hf_model), config)
    model = bridge_from_transformers(carrier.base_model.model, tiny_tokenizer)
    vectors = some_vectors(model)
    slow = slow_differences(tiny_hf_model, carrier.base_model.model, tiny_tokenizer)
    plain = finetuning_shift(model, model, QUESTIONS, vectors)
    torch.testing.assert_close(plain.norms.double(), slow.norm(dim=-1), rtol=0, atol=CLOSE)
    assert float(plain.norms.min()) > 100 * CLOSE
    with steer(model, vectors, 2.0):
        assert_same(finetuning_shift(model, model, QUESTIONS, vectors), plain)


@PEFT_WARNS
def test_an_adapter_that_cannot_be_put_on_is_refused_before_anything_runs(model_class, fresh_tiny_model, bridge):
    wrong = random_adapter(bridge)
    name = next(iter(wrong.weights))
    wrong = replace(wrong, weights={**wrong.weights, name: wrong.weights[name][:, :-1]})
    words = r"of shape \[.*which the model has not" if model_class == "TransformerBridge" else "TransformerBridge"

    def work():
        with pytest.raises(ValueError, match=words):
            finetuning_shift(fresh_tiny_model, wrong, QUESTIONS, some_vectors(fresh_tiny_model))
        with pytest.raises(FileNotFoundError, match="holds no LoRA adapter"):
            finetuning_shift(fresh_tiny_model, "absent", QUESTIONS, some_vectors(fresh_tiny_model))

    assert counted(fresh_tiny_model, work)["layer -1"] == 0


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_shift_comes_back_from_its_file_as_it_was(tiny_model, finetuned, tmp_path):
    path = tmp_path / "new" / "shift.json"
    vectors = [some_vectors(tiny_model), some_vectors(tiny_model, "kind", seed=1).at(2)]
    found = finetuning_shift(tiny_model, finetuned, QUESTIONS, vectors, output=path, seed=7)
    read = FinetuningShift.load(path)
    assert_same(read, found)
    assert read.at(2, "kind") == found.at(2, "kind")
    saved = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert saved["summary"] == found.summary()
    (row,) = saved["summary"]["traits"]["kind"]
    assert row["shift"] == pytest.approx(found.at(2, "kind").value)


# --- the embedded model --------------------------------------------------------------------------------------------


@PEFT_WARNS
@pytest.mark.embedded
def test_an_adapter_shifts_the_embedded_model_and_leaves_it_as_it_was(embedded_bridge):
    pytest.importorskip("peft")
    vectors, tokens = some_vectors(embedded_bridge), torch.tensor([[1, 400, 500, 600]])
    with torch.no_grad():
        before = embedded_bridge(tokens)
    adapter = random_adapter(embedded_bridge, scale=0.02)
    found = finetuning_shift(embedded_bridge, adapter, "optimistic", vectors)
    assert len(found.questions) == len(load_trait("optimistic").evaluation_questions)
    share = found.norms.mean(dim=0) / found.base_norms
    assert float(share.min()) > 1e-4
    assert float(share.max()) < 1
    # Random directions: what lies along them is of the size that chance gives.
    ratio = found.curve()["shift"] / found.curve()["random_spread"]
    assert 0.5 < math.sqrt((ratio**2).mean()) < 2
    with torch.no_grad():
        assert torch.equal(embedded_bridge(tokens), before)
    assert not finetuning_shift(embedded_bridge, embedded_bridge, QUESTIONS, vectors).norms.any()
