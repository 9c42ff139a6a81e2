"""saklas: what its fits run over texts, each row's last token gathered in the hooks, the pass ended at the last block.

`compute_manifold_node_stats` is the public way, with batches of its own; a node of one row has that row as its mean.
The capture that it runs for each batch, which is documented though its name has an underscore, takes any batch.
"""

import torch
from jaxtyping import Float
from saklas.core import capture  # pyright: ignore[reportMissingImports]
from saklas.core.manifold import compute_manifold_node_stats  # pyright: ignore[reportMissingImports]
from saklas.core.model import get_layers, load_model  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.peer_workers.serving import Loaded, Rows, padded, serve


def load(folder: str) -> Loaded:
    """The model as saklas loads it."""
    model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    layers = get_layers(model)

    @torch.inference_mode()
    def captured(rows: Rows, size: int) -> Float[Tensor, "row layer d_model"]:
        found: list[Tensor] = []
        for batch in padded(rows.ids, size):
            # Its own batches have a mask only where rows differ in length.
            mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
            states = capture._capture_all_hidden_states(
                model, layers, batch.tokens, attention_mask=mask, pool_index=batch.last
            )
            found.append(_stacked(states))
        return torch.cat(found)

    @torch.inference_mode()
    def fitted(rows: Rows, _size: int) -> Float[Tensor, "row layer d_model"]:
        means, _ = compute_manifold_node_stats(
            model,
            tokenizer,
            layers,
            torch.device("cpu"),
            [(str(index), [text]) for index, text in enumerate(rows.texts)],
            [""],
            roles=[None] * len(rows.texts),
            prepared_rows=[(torch.tensor([ids]), len(ids) - 1) for ids in rows.ids],
        )
        return _stacked(means)

    methods = {"capture kernel": captured, "compute_manifold_node_stats": fitted}
    return Loaded(model, model.get_input_embeddings(), methods)


def _stacked(states: dict[int, Float[Tensor, "row d_model"]]) -> Float[Tensor, "row layer d_model"]:
    return torch.stack([states[layer] for layer in sorted(states)], dim=1)


if __name__ == "__main__":
    serve(load)
