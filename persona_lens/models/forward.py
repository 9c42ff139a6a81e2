"""One forward pass, the same on both model classes: no autograd, and only the logits and layers that are asked for.

Positions are counted over the mask, so padding never shifts a token; keys and values can be kept, selected and
continued. Everything that computes activations or text goes through `forward`.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.models.pass_context import KnownPass, announce
from persona_lens.models.scopes import Hook, hooked, model_lock, repair
from persona_lens.models.structure import Model, is_bridge, model_device, residual_points
from persona_lens.models.unhooked_pass import unhooked


@dataclass(frozen=True)
class Past:
    """Keys and values of tokens that have been run, with their mask, for a next call of `forward`."""

    cache: Any
    mask: Bool[Tensor, "batch past"]

    def select(self, rows: Int[Tensor, " chosen"]) -> "Past":
        """A copy with the given rows, in their order; a row may be repeated."""
        rows = rows.to(self.mask.device)
        # Selecting replaces tensors and never writes into them, so it is enough to copy the containers: the tensors of
        # this Past stay as they are.
        cache = copy.copy(self.cache)
        if hasattr(cache, "layers"):  # Hugging Face's, of a bridge
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            for layer in cache.layers:
                # Layers of linear attention keep their states in dicts.
                vars(layer).update(
                    {name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)}
                )
                # `batch_select_indices` would not select those states.
                layer.reorder_cache(rows)
        else:  # TransformerLens's, of a HookedTransformer
            cache.entries = [copy.copy(entry) for entry in cache.entries]
            for entry in cache.entries:
                entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
            cache.previous_attention_mask = cache.previous_attention_mask[rows]
        return Past(cache, self.mask[rows])


@torch.no_grad()
def forward(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    *,
    past: Past | None = None,
    keep_past: bool = False,
    last_logits: int | None = 0,
    stop_after: int | None = None,
    known: KnownPass | None = None,
) -> tuple[Float[Tensor, "batch kept d_vocab"] | None, Past | None]:
    """Run the model on token ids; returns the logits (None for `last_logits=0`) and the new `Past`, if one is kept.

    Args:
        model: The model; interventions and hooks that are attached to it act.
        tokens: Token ids.
        mask: False on padding, which may stand on either side.
        past: What to continue. It is consumed: its cache grows in place, so `select` a copy to run it twice.
        keep_past: Return a `Past`, which a pass with `past` always does.
        last_logits: The number of trailing positions that get logits; 0 skips the unembedding, None means all.
        stop_after: Skip the blocks above this layer. Such a pass has no logits and leaves no `Past`.
        known: What interventions are told about the rows and their prompts.
    """
    device = model_device(model)
    tokens, mask = tokens.to(device), mask.to(device)
    seen = mask if past is None else torch.cat([past.mask, mask], dim=1)
    run = _forward_bridge if is_bridge(model) else _forward_hooked
    cache = None if past is None else past.cache
    if stop_after is not None and (keep_past or last_logits != 0):
        raise ValueError("A pass that stops after a layer has no logits, and keys and values of some layers only.")
    logits = None
    with model_lock(model):
        repair(model)
        with announce(known, seen), _stopping(model, stop_after):
            logits, cache = run(cast(Any, model), tokens, mask, seen, cache, keep_past, last_logits)
    return logits, None if cache is None or stop_after is not None else Past(cache, seen)


class _Enough(Exception):
    """Ends a forward pass after the last layer that is wanted."""


@contextmanager
def _stopping(model: Model, layer: int | None) -> Iterator[None]:
    if layer is None:
        yield
        return

    def stop(*_: object) -> None:
        raise _Enough

    # Attached last, so that every other hook at this layer has run.
    with suppress(_Enough), hooked(model, [Hook(residual_points(model)[layer + 1], stop)]):
        yield


def _forward_bridge(
    model: Any, tokens: Tensor, mask: Tensor, seen: Tensor, cache: Any, keep: bool, last: int | None
) -> tuple[Tensor | None, Any]:
    hf_model = unhooked(model)
    if cache is None and keep:
        from persona_lens.models.kv_cache import growing_cache

        cache = growing_cache(hf_model.config)
    target = hf_model.get_decoder() if last == 0 else hf_model
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": seen.long(), "use_cache": cache is not None}
    accepted = inspect.signature(target.forward).parameters
    if "position_ids" in accepted:
        inputs["position_ids"] = (seen.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    if cache is not None:
        inputs["past_key_values"] = cache
    if hf_model.dtype == torch.float64 and not bool(seen.all()):
        inputs["attention_mask"] = _finite_masks(hf_model.config, tokens, seen, cache)
    if last == 0:
        target(**inputs)
        return None, cache
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = last or 0
    logits = target(**inputs).logits
    return logits if last is None else logits[:, -last:], cache


def _finite_masks(
    config: Any, tokens: Int[Tensor, "batch pos"], seen: Bool[Tensor, "batch seen"], cache: Any
) -> Tensor | dict[str, Tensor | None] | None:
    """The model's own attention masks, one for each kind of layer, in float32 for a float64 model.

    Hugging Face's attention takes its softmax in float32, where the lowest float64 becomes minus infinity. Padding that
    may attend to nothing (at the left, or past a sliding window) would then become NaN.
    """
    from transformers.masking_utils import create_masks_for_generate

    like = torch.empty(*tokens.shape, 0, dtype=torch.float32, device=tokens.device)  # only its shape and dtype are read
    return create_masks_for_generate(config, like, seen.long(), cache)


def _forward_hooked(
    model: Any, tokens: Tensor, mask: Tensor, seen: Tensor, cache: Any, keep: bool, last: int | None
) -> tuple[Tensor | None, Any]:
    if cache is None and keep:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, tokens.device, tokens.shape[0])
    resid = model(tokens, attention_mask=mask.long(), past_kv_cache=cache, stop_at_layer=model.cfg.n_layers)
    if last == 0:
        return None, cache
    resid = resid if last is None else resid[:, -last:]
    if model.cfg.normalization_type is not None:
        resid = model.ln_final(resid)
    logits = model.unembed(resid)
    if (cap := getattr(model.cfg, "output_logits_soft_cap", 0.0)) and cap > 0:
        logits = cap * torch.tanh(logits / cap)
    return logits, cache
