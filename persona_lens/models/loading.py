"""Loading a chat model into TransformerLens, by hub name, from a folder, or the embedded one.

Weights are never folded or centred on the way, so a model has one residual stream whichever class carries it.
Knows nothing about traits, vectors or chats.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import torch

from persona_lens.models.embedded import EMBEDDED_MODEL, HUB_NAME, INSTALL_COMMAND, embedded_model_directory
from persona_lens.models.structure import Model

ModelClass = Literal["TransformerBridge", "HookedTransformer"]


def load_model(
    name_or_path: str | Path = EMBEDDED_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    model_class: ModelClass = "TransformerBridge",
) -> Model:
    """A chat model in TransformerLens, with its weights unprocessed, in evaluation mode.

    `name_or_path` is a hub name, a local Hugging Face directory, or `smollm2-135m-instruct`, the embedded model, which
    needs no hub. `HookedTransformer` also takes models that TransformerLens does not list by name, where it knows the
    architecture. Raises ValueError with the remedy for an unknown model or class.
    """
    if model_class not in ("TransformerBridge", "HookedTransformer"):
        raise ValueError(f"model_class is TransformerBridge or HookedTransformer, got {model_class!r}.")
    source = _resolve(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    hf_model, tokenizer = _load_transformers(source, str(name_or_path), dtype, device)
    from_transformers = bridge_from_transformers if model_class == "TransformerBridge" else hooked_from_transformers
    model = from_transformers(hf_model, tokenizer)
    cast(Any, model).cfg.model_name = str(name_or_path)
    return model


def bridge_from_transformers(hf_model: Any, tokenizer: Any) -> Model:
    """A `TransformerBridge` around a loaded Hugging Face model, whose modules it wraps in place."""
    from transformer_lens.model_bridge import TransformerBridge

    parameter = next(hf_model.parameters())
    bridge = TransformerBridge.boot_transformers(
        hf_model.config._name_or_path or type(hf_model).__name__,
        hf_model=hf_model,
        tokenizer=tokenizer,
        device=parameter.device,
        dtype=parameter.dtype,
    )
    return cast(Model, bridge.eval())


def hooked_from_transformers(hf_model: Any, tokenizer: Any) -> Model:
    """A `HookedTransformer` with a copy of a loaded Hugging Face model's weights, neither folded nor centred.

    Unprocessed weights keep the residual stream that the Hugging Face model has, so vectors pass between both classes.
    Raises ImportError on transformer-lens 4, which has no such class.
    """
    try:
        from transformer_lens import HookedTransformer
        from transformer_lens import loading_from_pretrained as loading
    except ImportError as error:
        raise ImportError(
            "HookedTransformer is not part of transformer-lens 4. Load with model_class='TransformerBridge', "
            'or run: pip install "transformer-lens<4"'
        ) from error
    parameter = next(hf_model.parameters())
    # TransformerLens refuses names that are not on its list, but reads any local folder whose architecture it knows;
    # the folder's own name is neutral because it guesses the architecture from words such as "llama" in the path.
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        settings = copy.deepcopy(hf_model.config)
        # A model that was made in memory does not name its architecture.
        settings.architectures = settings.architectures or [type(hf_model).__name__]
        settings.save_pretrained(folder)
        try:
            config = loading.get_pretrained_model_config(
                folder, hf_cfg=hf_model.config.to_dict(), device=parameter.device, dtype=parameter.dtype
            )
            state = loading.get_pretrained_state_dict(folder, config, hf_model, dtype=parameter.dtype)
        except (NotImplementedError, KeyError, ValueError) as error:
            raise ValueError(
                f"HookedTransformer does not know the architecture {type(hf_model).__name__} ({error}). "
                "Load it with model_class='TransformerBridge'."
            ) from error
    config.model_name = hf_model.config._name_or_path or type(hf_model).__name__
    model = HookedTransformer(config, tokenizer)
    # Not `load_and_process_state_dict`: it passes every weight through float32, which rounds float64 weights.
    model.load_state_dict(model.fill_missing_keys(state), strict=False)
    return cast(Model, model.eval())


def _resolve(name_or_path: str | Path) -> str:
    """A local directory or a hub name."""
    name = str(name_or_path)
    if name.lower() in (EMBEDDED_MODEL, HUB_NAME.lower()):
        return str(embedded_model_directory() or HUB_NAME)
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"{name} is a folder without config.json: expected a Hugging Face model directory.")
    return name


def _load_transformers(source: str, name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # eager: the attention that TransformerLens gives a bridge anyway, so that both classes start from one thing
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError) as error:
        hint = (
            f"For the embedded model run: {INSTALL_COMMAND}"
            if source == HUB_NAME
            else (f"Give a hub name that can be reached, a local directory, or {EMBEDDED_MODEL!r}.")
        )
        raise ValueError(f"No model {name!r}: {str(error).splitlines()[0]} {hint}") from error
    return cast(Any, model).to(device), tokenizer
