"""saklas: what its fits run over texts, which gathers each row's last token in the hooks and ends at the last block.

`compute_neutral_activations` takes rows that are tokenised already, in its own batches; the function that it runs for
each of them takes a batch of any size.
"""

import torch
from jaxtyping import Float
from saklas.core import capture  # pyright: ignore[reportMissingImports]
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
            found.append(torch.stack([states[layer] for layer in sorted(states)], dim=1))
        return torch.cat(found)

    @torch.inference_mode()
    def neutral(rows: Rows, _size: int) -> Float[Tensor, "row layer d_model"]:
        rendered = [(torch.tensor([ids]), len(ids) - 1) for ids in rows.ids]
        states = capture.compute_neutral_activations(model, tokenizer, layers, rendered=rendered)
        return torch.stack([states[layer] for layer in sorted(states)], dim=1)

    methods = {"capture kernel": captured, "compute_neutral_activations": neutral}
    return Loaded(model, model.get_input_embeddings(), methods)


if __name__ == "__main__":
    serve(load)
