"""steering-vectors: its `record_activations` context around a call of the model, as its own extraction does it."""

import torch
from jaxtyping import Float
from steering_vectors import record_activations  # pyright: ignore[reportMissingImports]
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.peer_workers.serving import Loaded, Rows, padded, serve


def load(folder: str) -> Loaded:
    """The Hugging Face model, which the context takes as it is."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def record(rows: Rows, size: int) -> Float[Tensor, "row layer d_model"]:
        found: list[Tensor] = []
        for batch in padded(rows.ids, size):
            with record_activations(model, layer_type="decoder_block") as recorded:
                model(input_ids=batch.tokens, attention_mask=batch.attention_mask)
            found.append(torch.stack([batch.last_of(recorded[layer][-1]) for layer in sorted(recorded)], dim=1))
        return torch.cat(found)

    return Loaded(model, model.get_input_embeddings(), {"record_activations": record})


if __name__ == "__main__":
    serve(load)
