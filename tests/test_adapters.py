"""Adapters against PEFT on plain Hugging Face models, and against weights that were changed by hand."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Steer
from persona_lens.models.adapters import Adapter, adapted, carries_adapter, lora, read_weights, target_modules
from persona_lens.models.structure import suspended
from tests import naive, tiny
from tests.conftest import has_hooked_transformer
from tests.finetuning_cases import CONFIG, merged, peft_adapter, random_adapter, state_of, train
from tests.intervention_cases import EXACT, TOKENS, logits, some_vectors

# PEFT asks transformers for a name that 5.23 renamed.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
GPT2 = {**CONFIG, "target_modules": ["c_proj", "c_fc"]}
# Adapters are computed in float64 here, by sums in another order.
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    model = make_tiny_model("TransformerBridge")
    logits(model)
    return model


@pytest.fixture(scope="module")
def gpt2(make_tiny_model, tiny_hf_gpt2):
    model = make_tiny_model("TransformerBridge", tiny_hf_gpt2)
    logits(model)
    return model


@pytest.fixture(scope="module")
def adapter(bridge):
    return random_adapter(bridge)


@pytest.fixture(autouse=True)
def nothing_is_left(bridge, adapter, gpt2):
    states, outputs = [state_of(each) for each in (bridge, gpt2)], logits(bridge)
    yield
    assert [state_of(each) for each in (bridge, gpt2)] == states
    assert torch.equal(logits(bridge), outputs)


def peft_logits(hf_model, folder):
    model = peft.PeftModel.from_pretrained(copy.deepcopy(hf_model), folder).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@PEFT_WARNS
def test_plain_peft_reads_the_folder_and_says_the_same(bridge, adapter, tiny_hf_model, tmp_path):
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == adapter.config
    with adapted(bridge, tmp_path) as carrier:
        found, weights = logits(bridge), read_weights(carrier)
    torch.testing.assert_close(found, peft_logits(tiny_hf_model, tmp_path), **EXACT)
    assert not torch.allclose(found, logits(bridge), atol=0.1)
    assert weights.keys() == adapter.weights.keys()
    assert all(torch.equal(value, adapter.weights[name]) for name, value in weights.items())


@PEFT_WARNS
def test_a_finetuned_folder_is_read_by_plain_peft(bridge, tiny_hf_model, tmp_path):
    found = train(bridge, epochs=1, output=tmp_path)
    with adapted(bridge, found.adapter):
        expected = logits(bridge)
    torch.testing.assert_close(peft_logits(tiny_hf_model, tmp_path), expected, **EXACT)


@PEFT_WARNS
@pytest.mark.parametrize(
    "changed",
    [
        {"use_rslora": False},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
        {"alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj$": 3, "v_proj": 5, "q_proj": 1}},
        {"layers_to_transform": [1, 2]},
        {"target_modules": r".*layers\.[02]\.self_attn\.o_proj"},
        {"use_dora": True, "target_modules": ["up_proj"]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_plain_peft_wrote_acts_as_it_does_there(bridge, tiny_hf_model, tmp_path, changed):
    written = peft_adapter(tiny_hf_model, tmp_path, **changed)
    with adapted(bridge, tmp_path), torch.no_grad():
        torch.testing.assert_close(logits(bridge), written(TOKENS).logits, **CLOSE)


@PEFT_WARNS
def test_conv1d_of_gpt2_trains_and_is_read_by_plain_peft(gpt2, tiny_hf_gpt2, tmp_path):
    found = train(gpt2, targets=["c_proj", "c_fc"], epochs=3, output=tmp_path)
    assert found.loss < found.losses[0]["loss"]
    assert {name.split(".")[5] for name in found.adapter.weights} == {"attn", "mlp"}
    adapter = random_adapter(gpt2, GPT2)
    with adapted(gpt2, adapter):
        expected = logits(gpt2)
    changed = merged(copy.deepcopy(tiny_hf_gpt2), adapter)
    torch.testing.assert_close(expected[0], naive.logits(changed, TOKENS[0].tolist()).to(expected), **CLOSE)
    adapter = Adapter({**adapter.config, "fan_in_fan_out": True}, adapter.weights)
    adapter.save(tmp_path)
    torch.testing.assert_close(peft_logits(tiny_hf_gpt2, tmp_path), expected, **EXACT)


def test_a_module_that_the_bridge_never_runs_is_refused(gpt2):
    message = r"^The model runs no linear module 'c_attn': .*, which has c_fc, c_proj\.$"
    with pytest.raises(ValueError, match=message):
        train(gpt2, targets=["c_attn"])


@pytest.mark.parametrize("name", ["bridge", "gpt2"])
def test_every_target_acts_and_has_a_name_of_the_plain_model(request, name, tiny_tokenizer):
    model = request.getfixturevalue(name)
    plain = dict({"bridge": tiny.llama, "gpt2": tiny.gpt2}[name](tiny_tokenizer).named_modules())
    targets = target_modules(model, "all-linear")
    assert all(isinstance(plain[each], torch.nn.Linear | Conv1D) for each in targets)
    before = logits(model)
    for each, full in targets.items():
        handle = model.original_model.get_submodule(full).register_forward_hook(lambda _, __, output: output * 1.5)
        try:
            assert not torch.allclose(logits(model), before), each
        finally:
            handle.remove()


def test_targets_are_last_parts_of_names_or_a_pattern_and_looking_for_them_runs_no_intervention(bridge):
    with intervene(bridge, Steer(some_vectors(bridge).at(1), 1.0)) as attachment:
        last = target_modules(bridge, ["self_attn.q_proj", "down_proj"])
        assert attachment.passes == 0
        logits(bridge)
        assert attachment.passes == 1
    assert last == target_modules(bridge, r".*(q_proj|down_proj)")
    assert len(last) == 2 * bridge.cfg.n_layers


def test_the_hugging_face_model_inside_runs_it_too_without_dropout_and_judges_do_not(bridge, adapter):
    plain, state = logits(bridge), torch.get_rng_state()
    with adapted(bridge, adapter) as carrier, torch.no_grad():
        assert carries_adapter(bridge)
        expected = logits(bridge)
        assert torch.equal(bridge.original_model(TOKENS).logits, expected)
        assert torch.equal(carrier(TOKENS).logits, expected)
        with suspended(bridge):
            assert torch.equal(logits(bridge), plain)
        assert torch.equal(logits(bridge), expected)
    assert not carries_adapter(bridge)
    with adapted(bridge, replace(adapter, config={**adapter.config, "lora_dropout": 0.5})):
        assert torch.equal(logits(bridge), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_the_rank_stabilised_formula_and_the_order_of_contexts_does_not_matter(bridge, adapter, tiny_hf_model):
    vectors = some_vectors(bridge)
    steer = Steer(vectors.at(1), 3.0)
    with adapted(bridge, adapter):
        alone = logits(bridge)
        with intervene(bridge, steer):
            inner = logits(bridge)
    with intervene(bridge, steer), adapted(bridge, adapter):
        outer = logits(bridge)
    changed = merged(copy.deepcopy(tiny_hf_model), adapter)
    torch.testing.assert_close(alone[0], naive.logits(changed, TOKENS[0].tolist()).to(alone), **CLOSE)
    with naive.added(changed, 1, 3.0 * vectors.directions[1].double()):
        expected = naive.logits(changed, TOKENS[0].tolist())
    assert torch.equal(inner, outer)
    torch.testing.assert_close(inner[0], expected.to(inner), **CLOSE)


def test_a_second_adapter_is_refused_and_the_first_one_stays_until_an_exception(bridge, adapter):
    other = random_adapter(bridge, {**CONFIG, "r": 2}, seed=5)
    with adapted(bridge, adapter):
        first = logits(bridge)
        with pytest.raises(ValueError, match="carries an adapter already"), adapted(bridge, other):
            pass
        assert torch.equal(logits(bridge), first)
    with pytest.raises(KeyboardInterrupt), adapted(bridge, other):  # noqa: PT012
        assert not torch.equal(logits(bridge), first)
        raise KeyboardInterrupt
    assert not carries_adapter(bridge)
    with adapted(bridge, adapter):
        assert torch.equal(logits(bridge), first)


def test_a_model_of_another_shape_or_class_is_refused(gpt2, adapter, make_tiny_model):
    message = r"runs no linear module 'model\.layers\..*': .* which has c_fc, c_proj\."
    with pytest.raises(ValueError, match=message), adapted(gpt2, adapter):
        pass
    if has_hooked_transformer():
        hooked = make_tiny_model("HookedTransformer")
        with pytest.raises(ValueError, match="LoRA needs a TransformerBridge"), adapted(hooked, adapter):
            pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {**weights, "base_model.model.x.lora_A.weight": torch.ones(4, 2)},
            r"runs no linear module 'x'",
        ),
        (
            lambda weights: {name: value[:, :3] for name, value in weights.items()},
            r"of shape \[4, 3\], which the model",
        ),
        (lambda weights: dict(list(weights.items())[1:]), r"The adapter lacks base_model\..*, so it is damaged"),
    ],
)
def test_weights_that_do_not_fit_are_refused(bridge, adapter, change, message):
    broken = Adapter(adapter.config, change(adapter.weights))
    with pytest.raises(ValueError, match=message), adapted(bridge, broken):
        pass


@pytest.mark.parametrize(
    "changed", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}], ids=str
)
def test_what_changes_the_models_own_weights_or_chooses_modules_otherwise_is_refused(bridge, adapter, changed):
    other = Adapter({**adapter.config, **changed}, adapter.weights)
    words = rf"has {next(iter(changed))}=.*merge it into the model"
    with pytest.raises(ValueError, match=words), adapted(bridge, other):
        pass
    with pytest.raises(ValueError, match=words), lora(bridge, {**CONFIG, **changed}):
        pass
    config = {**CONFIG, "layers_to_transform": [1]}
    with pytest.raises(ValueError, match="target_modules alone, got layers_to_transform"), lora(bridge, config):
        pass


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_a_file_or_with_a_damaged_one_is_refused(adapter, tmp_path, name):
    adapter.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    for kept in (0, len(content) // 2):
        (tmp_path / name).write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"holds a damaged adapter \(.*\): copy it or train it again"):
            Adapter.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no LoRA adapter: expected {name}"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '{"peft_type": "IA3"}', "{}"])
def test_an_adapter_of_another_kind_is_refused(adapter, tmp_path, text):
    adapter.save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="expected LORA"):
        Adapter.load(tmp_path)


@PEFT_WARNS
def test_the_embedded_model_runs_it_as_plain_peft_does(embedded_bridge, embedded_hf_model, tmp_path):
    random_adapter(embedded_bridge).save(tmp_path)
    before = logits(embedded_bridge)
    with adapted(embedded_bridge, tmp_path):
        found = logits(embedded_bridge)
    torch.testing.assert_close(found, peft_logits(embedded_hf_model, tmp_path), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(embedded_bridge), before)


# --- files of others -------------------------------------------------------------------------------------------------


def changed_file(adapter, folder, **changed):
    adapter.save(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


HANGS = "(([a-z_.0-9])+)+!"


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_pattern_in_a_file_that_chooses_modules_is_not_run(bridge, adapter, tmp_path, setting):
    with adapted(bridge, adapter):
        expected = logits(bridge)
    with adapted(bridge, changed_file(adapter, tmp_path, **{setting: HANGS})):
        assert torch.equal(logits(bridge), expected)


def test_a_pattern_of_ranks_in_a_file_is_not_run(bridge, tiny_hf_model, tmp_path):
    written = peft_adapter(tiny_hf_model, tmp_path, rank_pattern={"q_proj": 2})
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {HANGS: 2}}))
    with adapted(bridge, tmp_path), torch.no_grad():
        torch.testing.assert_close(logits(bridge), written(TOKENS).logits, **CLOSE)


def test_a_pattern_of_scales_in_a_file_is_refused(bridge, adapter, tmp_path):
    folder = changed_file(adapter, tmp_path, alpha_pattern={HANGS: 3})
    with pytest.raises(ValueError, match=r"alpha_pattern holds .*, a regular expression, which is not run from a file"):
        Adapter.load(folder)
    in_memory = replace(adapter, config={**adapter.config, "alpha_pattern": {HANGS: 3}})
    with pytest.raises(ValueError, match="which is not run from a file"), adapted(bridge, in_memory):
        pass


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"r": 10**9}, r"r is 1000000000, and the weights of model\.layers.* have rank 4"),
        ({"r": "x"}, r"'r' should be a valid integer, got 'x'"),
        ({"r": [4]}, r"'r' should be a valid integer, got \[4\]"),
        ({"r": True}, r"'r' should be a valid integer, got True"),
        ({"r": 0}, r"'r' should be greater than or equal to 1, got 0"),
        ({"lora_alpha": float("nan")}, r"'lora_alpha' should be a finite number, got nan"),
        ({"lora_alpha": [8]}, r"'lora_alpha' should be a valid number, got \[8\]"),
        ({"use_rslora": "yes"}, r"'use_rslora' should be a valid boolean, got 'yes'"),
        ({"lora_dropout": 7}, r"'lora_dropout' should be less than 1, got 7"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, r"'alpha_pattern.q_proj' should be a finite number, got inf"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, r"'megatron_config' is set .* not supported"),
        ({"velora_config": {"rank": 1}}, r"'velora_config' is set to .*, and adapters with that setting are not"),
    ],
    ids=str,
)
def test_settings_of_a_file_that_mean_nothing_are_refused_in_one_sentence(adapter, tmp_path, changed, words):
    folder = changed_file(adapter, tmp_path, **changed)
    with pytest.raises(ValueError, match=rf"^{tmp_path} holds an adapter that is refused: {words}"):
        Adapter.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_or_whose_name_would_steer_a_terminal_are_refused(bridge, adapter, tmp_path, value):
    name = sorted(adapter.weights)[3]
    weights = {other: weight.clone() for other, weight in adapter.weights.items()}
    weights[name][0, 0] = value
    broken = Adapter(adapter.config, weights)
    broken.save(tmp_path)
    with pytest.raises(ValueError, match=f"the weight {name} holds NaN or infinite values"):
        Adapter.load(tmp_path)
    with pytest.raises(ValueError, match=f"the weight {name} holds NaN"), adapted(bridge, broken):
        pass
    Adapter(adapter.config, {**adapter.weights, "\x1b[31m.lora_A.weight": torch.ones(4, 2)}).save(tmp_path)
    with pytest.raises(ValueError, match=r"'\\x1b\[31m\.lora_A\.weight' has characters that no module's name has"):
        Adapter.load(tmp_path)


def test_matrices_of_another_size_are_refused_before_memory_is_taken(bridge, adapter, tmp_path, monkeypatch):
    """Two small files could otherwise ask PEFT for matrices of any size."""
    name = next(each for each in adapter.weights if each.endswith("lora_A.weight"))
    weights = {**adapter.weights, name: torch.ones(100_000, 1)}
    asked = []
    monkeypatch.setattr(peft, "get_peft_model", lambda *_: asked.append(1))
    config = {**adapter.config, "rank_pattern": {"q_proj": 100_000}}
    message = r"of shape \[100000, 1\], which the model has not"
    with pytest.raises(ValueError, match=message), adapted(bridge, Adapter(config, weights)):
        pass
    assert not asked
