"""Checks the settings and weights in the files of a LoRA adapter, which may be somebody else's.

PEFT runs some settings as regular expressions, and imports a module that another one names. So only settings that are
understood here reach PEFT: modules are taken from the weights' names and ranks from their shapes, and patterns of
scales must be plain names.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import Tensor

PREFIX = "base_model.model."
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHT_NAME = re.compile(r"[\w.-]+")
# A module's name or the end of one, as PEFT writes it: `q_proj`, `layers.1.mlp`, `^model\.layers\.0\.q_proj$`.
_PLAIN_PATTERN = re.compile(r"\^?[\w-]+(?:\\?\.[\w-]+)*\$?")
# Settings that do not change what the trained weights do: where they came from, which modules were trained, and how
# they were initialised.
_DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "parent_library",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Settings by which PEFT changes or trains weights of the model itself, with their harmless values.
_OWN_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, "gaussian"),
}


class LoraSettings(BaseModel):
    """The settings that determine what an adapter's weights do."""

    model_config = ConfigDict(strict=True)

    peft_type: Literal["LORA"]
    r: int = Field(8, ge=1)
    lora_alpha: FiniteFloat = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None


class ModuleScale(NamedTuple):
    """Rank and alpha of one module's LoRA weights."""

    rank: int
    alpha: float


def refuse_own_weights(config: Mapping[str, Any]) -> None:
    """Raise ValueError for settings by which PEFT changes or trains weights of the model itself."""
    for name, harmless in _OWN_WEIGHTS.items():
        if config.get(name, harmless[0]) not in harmless:
            raise ValueError(
                f"The adapter has {name}={config[name]!r:.100}, which changes the model's own weights: merge it into "
                "the model (merge_and_unload) and load that."
            )


def checked_settings(config: Mapping[str, Any]) -> LoraSettings:
    """The settings in an adapter's file; raises ValueError if one is missing, of the wrong type or not supported."""
    try:
        settings = LoraSettings.model_validate(dict(config))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in problem["loc"])
        expected = problem["msg"].removeprefix("Input ")
        raise ValueError(f"{name[:60]!r} {expected}, got {problem['input']!r:.60}") from None
    refuse_own_weights(config)
    understood = {*LoraSettings.model_fields, *_OWN_WEIGHTS, *_DESCRIPTIVE}
    for name, value in config.items():
        if name not in understood and value:
            raise ValueError(
                f"{name[:60]!r} is set to {value!r:.60}, and adapters with that setting are not supported: merge it "
                "into the model (merge_and_unload) and load that"
            )
    for pattern in settings.alpha_pattern or {}:
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise ValueError(
                f"alpha_pattern holds {pattern[:60]!r}, a regular expression, which is not run from a file: expected "
                "names of modules or the ends of names; write them out"
            )
    return settings


def checked_weights(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights; raises ValueError if one has values that are not finite, or an invalid name."""
    for name, value in weights.items():
        if not _WEIGHT_NAME.fullmatch(name):
            raise ValueError(f"the weight {name[:60]!r} has characters that no module's name has")
        if value.dtype not in _FLOATS:
            raise ValueError(f"the weight {name} is of type {value.dtype}, expected floating-point numbers")
        if not bool(value.isfinite().all()):
            raise ValueError(f"the weight {name} holds NaN or infinite values")
    return weights


def module_scales(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, ModuleScale]:
    """Rank (that of the weights) and alpha of every module with LoRA weights, by its plain name.

    Raises ValueError if there are no LoRA weights, one is no matrix, or the settings say another rank.
    """
    settings = checked_settings(config)
    scales: dict[str, ModuleScale] = {}
    for name in weights:
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if part and module not in scales:
            # Weights of another kind, such as an embedding's, are refused later, when the module is looked up.
            down = weights.get(f"{name[: name.index('.lora_')]}.lora_A.weight")
            rank = settings.r if down is None or down.ndim != 2 else down.shape[0]
            if down is not None and (down.ndim != 2 or not down.numel()):
                raise ValueError(f"the weight {module}.lora_A has shape {list(down.shape)}, expected a matrix")
            if down is not None and rank != settings.r and not settings.rank_pattern:
                raise ValueError(f"r is {settings.r!r:.40}, and the weights of {module} have rank {rank}")
            scales[module] = ModuleScale(rank, _alpha(settings, module))
    if not scales:
        raise ValueError("it has no LoRA weights")
    return scales


def usual_rank(scales: Mapping[str, ModuleScale]) -> int:
    """The most frequent rank."""
    return Counter(scale.rank for scale in scales.values()).most_common(1)[0][0]


def _alpha(settings: LoraSettings, module: str) -> float:
    """The alpha of the first pattern that matches the end of the module's name, as in PEFT."""
    for pattern, alpha in (settings.alpha_pattern or {}).items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == name or (not pattern.startswith("^") and module.endswith(f".{name}")):
            return alpha
    return settings.lora_alpha
