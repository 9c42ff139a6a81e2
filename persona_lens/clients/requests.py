"""What is asked of a chat server and what it answers, in the form that OpenAI's chat completions gave the field.

A request knows everything that shapes its answer, so its key names the answer in a cache; the API key is no part of it.
Knows nothing about connections, judges or traits.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from persona_lens.chat import Message


@dataclass(frozen=True)
class ChatRequest:
    """One chat completion to ask for.

    Fields
        messages      dicts of `role` and `content`, the user's last
        max_tokens    length limit of the answer
        temperature   0 is greedy
        top_p         nucleus
        seed          sent to the server, which may or may not heed it; None sends none
        top_logprobs  how many alternatives to report at each token, at most 20; None asks for no log-probabilities
        json_schema   the JSON schema that the answer must follow; None for free text
        prefill       what the answer already begins with: the server goes on from there
        sample        tells repeats of one request apart; it is not sent
    """

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    prefill: str = ""
    sample: int = 0

    def body(self, model: str, *, limit_field: str = "max_tokens") -> dict[str, Any]:
        """The JSON body that is posted, for the model of this name."""
        body: dict[str, Any] = {"model": model, "messages": [dict(message) for message in self.messages]}
        body |= {limit_field: self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        if self.seed is not None:
            body["seed"] = self.seed
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.json_schema is not None:
            wanted = {"name": "answer", "strict": True, "schema": dict(self.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        if self.prefill:
            # llama.cpp goes on from a last assistant message by itself; vLLM has to be told.
            body["messages"].append({"role": "assistant", "content": self.prefill})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body


class Token(NamedTuple):
    """A token of an answer and what could have stood there: (text, natural log-probability), likeliest first."""

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ChatCompletion:
    """A server's answer. `tokens` is None where no log-probabilities came; `refusal` is the model's own, if any.

    `has_reasoning` says whether the server returned reasoning beside the text, which itself is not kept.
    """

    text: str
    finish_reason: str
    model: str
    refusal: str | None = None
    tokens: tuple[Token, ...] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    has_reasoning: bool = False

    # Infinite log-probabilities, which JSON has no number for, come back as they were.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="constants")

    @property
    def only_reasoned(self) -> bool:
        """Whether there is no text because the answer ended in the model's reasoning, or was cut there."""
        return not self.text.strip() and not self.refusal and (self.has_reasoning or self.finish_reason == "length")

    def to_json(self) -> str:
        """As JSON text, which `from_json` reads back."""
        return _COMPLETION.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "ChatCompletion":
        """The completion that `to_json` wrote."""
        return _COMPLETION.validate_json(text)


_COMPLETION = TypeAdapter(ChatCompletion)


class ServerError(ConnectionError):
    """A server that could not be asked, in one sentence that never holds the key; `status` is what HTTP calls it."""

    status: int | None = None


class UnusableAnswer(ServerError):
    """A response that came with success and still is no answer; asking again may help."""


class MissingLogprobs(UnusableAnswer):
    """A response without the log-probabilities that were asked for."""


def request_key(body: Mapping[str, Any], *, url: str, sample: int) -> str:
    """32 hexadecimal digits that change with anything that shapes the answer: server, body, number of the sample."""
    canonical = json.dumps([url, body, sample], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _Alternative(_Wire):
    token: str
    logprob: float


class _TokenLogprob(_Alternative):
    top_logprobs: list[_Alternative] = Field(default_factory=list)


class _Logprobs(_Wire):
    content: list[_TokenLogprob] | None = None


class _Message(_Wire):
    content: str | None = None
    refusal: str | None = None
    # vLLM, SGLang and llama.cpp name it so; newer vLLM, Ollama and OpenRouter `reasoning`.
    reasoning_content: Any = None
    reasoning: Any = None


class _Choice(_Wire):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(_Wire):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Response(_Wire):
    choices: list[_Choice] = Field(min_length=1)
    model: str | None = None
    usage: _Usage | None = None


def read_completion(content: str | bytes, *, with_logprobs: bool) -> ChatCompletion:
    """The completion in the body of a server's response.

    Raises UnusableAnswer where it is no chat completion (broken JSON, no choice), and MissingLogprobs, which is one,
    where it lacks log-probabilities `with_logprobs`.
    """
    try:
        response = _Response.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise UnusableAnswer(f"no chat completion ({where}: {first['msg']})") from None
    choice, usage = response.choices[0], response.usage or _Usage()
    found = choice.logprobs.content if choice.logprobs else None
    # Rounding may leave a hair above 0; more than that is no probability, and neither is NaN.
    if any(not each.logprob <= 0.01 for token in found or () for each in (token, *token.top_logprobs)):
        raise UnusableAnswer("log-probabilities above 0")
    if with_logprobs and not found:
        raise MissingLogprobs("an answer without the log-probabilities that were asked for")
    return ChatCompletion(
        text=choice.message.content or "",
        finish_reason=choice.finish_reason or "",
        model=response.model or "",
        refusal=choice.message.refusal or None,
        tokens=tuple(map(_token, found)) if found else None,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        has_reasoning=bool(choice.message.reasoning_content or choice.message.reasoning),
    )


def _token(found: _TokenLogprob) -> Token:
    alternatives = tuple((each.token, each.logprob) for each in found.top_logprobs)
    return Token(found.token, found.logprob, alternatives)
