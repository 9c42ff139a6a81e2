"""What every result is compared with: one row at a time in float64, run outside TransformerLens and persona_lens.

Weights, products and sums are float64; Hugging Face computes the norms in float32 whatever the model's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.chat.batches import ChatTokens

MINIMUM_COSINE = 0.9999


@torch.no_grad()
def oracle_means(model: Any, row: ChatTokens) -> Float[Tensor, "layer d_model"]:
    """Mean over the row's response of every block's output, before the final norm; `model` is a float64 one."""
    decoder = model.get_decoder()
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _block, _inputs, out: outputs.append(out)) for block in decoder.layers]
    try:
        decoder(input_ids=torch.tensor([row.prompt + row.response]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([output[0, len(row.prompt) :].mean(dim=0) for output in outputs])


def minimum_cosine(
    found: Float[Tensor, "row layer d_model"],
    expected: Float[Tensor, "row all_layers d_model"],
    positive: Sequence[bool],
) -> float:
    """The least cosine to the oracle over layers, of the rows' means and of the difference in means.

    `found` may lack the last layers: the reference loop reads the last one behind the final norm, where it is another
    quantity.
    """
    expected = expected[:, : found.shape[1]]
    sides = torch.tensor(positive)
    differences = [(each[sides].mean(dim=0) - each[~sides].mean(dim=0)) for each in (found.double(), expected)]
    of_means = torch.cosine_similarity(found.double(), expected, dim=-1)
    of_directions = torch.cosine_similarity(*differences, dim=-1)
    return float(torch.minimum(of_means.min(), of_directions.min()))
