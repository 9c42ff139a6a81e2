"""Forward passes that compute what is asked for and no more: no autograd, and the unembedding only on request.

Positions are counted over the mask and keys and values can be kept, selected and continued, alike on both classes.
Knows nothing about traits, vectors or chats: token ids and masks come in.
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
    """Keys and values of tokens that were already run, with their mask; what `forward` hands on."""

    cache: Any
    mask: Bool[Tensor, "batch past"]

    def select(self, rows: Int[Tensor, " chosen"]) -> "Past":
        """A copy that holds the given rows, in their order; a row may stand in it many times."""
        rows = rows.to(self.mask.device)
        # Selecting replaces a layer's tensors, so copies of the containers are enough: the originals stay untouched.
        chosen = copy.copy(self.cache)
        if hasattr(chosen, "layers"):
            chosen.layers = [_copied(layer) for layer in chosen.layers]
            for layer in chosen.layers:
                # Not `batch_select_indices`, which leaves the states of linear attention as they were.
                layer.reorder_cache(rows)
        else:
            chosen.entries = [copy.copy(entry) for entry in chosen.entries]
            for entry in chosen.entries:
                entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
            chosen.previous_attention_mask = chosen.previous_attention_mask[rows]
        return Past(chosen, self.mask[rows])


def _copied(layer: Any) -> Any:
    """A layer of a Hugging Face cache with containers of its own, and the same tensors in them."""
    copied = copy.copy(layer)
    vars(copied).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    return copied


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
    """Run the blocks, and the unembedding only where it is asked for.

    `mask` is False on padding, which may stand on either side; positions are counted over the mask, so padding never
    shifts a token. `last_logits` is how many trailing positions get logits: 0 skips the unembedding altogether, None
    means all. `past` is consumed: its cache grows in place, so select a copy to run it twice. `stop_after` skips the
    blocks above that one, in a pass without logits, after which no other can follow: it leaves no past. `known` is told
    to interventions. Returns the logits (None for 0) and the new `Past` (None unless `keep_past` or `past`).
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
    """Ends a forward pass whose last wanted layer has run."""


@contextmanager
def _stopping(model: Model, layer: int | None) -> Iterator[None]:
    if layer is None:
        yield
        return

    def stop(*_: object) -> None:
        raise _Enough

    # The last hook there, so that everything else at this layer has seen it.
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
    """The model's own masks, one for each kind of its layers, in float32 for a float64 model.

    The lowest float64 is minus infinity to the float32 softmax of Hugging Face's attention, so padding that may attend
    to nothing, as at the left or past a sliding window, would be NaN.
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
