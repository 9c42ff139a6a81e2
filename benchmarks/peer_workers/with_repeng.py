"""repeng: the helper that reads the hidden states of its control vectors, which takes texts and reads their last token.

Its last layer is behind the final norm, where it is another quantity: it is read, as its users do, and left out of the
result.
"""

import torch
from jaxtyping import Float
from repeng.extract import batched_get_hiddens  # pyright: ignore[reportMissingImports]
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peer_workers.serving import Loaded, Rows, serve


def load(folder: str) -> Loaded:
    """The Hugging Face model and tokenizer, as in repeng's notebooks; nothing is wrapped, since nothing is steered."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers = list(range(model.config.num_hidden_layers))

    def batched(rows: Rows, size: int) -> Float[Tensor, "row layer d_model"]:
        hiddens = batched_get_hiddens(model, tokenizer, rows.texts, layers, size)
        return torch.stack([torch.from_numpy(hiddens[layer]) for layer in layers[:-1]], dim=1)

    return Loaded(
        model, model.get_input_embeddings(), {"batched_get_hiddens": batched}, lambda text: tokenizer(text).input_ids
    )


if __name__ == "__main__":
    serve(load)
