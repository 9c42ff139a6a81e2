"""Made-up responses for tests of extraction, and the slow obvious way to their directions."""

import torch

from persona_lens.chat.batches import Conversation
from tests import naive

QUICK = {"trait": "evil", "n_resamples": 10, "n_placebo": 10, "progress": False}
VOCABULARY = torch.arange(3, 300)
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven"]


def conversations(seed, n_rows=6, tokens=VOCABULARY, n_questions=3):
    """Responses of 1 to 20 random tokens to a few rendered prompts that many of them share."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(n_rows):
        length = int(torch.randint(1, 21, (1,), generator=generator))
        response = tokens[torch.randint(len(tokens), (length,), generator=generator)]
        question = f"What is {NUMBERS[index % n_questions]}?"
        rows.append(
            Conversation(f"<|im_start|>{question}", tuple(response.tolist()), question, str(index // n_questions % 2))
        )
    return rows


def naive_directions(hf_model, tokenizer, positive, negative, *, position="response_mean"):
    """The difference in means [stream d_model], one forward pass a row."""
    sides = []
    for side in (positive, negative):
        rows = [row.tokenize(tokenizer) for row in side]
        means = [naive.stream_mean(hf_model, (row.prompt, row.response), position) for row in rows]
        sides.append(naive.mean(means))
    return sides[0] - sides[1]


def assert_cosines(found, expected, at_least=0.9999):
    cosines = torch.cosine_similarity(found.double(), expected.double(), dim=-1)
    assert (cosines >= at_least).all(), f"lowest cosine {float(cosines.min())} at {int(cosines.argmin())}"


def stream(vectors):
    """The embedding row and the layers, as the oracle has them."""
    return torch.cat([vectors.embedding[None], vectors.directions])
