"""persona_lens on a TransformerBridge: batches in `mean_activations`, or rows in `stream_means`, which batches them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peer_workers.serving import Loaded, Rows, serve
from persona_lens import load_model, mean_activations
from persona_lens.activations.means import stream_means
from persona_lens.chat.batches import ChatTokens, collate


def load(folder: str) -> Loaded:
    """The bridge; a row is a prompt, whose last token is read."""
    model: Any = load_model(folder)

    def in_batches(rows: Rows, size: int) -> Float[Tensor, "row layer d_model"]:
        chats = [ChatTokens(tuple(ids)) for ids in rows.ids]
        batches = [collate(chats[start : start + size]) for start in range(0, len(chats), size)]
        return torch.cat([mean_activations(model, batch, position="prompt_last") for batch in batches])

    def streamed(rows: Rows, token_budget: int) -> Float[Tensor, "row layer d_model"]:
        chats = [ChatTokens(tuple(ids)) for ids in rows.ids]
        found = list(stream_means(model, chats, position="prompt_last", token_budget=token_budget or None))
        order = torch.tensor([row for batch in found for row in batch.rows])
        # The first row of the stream is the embedding.
        return torch.cat([batch.means[:, 1:] for batch in found])[order.argsort()]

    methods = {"mean_activations": in_batches, "stream_means": streamed}
    return Loaded(model, model.original_model.get_input_embeddings(), methods)


if __name__ == "__main__":
    serve(load)
