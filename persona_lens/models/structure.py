"""What persona_lens knows of a TransformerLens model: its hook points, its identity, how it runs without interventions.

Layer `l` is the output of block `l`, counted from 0 (`blocks.{l}.hook_resid_post`), in both model classes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from inspect import signature
from typing import Any, Literal, Protocol, cast, runtime_checkable
from weakref import WeakKeyDictionary

import torch
import torch.nn.modules.module as module_hooks
from jaxtyping import Int
from torch import Tensor, nn

from persona_lens.models.scopes import ForwardGate, gate_forward, gate_hooks, open_gates, scope_on
from persona_lens.storage.text import shown_name

ResidualBasis = Literal["raw", "centred"]


@runtime_checkable
class Model(Protocol):
    """What persona_lens uses of a `HookedTransformer` or a `TransformerBridge`."""

    cfg: Any
    tokenizer: Any
    blocks: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        ...

    def parameters(self) -> Any:
        """Iterate over the weights."""
        ...


@dataclass(frozen=True)
class ModelIdentity:
    """What a saved vector records of its model, so that it can be refused on another one (`identify`).

    `name` is a hub name, or the last part of a path. `embedding_sample` is taken from the token embedding, which
    finetuning hardly changes: models of one base have nearly the same sample, unrelated models do not.
    """

    name: str
    model_class: str
    n_layers: int
    d_model: int
    residual_basis: ResidualBasis
    weights_hash: str
    embedding_sample: tuple[float, ...]


def plain_name(name: str) -> str:
    """The name that a module or weight of a bridge has in the plain Hugging Face model."""
    return ".".join(part for part in name.split(".") if part != "_original_component")


def is_bridge(model: Model) -> bool:
    """Whether the model is a `TransformerBridge` (else a `HookedTransformer`)."""
    return hasattr(model, "original_model")


def from_paper_layer(layer: int) -> int:
    """Convert a layer of the paper, counted from 1, to a layer counted from 0 as everywhere in this package.

    The paper's layer 20 is the output of the twentieth block, `blocks.19.hook_resid_post`.
    """
    if layer < 1:
        raise ValueError(f"The paper counts layers from 1, got {layer}.")
    return layer - 1


def refuse_other_kinds(hf_model: Any) -> None:
    """Raise ValueError for a Hugging Face model that is no decoder with attention, and on transformers 5.24.

    TransformerLens also bridges encoders and state-space models, whose residual stream means something else.
    """
    if getattr(hf_model.config, "is_encoder_decoder", False):
        kind = "an encoder with a decoder"
    elif not hf_model.can_generate():
        kind = "an encoder, or a decoder without its unembedding"
    elif "past_key_values" not in (parameters := signature(hf_model.get_decoder().forward).parameters):
        if "cache" in parameters:
            raise ValueError(
                f"transformers {version('transformers')} hands keys and values on by a name that TransformerLens does "
                'not know, and cached passes would forget the prompt. Run: pip install "transformers<5.24"'
            )
        kind = "a state-space model, which keeps no keys and values"
    else:
        return
    raise ValueError(
        f"{type(hf_model).__name__} is {kind}: persona_lens reads and steers decoders with attention, such as Llama, "
        "Qwen, Gemma or GPT-2. Load one of those, as a ...ForCausalLM."
    )


def refuse_foreign_blocks(bridge: Any) -> None:
    """Raise ValueError if another library has wrapped a block in a module of its own, which hides its hook points."""
    for number, block in enumerate(bridge.blocks):
        if "_original_component" not in block._modules:
            raise ValueError(
                f"Block {number} of the bridge should be TransformerLens's own, got {type(block).__name__}: take off "
                "what another library has put around it."
            )


def resid_post_name(layer: int) -> str:
    """TransformerLens's name for the output of block `layer`."""
    return f"blocks.{layer}.hook_resid_post"


def residual_points(model: Model) -> list[nn.Module]:
    """The hook points of the residual stream: the input of block 0, then the output of every block.

    Entry 0 is the embedding (Hugging Face's `hidden_states[0]`), entry `l + 1` is layer `l`. Raises ValueError for a
    model that is no decoder.
    """
    if is_bridge(model):
        refuse_other_kinds(cast(Any, model).original_model)
        refuse_foreign_blocks(model)
    entry = model.blocks[0].hook_in if is_bridge(model) else model.blocks[0].hook_resid_pre
    exits = [block.hook_out if is_bridge(model) else block.hook_resid_post for block in model.blocks]
    return [entry, *exits]


@contextmanager
def suspended(model: Model, *, keep_adapters: bool = False) -> Iterator[None]:
    """While open, the model runs without interventions: no hook acts, and adapters are off unless `keep_adapters`.

    Judges run inside it, so that no intervention judges itself. Silenced are this package's hooks, all hooks at hook
    points, and PyTorch hooks that users registered on any module of the model; hooks by which TransformerLens,
    transformers, PEFT or PyTorch run the model go on. Whatever is attached inside the context acts. Passes of other
    threads are not affected. Raises ValueError for an adapter that is merged into the weights.
    """
    modules = _all_modules(model)
    adapters = [] if keep_adapters else [module for module in modules if _is_switched_on(module)]
    if any(getattr(module, "merged", False) for module in adapters):
        raise ValueError(
            "The model carries an adapter that is merged into its weights, so it cannot be judged without it: call "
            "unmerge_adapter() first, or merge_and_unload() to make it the model."
        )
    of_all_modules = [*module_hooks._global_forward_hooks.values(), *module_hooks._global_forward_pre_hooks.values()]
    if loud := [hook for hook in of_all_modules if _is_silenced(modules[0], hook)]:
        raise ValueError(
            f"A hook on all modules of the process ({getattr(loud[0], '__qualname__', loud[0])!s}) would act on what "
            "is judged: remove it first (register_module_forward_hook gave a handle for that)."
        )
    with scope_on(model, partial(open_gates, modules)) as scope:
        gate_hooks(modules, scope, _is_silenced)
        for module in adapters:
            gate_forward(module, ForwardGate(module, scope, inside=partial(_run_without_adapter, module)))
        yield


def _all_modules(model: Model) -> list[nn.Module]:
    """The modules of the model and of a bridge's Hugging Face model, neither of which has all of the other's."""
    inner = [cast(Any, model).original_model] if is_bridge(model) else []
    return list(dict.fromkeys(module for root in (model, *inner) for module in cast(nn.Module, root).modules()))


_RUNNING_THE_MODEL = ("torch", "transformers", "transformer_lens", "accelerate", "peft")


def _is_silenced(module: nn.Module, hook: Any) -> bool:
    """Whether a hook is somebody's own, and not part of how a library runs the model."""
    if type(module).__name__ == "HookPoint" or hasattr(hook, "scope"):
        return True
    while isinstance(hook, partial):
        hook = hook.func
    source = getattr(hook, "__module__", None) or type(hook).__module__
    return source.partition(".")[0] not in _RUNNING_THE_MODEL


def _is_switched_on(module: nn.Module) -> bool:
    """Whether the module is a PEFT layer whose adapter is switched on."""
    # Looked up on the class, since a bridge's wrapper passes on the attributes of the module inside it.
    is_adapter = hasattr(type(module), "enable_adapters") and hasattr(type(module), "active_adapter")
    return is_adapter and not getattr(module, "disable_adapters", False)


def _run_without_adapter(module: nn.Module, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
    """The forward of a PEFT layer without its adapter."""
    children = module._modules
    return cast(nn.Module, children.get("base_layer") or children["original_module"])(*args, **kwargs)


def model_device(model: Model) -> torch.device:
    """The device that token ids are moved to."""
    return next(iter(model.parameters())).device


def cpu_threads(model: Model) -> int | None:
    """The number of CPU threads, on which the rounding of sums depends; None on an accelerator."""
    return torch.get_num_threads() if model_device(model).type == "cpu" else None


def refuse_other_threads(where: object, recorded: int | None, threads: int | None) -> None:
    """Raise ValueError if a run would resume with another number of CPU threads than it recorded.

    None (an accelerator, or a run of a version that did not record it) is not compared.
    """
    if recorded is not None and threads is not None and recorded != threads:
        raise ValueError(
            f"{where} was made with {recorded} CPU thread{'s' * (recorded > 1)}, now {threads}, and sums round "
            f"otherwise with another number, so that texts can change. Go on with --threads {recorded} (in Python: "
            f"torch.set_num_threads({recorded})), or choose another output."
        )


def residual_basis(model: Model) -> ResidualBasis:
    """Whether weight processing has centred the residual stream, which is possible for LayerNorm models only."""
    if "RMS" in str(getattr(model.cfg, "normalization_type", "")) or getattr(model.cfg, "uses_rms_norm", False):
        return "raw"
    embedding = _embedding(model)[:256].float()
    return "centred" if embedding.mean(dim=-1).abs().max() < 1e-4 * embedding.abs().mean() else "raw"


def identify(model: Model) -> ModelIdentity:
    """The model's identity: its name, shape, residual basis and fingerprints of its weights."""
    embedding = _embedding(model)
    rows, columns = (evenly_spaced(0, size - 1, 256).to(embedding.device) for size in embedding.shape)
    digest = hashlib.sha256()
    # Plain names, since how a bridge nests modules differs between TransformerLens releases.
    weights = cast(Any, model).original_model if is_bridge(model) else cast(Any, model)
    names = {plain_name(name): value for name, value in weights.named_parameters()}
    for name, parameter in sorted(names.items()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
        # Zeros are skipped: TransformerLens 3.9 gives a bridge's unembedding a bias of zeros, 4 does not.
        if bool(sample.any()):
            digest.update(name.encode())
            digest.update(sample.numpy().tobytes())
    return ModelIdentity(
        name=shown_name(str(getattr(model.cfg, "model_name", "unnamed"))),
        model_class=type(model).__name__,
        n_layers=int(model.cfg.n_layers),
        d_model=int(model.cfg.d_model),
        residual_basis=residual_basis(model),
        weights_hash=digest.hexdigest()[:16],
        embedding_sample=tuple(embedding[rows, columns].float().cpu().tolist()),
    )


def evenly_spaced(first: int, last: int, count: int) -> Int[Tensor, " count"]:
    """Evenly spaced integers from `first` to `last`, rounded down, independent of torch's default dtype."""
    return first + torch.arange(count, dtype=torch.long) * (last - first) // max(1, count - 1)


def _embedding(model: Model) -> Tensor:
    if is_bridge(model):
        return cast(Any, model).original_model.get_input_embeddings().weight.detach()
    return cast(Any, model).W_E.detach()


_of_folders: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()
"""What `declared_ends` read from disk for a `HookedTransformer` that persona_lens did not load."""


def declared_ends(model: Any) -> frozenset[int]:
    """The ids in the `eos_token_id` of the model's generation settings; chat models often list the end of a turn there.

    For a `HookedTransformer` that persona_lens did not load, the settings are read from the folder, or the hub's local
    cache, that its tokenizer came from, never from the network.
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
        except (OSError, ValueError, AttributeError):  # no such file, or a folder with a tokenizer alone
            continue
        if ends:
            return ends
    return frozenset()


def _ids(value: Any) -> frozenset[int]:
    """The ids in an `eos_token_id`, which is None, a number, a list or a tensor."""
    if value is None:
        return frozenset()
    ids = value.tolist() if hasattr(value, "tolist") else value
    return frozenset(map(int, ids if isinstance(ids, list | tuple) else [ids]))
