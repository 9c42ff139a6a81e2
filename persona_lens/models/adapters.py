"""LoRA adapters on a bridge: put on the Hugging Face modules that it wraps, removed again, saved in PEFT's format.

A bridge nests each module in a wrapper, so PEFT sees other module names than in the plain model. Files have the plain
names, and `PeftModel.from_pretrained` reads them.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from persona_lens.models.adapter_files import (
    PREFIX,
    checked_settings,
    checked_weights,
    module_scales,
    refuse_own_weights,
    usual_rank,
)
from persona_lens.models.scopes import (
    ForwardGate,
    Hook,
    Scope,
    gate_forward,
    global_randomness_kept,
    hooked,
    model_lock,
    scope_on,
)
from persona_lens.models.structure import Model, is_bridge, model_device, suspended
from persona_lens.storage.files import write_json, write_whole
from persona_lens.storage.text import missing_package

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_CHOOSING = ("layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: PEFT's settings, and its weights by their names in the plain model.

    `save` writes a folder that `PeftModel.from_pretrained` reads; `load` reads any that PEFT wrote as safetensors.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors. Raises OSError if they cannot be written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The settings last: a folder without them is no adapter.
        write_whole(folder / WEIGHTS_FILE, safetensors.torch.save(self.weights, metadata={"format": "pt"}))
        write_json(folder / CONFIG_FILE, self.config)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Adapter":
        """The adapter in a folder. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no LoRA adapter: expected {name} in it, as `finetune` writes.")
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        except (SafetensorError, RecursionError, ValueError) as error:
            raise ValueError(f"{folder} holds a damaged adapter ({error}): copy it or train it again.") from error
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != "LORA":
            raise ValueError(f"{folder} holds an adapter of type {kind!r:.60}, expected LORA.")
        try:
            module_scales(config, checked_weights(weights))
        except ValueError as error:
            raise ValueError(f"{folder} holds an adapter that is refused: {str(error).removesuffix('.')}.") from error
        return cls(config, weights)


def carries_adapter(model: Model) -> bool:
    """Whether PEFT layers are in the model, switched on or off."""
    return any(hasattr(module, "active_adapter") for module in cast(nn.Module, model).modules())


@contextmanager
def adapted(model: Model, adapter: Adapter | str | os.PathLike[str]) -> Iterator[Any]:
    """Put a LoRA adapter on the model while the context is open; on leaving the model is as it was.

    The adapter acts in every pass of this thread through the bridge or its Hugging Face model; other threads run the
    model without it. Merging it raises RuntimeError, since that would change the model for good. No setting of the
    adapter is run as a regular expression. Raises ValueError for a model that is no bridge, carries another adapter, or
    lacks a module that the adapter belongs to, and for settings that are not supported.
    """
    loaded = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    where = "" if isinstance(adapter, Adapter) else f"{os.fspath(adapter)}: "
    try:
        config = _settings_for(model, loaded)
        targets = target_modules(model, config["target_modules"])
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    # PEFT draws fresh weights at random, which are replaced at once.
    with lora(model, config, targets=targets, keep_randomness=True) as carrier:
        try:
            _write_weights(carrier, loaded.weights)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        carrier.eval()
        yield carrier


def _settings_for(model: Model, adapter: Adapter) -> dict[str, Any]:
    """An adapter's settings for `lora`. Raises ValueError if it is damaged or does not fit the model."""
    _require_bare(model)
    # The weights' names say which modules they are for, however PEFT's settings selected those.
    scales = module_scales(adapter.config, checked_weights(adapter.weights))
    settings, rank = checked_settings(adapter.config), usual_rank(scales)
    _refuse_unfitting(model, adapter.weights)
    return {
        "task_type": "CAUSAL_LM" if adapter.config.get("task_type") == "CAUSAL_LM" else None,
        "r": rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "lora_bias": settings.lora_bias,
        "target_modules": sorted(scales),
        # Only those that differ, since PEFT tries every pattern on every module.
        "rank_pattern": {re.escape(name): scale.rank for name, scale in scales.items() if scale.rank != rank},
        "alpha_pattern": {
            re.escape(name): scale.alpha for name, scale in scales.items() if scale.alpha != settings.lora_alpha
        },
    }


def _refuse_unfitting(model: Model, weights: dict[str, Tensor]) -> None:
    """Raise ValueError for LoRA matrices that do not fit their module, before PEFT allocates any of that size."""
    modules = dict(_plain_modules(cast(Any, model).original_model))
    for name, value in weights.items():
        full, _, part = name.partition(".lora_")
        module, rank = modules.get(full.removeprefix(PREFIX)), weights.get(f"{full}.lora_A.weight")
        matrix = getattr(module, "weight", None)
        if part not in ("A.weight", "B.weight") or rank is None or matrix is None or matrix.ndim != 2:
            continue
        out_features, in_features = matrix.shape if isinstance(module, nn.Linear) else matrix.T.shape
        expected = [rank.shape[0], in_features] if part == "A.weight" else [out_features, rank.shape[0]]
        if list(value.shape) != expected:
            raise _of_another_model(name, value)


def require_bridge(model: Model) -> None:
    """Raise ValueError for a model that is no bridge."""
    if not is_bridge(model):
        raise ValueError(
            f"LoRA needs a TransformerBridge, whose weights are those of the Hugging Face model, got "
            f"{type(model).__name__}: load the model with model_class='TransformerBridge'."
        )


def _require_bare(model: Model) -> None:
    require_bridge(model)
    if carries_adapter(model):
        raise ValueError("The model carries an adapter already: merge it (merge_and_unload) or take it off first.")


@contextmanager
def lora(
    model: Model, config: dict[str, Any], *, targets: dict[str, str] | None = None, keep_randomness: bool = False
) -> Iterator[Any]:
    """The bridge's Hugging Face model as a PEFT model with fresh LoRA weights, the only ones that train.

    Args:
        model: A bridge without an adapter.
        config: PEFT's settings, with `target_modules` named as in the plain model.
        targets: The result of `target_modules`, if the caller has it already.
        keep_randomness: Leave the global random generators as they are. Fresh weights are drawn from them.

    On leaving, the modules, which weights train, and the training mode are as before. Raises as `adapted` does.
    """
    peft = _peft()
    _require_bare(model)
    if selecting := [name for name in _CHOOSING if config.get(name)]:
        raise ValueError(f"Modules are chosen by target_modules alone, got {selecting[0]}: a pattern can say the same.")
    refuse_own_weights(config)
    plain = cast(Any, model).original_model
    targets = target_modules(model, config["target_modules"]) if targets is None else targets
    settings = {
        **{name: value for name, value in config.items() if name in peft.LoraConfig.__dataclass_fields__},
        "target_modules": list(targets.values()),
        "inference_mode": False,
        # With a name, PEFT would ask the hub about it on every save.
        "base_model_name_or_path": None,
        "fan_in_fan_out": not isinstance(plain.get_submodule(next(iter(targets.values()))), nn.Linear),
    }
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = {
            re.escape(full): value
            # Backwards, so that the first matching pattern wins, as in PEFT.
            for pattern, value in reversed((config.get(name) or {}).items())
            for module, full in targets.items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        }
    with _put_back(model, list(targets.values())) as scope:
        with model_lock(model), warnings.catch_warnings():
            # PEFT reads a property that transformers 5 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            with global_randomness_kept(model) if keep_randomness else nullcontext():
                carrier = peft.get_peft_model(plain, peft.LoraConfig(**settings))
            for layer in carrier.modules():
                if hasattr(layer, "enable_adapters") and "base_layer" in layer._modules:
                    # Other threads meanwhile run the layer without the adapter.
                    gate_forward(layer, ForwardGate(layer, scope, outside=layer._modules["base_layer"]))
                    vars(layer)["merge"] = _refuse_merging
        carrier.peft_config["default"].base_model_name_or_path = None
        yield carrier


_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
_CHANGED = ("training", "forward", "peft_config", *_CHECKPOINTING, "_require_grads_hook", "_require_grads_hooks")
_ABSENT = object()


def _refuse_merging(*_: object, **__: object) -> None:
    raise RuntimeError(
        "Merging the adapter here would change the model's own weights for good: load the model and the saved adapter "
        "by PEFT (PeftModel.from_pretrained), and merge there."
    )


@contextmanager
def _put_back(model: Model, names: Sequence[str]) -> Iterator[Scope]:
    """Undo on leaving whatever PEFT and a Trainer change in a model; `names` are the modules that PEFT will wrap."""
    plain = cast(Any, model).original_model
    places = [(plain.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    modules = [parent._modules[last] for parent, last in places]
    trained = [(weight, weight.requires_grad) for weight in plain.parameters()]
    # The bridge and the Hugging Face model each have modules that the other lacks.
    attributes = [
        (module, name, vars(module).get(name, _ABSENT))
        for module in {*plain.modules(), *cast(nn.Module, model).modules()}
        for name in _CHANGED
    ]
    embedding = plain.get_input_embeddings()._forward_hooks
    hooks = set(embedding)
    use_cache = getattr(plain.config, "use_cache", None)

    def put_back(_: Scope) -> None:
        # Every line sets a final state, so that all of it may run again after an interrupt.
        # `disable_input_require_grads` would remove only the last of several such hooks.
        for key in set(embedding) - hooks:
            if getattr(embedding[key], "__name__", "") == "make_inputs_require_grads":
                embedding.pop(key, None)
        # PEFT's `unload` would take a wrapper of the bridge for the LoRA layer inside it.
        for (parent, last), module in zip(places, modules, strict=True):
            parent._modules[last] = module
        for weight, wanted in trained:
            weight.requires_grad_(wanted)
        for module, name, value in attributes:
            if value is not _ABSENT:
                vars(module)[name] = value
            else:
                vars(module).pop(name, None)
        if use_cache is not None:
            plain.config.use_cache = use_cache

    with scope_on(model, put_back) as scope:
        yield scope


def target_modules(model: Model, targets: str | Sequence[str]) -> dict[str, str]:
    """The linear modules that targets select: by their name in the plain model, the name by which PEFT finds them.

    Targets are a pattern of whole names, a list of last parts of names, or `all-linear` for every linear module of the
    blocks. Runs the model on one token, since a bridge does not use all modules. Raises ValueError, listing the modules
    that exist, for a target that the architecture lacks.
    """
    linear = _linear_modules(model)
    if targets == "all-linear":
        return linear
    if isinstance(targets, str):
        wanted = {targets: {name for name in linear if re.fullmatch(targets, name)}}
    else:
        wanted = {target: {name for name in linear if f".{name}".endswith(f".{target}")} for target in targets}
    if absent := [target for target, names in wanted.items() if not names]:
        existing = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"The model runs no linear module {absent[0]!r}: pass targets of this architecture, which has "
            f"{', '.join(existing)}."
        )
    selected = set().union(*wanted.values())
    if not selected:
        raise ValueError("There is nothing to train: name at least one target.")
    return {name: full for name, full in linear.items() if name in selected}


def _linear_modules(model: Model) -> dict[str, str]:
    """The linear modules of the blocks that a forward pass runs: by plain name, the name that PEFT sees."""
    from transformers.pytorch_utils import Conv1D

    plain = cast(Any, model).original_model
    full = {module: name for name, module in plain.named_modules()}
    linear = {
        name: module
        for name, module in _plain_modules(plain)
        if isinstance(module, (nn.Linear, Conv1D)) and re.search(r"\.\d+\.", name)
    }
    ran: set[str] = set()
    hooks = []
    for name, module in linear.items():

        def note(_module: nn.Module, _inputs: Any, _output: Any, name: str = name) -> None:
            ran.add(name.rpartition(".")[2])

        hooks.append(Hook(module, note))
    with model_lock(model), suspended(model), torch.no_grad(), hooked(model, hooks):
        plain(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model_device(model)))
    # Compared by last parts of names, since a mixture of experts runs few of its experts on one token.
    return {name: full[module] for name, module in linear.items() if name.rpartition(".")[2] in ran}


def _plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a wrapped Hugging Face model, by their plain names."""
    while (inner := module._modules.get("_original_component")) is not None:
        module = inner
    yield name, module
    for last, child in module._modules.items():
        if child is not None:
            yield from _plain_modules(child, f"{name}.{last}" if name else last)


def read_weights(carrier: Any) -> dict[str, Tensor]:
    """A PEFT model's LoRA weights on the CPU, by their names in the plain model."""
    return {name: value.detach().cpu().clone() for name, value in _weights(carrier).items()}


def _weights(carrier: Any) -> dict[str, Tensor]:
    plain = carrier.base_model.model
    names = {module: name.removesuffix(".base_layer") for name, module in _plain_modules(plain)}
    # Looked up in `_modules`, since a bridge's wrapper passes on the attributes of the module inside it.
    layers = {full: names[module.base_layer] for full, module in plain.named_modules() if "lora_A" in module._modules}
    weights = {}
    for key, value in _peft().get_peft_model_state_dict(carrier, save_embedding_layers=False).items():
        full, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if full in layers:
            weights[f"{PREFIX}{layers[full]}.lora_{part}"] = value
    return weights


def _write_weights(carrier: Any, weights: dict[str, Tensor]) -> None:
    state = _weights(carrier)
    for name, value in weights.items():
        if name not in state or state[name].shape != value.shape:
            raise _of_another_model(name, value)
    if absent := sorted(set(state) - set(weights)):
        raise ValueError(f"The adapter lacks {absent[0]}, so it is damaged or its settings are another's.")
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)


def _of_another_model(name: str, value: Tensor) -> ValueError:
    return ValueError(
        f"The adapter has {name} of shape {list(value.shape)}, which the model has not: "
        "put it on the model that it was trained on."
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_package("An adapter", "peft", extra="finetune") from error
    return peft
