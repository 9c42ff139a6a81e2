"""TransformerLens: `run_with_cache` of a TransformerBridge, with a filter on the residual stream behind every block.

Its `stop_at_layer` leaves out the last block with the unembedding, so the whole model runs.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peer_workers.serving import Loaded, Rows, padded, serve
from persona_lens import load_model


def load(folder: str) -> Loaded:
    """The bridge that persona_lens runs on, so that only the way of reading differs."""
    model: Any = load_model(folder)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]

    @torch.inference_mode()
    def cached(rows: Rows, size: int) -> Float[Tensor, "row layer d_model"]:
        found: list[Tensor] = []
        for batch in padded(rows.ids, size):
            _, cache = model.run_with_cache(
                batch.tokens,
                attention_mask=batch.attention_mask,
                names_filter=lambda name: name.endswith("hook_resid_post"),
                return_type=None,
            )
            found.append(torch.stack([batch.last_of(cache[name]) for name in names], dim=1))
        return torch.cat(found)

    return Loaded(model, model.original_model.get_input_embeddings(), {"run_with_cache": cached})


if __name__ == "__main__":
    serve(load)
