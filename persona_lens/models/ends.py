"""The tokens that a model itself declares as ends of its text: `generation_config.eos_token_id`, one id or several.

Chat models often list there the end of a turn, which their tokenizer has no name for.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_of_folders: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()
"""What was read from disk for a `HookedTransformer` that persona_lens did not load."""


def declared_ends(model: Any) -> frozenset[int]:
    """Every id in the `eos_token_id` of the model's generation settings; none where it has no such settings.

    A bridge has the settings of the Hugging Face model in it, a `HookedTransformer` those it was loaded with here. For
    a `HookedTransformer` loaded elsewhere they are read from the folder, or the hub's local cache, that its tokenizer
    was loaded from, never from the network.
    """
    source = getattr(model, "original_model", model)
    settings = getattr(source, "generation_config", None)
    if settings is not None:
        ends = _ids(getattr(settings, "eos_token_id", None))
        return ends or _ids(getattr(getattr(source, "config", None), "eos_token_id", None))
    if not isinstance(model, nn.Module):
        return frozenset()
    if model not in _of_folders:
        _of_folders[model] = _ends_on_disk(getattr(getattr(model, "tokenizer", None), "name_or_path", ""))
    return _of_folders[model]


def _ends_on_disk(source: str) -> frozenset[int]:
    if not source:
        return frozenset()
    from transformers import AutoConfig, GenerationConfig

    for settings in (GenerationConfig, AutoConfig):
        try:
            ends = _ids(settings.from_pretrained(source, local_files_only=True).eos_token_id)
        except (OSError, ValueError, AttributeError):  # no such file, or a folder that holds a tokenizer alone
            continue
        if ends:
            return ends
    return frozenset()


def _ids(value: Any) -> frozenset[int]:
    """The ids in an `eos_token_id`, which is None, a number, a list or a tensor."""
    if value is None:
        return frozenset()
    listed = value.tolist() if hasattr(value, "tolist") else value
    return frozenset(int(each) for each in listed) if isinstance(listed, list | tuple) else frozenset({int(listed)})
