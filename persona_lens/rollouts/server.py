"""Rollouts from a server that speaks OpenAI's chat completions: many calls at a time, each row kept as it comes.

One call a row, since not every server gives several answers to one. A row's seed is a hash of the run's seed and of
what names the row in sampling, so rows differ and a run asks for the same ones again.
Knows nothing about files; which servers there are, the client knows.
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

    A row has no `response_tokens`: the server's tokens need not be those of the model under study. An answer that the
    server held back (`finish_reason` "content_filter") stays as an empty row, and so does a prompt that it rejects
    though it takes others, such as one longer than its context (`finish_reason` "rejected: " and the server's message):
    a resume does not ask it again. Whether the seeds are heeded, and answers repeat without the client's cache, is the
    server's affair. So is where a turn ends: for a server that runs past the end of a turn, pass the client
    `extra_body={"stop": ["<end_of_turn>"]}`.
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
        """As many as the client asks at a time."""
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
        """How many calls the rollouts take and what those that are not cached would cost; asks nothing."""
        return self.client.estimate(self._requests(prompts, seed))

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """One response a prompt, in order."""
        each = self.answer_each(prompts, seed=seed)
        answers = dict(tqdm(each, total=len(prompts), desc="server", unit="row", leave=False, disable=not progress))
        return [answers[index] for index in range(len(prompts))]

    def answer_each(self, prompts: Sequence[Prompt], *, seed: int) -> Iterator[tuple[int, Rollout]]:
        """(index, response) of every prompt, as they come.

        Where a call fails for good no further one is begun, those under way are finished and yielded, and then the
        client's `ServerError` is raised. An answer that ended in the model's reasoning is an empty row.

        Raises:
            ServerError: The server could not be asked.
            ValueError: The first answers are all of reasoning alone.
        """
        answers = self.client.complete_each(self._requests(prompts, seed))
        told = only_reasoning(f"{self.client.name} within {self.max_new_tokens} tokens", "--server-extra-body")
        for index, completion in stop_if_textless(answers, lambda item: item[1].only_reasoned, told):
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
            raise ValueError(f"Nothing can be done to a model on a server, and a row wants {steered[0]!r}.")
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
    """A seed of 31 bits, which every server takes, that depends on the run's seed and the row's name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{randomness}".encode()).digest()[:4], "big") >> 1
