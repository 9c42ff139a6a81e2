"""Rollouts from a server that speaks OpenAI's chat completions: many calls at a time, each row kept as it comes.

One call a row, since not every server gives several answers to one. A row's seed is a hash of the run's seed and the
row's name in sampling, so that rows differ and a repeated run sends the same requests.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from tqdm.auto import tqdm

from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import CallEstimate, ChatRequest, only_reasoning, stop_if_textless
from persona_lens.rollouts.rows import REJECTED, Prompt, Rollout


@dataclass
class ServerEngine:
    """Samples rollouts from a model on a server, which renders the chat template itself.

    Rows have no `response_tokens`: the server's tokens need not be those of the model under study. An answer that the
    server withheld (`finish_reason` "content_filter") stays as an empty row, and so does a prompt that it rejects
    though it takes others (`finish_reason` "rejected: " and the server's message); a resume does not ask it again. The
    server decides whether it honours seeds and where a turn ends: for one that runs past the end of a turn, pass the
    client `extra_body={"stop": ["<end_of_turn>"]}`.
    """

    client: OpenAIClient
    max_new_tokens: int = 1000
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "Sampling needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, "
                f"got {self.max_new_tokens}, {self.temperature:g} and {self.top_p:g}."
            )

    @property
    def batch_size(self) -> int:
        """Calls at a time."""
        return self.client.concurrency

    @property
    def name(self) -> str:
        """Model, server and sampling settings."""
        endpoint = self.client.endpoint
        extra = "".join(f", {name} {value!r}" for name, value in self.client.extra_body.items())
        return (
            f"{endpoint.model_name} on the server {endpoint.url}{extra}, temperature {self.temperature:g}, "
            f"top_p {self.top_p:g}, at most {self.max_new_tokens} tokens"
        )

    def estimate(self, prompts: Sequence[Prompt], *, seed: int = 0) -> CallEstimate:
        """The number of calls, and the cost of those that are not cached; asks nothing."""
        return self.client.estimate(self._requests(prompts, seed))

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """One response a prompt, in order."""
        rows = self.answer_each(prompts, seed=seed)
        by_index = dict(tqdm(rows, total=len(prompts), desc="server", unit="row", leave=False, disable=not progress))
        return [by_index[index] for index in range(len(prompts))]

    def answer_each(self, prompts: Sequence[Prompt], *, seed: int) -> Iterator[tuple[int, Rollout]]:
        """Yield (index, response) of every prompt, as they come.

        After a call fails for good no further one begins, those that run are finished and yielded, and then the
        client's `ServerError` is raised. An answer that ended in the model's reasoning is an empty row.

        Raises:
            ServerError: The server could not be asked.
            ValueError: The first answers hold reasoning alone.
        """
        answers = self.client.complete_each(self._requests(prompts, seed))
        message = only_reasoning(f"{self.client.name} within {self.max_new_tokens} tokens", "--server-extra-body")
        for index, completion in stop_if_textless(answers, lambda item: item[1].only_reasoned, message):
            rejection = completion.rejection
            yield (
                index,
                Rollout(
                    **asdict(prompts[index]),
                    response=completion.text,
                    response_tokens=None,
                    finish_reason=REJECTED + rejection if rejection else completion.finish_reason,
                    engine=self.name,
                    seed=seed,
                ),
            )

    def _requests(self, prompts: Sequence[Prompt], seed: int) -> list[ChatRequest]:
        if steered := [prompt.intervention for prompt in prompts if prompt.intervention]:
            raise ValueError(f"A server runs no interventions, got a row with {steered[0]!r}: sample from a model.")
        return [
            ChatRequest(
                tuple(prompt.messages),
                max_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=row_seed(seed, prompt.randomness),
                sample=prompt.sample,
            )
            for prompt in prompts
        ]


def row_seed(seed: int, randomness: str) -> int:
    """A seed of 31 bits, which every server takes, from the run's seed and the row's name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{randomness}".encode()).digest()[:4], "big") >> 1
