"""nnsight: a trace that saves the last token of every layer's output, and stops behind the last layer."""

import nnsight  # pyright: ignore[reportMissingImports]
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peer_workers.serving import Loaded, Rows, padded, serve


def load(folder: str) -> Loaded:
    """The Hugging Face model in nnsight's wrapper for it."""
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = nnsight.TransformersModel(hf_model, tokenizer=AutoTokenizer.from_pretrained(folder))

    @torch.no_grad()
    def traced(rows: Rows, size: int) -> Float[Tensor, "row layer d_model"]:
        found: list[Tensor] = []
        for tokens, attention_mask, last in padded(rows.ids, size):
            each = torch.arange(len(tokens))
            with model.trace({"input_ids": tokens, "attention_mask": attention_mask}) as tracer:
                states = nnsight.save([])
                for layer in model.model.layers:
                    states.append(layer.output[each, last])
                tracer.stop()
            found.append(torch.stack(list(states), dim=1))
        return torch.cat(found)

    return Loaded(hf_model, hf_model.get_input_embeddings(), {"trace": traced})


if __name__ == "__main__":
    serve(load)
