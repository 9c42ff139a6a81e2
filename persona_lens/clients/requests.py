"""What is asked of a chat server and what it answers, in the form that OpenAI's chat completions gave the field.

A request knows everything that shapes its answer, so its key names the answer in a cache; the API key is no part of it.
Knows nothing about connections, judges or traits.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from persona_lens.chat.batches import Message


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
    """A token of an answer and what could have stood there: (text, natural log-probability), likeliest first.

    `logprob` is None where the server gave none for this token.
    """

    text: str
    logprob: float | None
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ChatCompletion:
    """A server's answer. `tokens` is None where no log-probabilities came; `refusal` is the model's own, if any.

    `rejection` is why the server did not take the request at all; None for every answer.
    `has_reasoning` says whether the server returned reasoning beside the text, which itself is not kept.
    """

    text: str
    finish_reason: str
    model: str
    refusal: str | None = None
    tokens: tuple[Token, ...] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    rejection: str | None = None
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

    def __init__(self, told: str, *, status: int | None = None):
        super().__init__(told)
        self.status = status


class RejectedRequest(ServerError):
    """A request that the server will not take however often it is asked, such as one longer than its context."""


class UnusableAnswer(ServerError):
    """A response that came with success and still is no answer; asking again may help."""


class MissingLogprobs(UnusableAnswer):
    """A response without the log-probabilities that were asked for."""


class ErrorAnswer(UnusableAnswer):
    """An error in the body of a response that came with success; `said` is the server's own message."""

    def __init__(self, said: str, *, status: int | None = None):
        super().__init__(f"an error ({said})", status=status)
        self.said = said


def request_key(body: Mapping[str, Any], *, url: str, sample: int) -> str:
    """32 hexadecimal digits that change with anything that shapes the answer: server, body, number of the sample."""
    canonical = json.dumps([url, body, sample], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _Alternative(_Wire):
    token: str | None = None
    logprob: float | None = None


class _TokenLogprob(_Alternative):
    top_logprobs: list[_Alternative | None] | None = None


class _Logprobs(_Wire):
    content: list[_TokenLogprob | None] | None = None


class _Part(_Wire):
    text: str | None = None


class _Message(_Wire):
    content: str | list[str | _Part | None] | None = None
    refusal: str | None = None
    # vLLM, SGLang and llama.cpp name it so; newer vLLM, Ollama and OpenRouter `reasoning`.
    reasoning_content: Any = None
    reasoning: Any = None


class _Choice(_Wire):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    error: Any = None


class _Usage(_Wire):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Response(_Wire):
    choices: list[_Choice] = Field(min_length=1)
    model: str | None = None
    usage: _Usage | None = None


def read_completion(content: str | bytes, *, with_logprobs: bool) -> ChatCompletion:
    """The completion in the body of a server's response; a null anywhere in it is as if the field were absent.

    Raises UnusableAnswer where it is no chat completion (broken JSON, no choice), and two kinds of it: ErrorAnswer
    where it is a server's error, and MissingLogprobs where it lacks log-probabilities `with_logprobs`.
    """
    try:
        response = _Response.model_validate_json(content)
    except ValidationError as error:
        _raise_error_in(content)
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise UnusableAnswer(f"no chat completion ({where}: {first['msg']})") from None
    choice, usage = response.choices[0], response.usage or _Usage()
    if choice.error:
        _raise_error(choice.error)
    found = (choice.logprobs.content if choice.logprobs else None) or []
    tokens = tuple(map(_token, found))
    # Rounding may leave a hair above 0; more than that is no probability, and neither is NaN.
    logprobs = [token.logprob for token in tokens] + [each for token in tokens for _, each in token.alternatives]
    if any(not logprob <= 0.01 for logprob in logprobs if logprob is not None):
        raise UnusableAnswer("log-probabilities above 0")
    if with_logprobs and not tokens:
        raise MissingLogprobs("an answer without the log-probabilities that were asked for")
    return ChatCompletion(
        text=_text(choice.message.content),
        finish_reason=choice.finish_reason or "",
        model=response.model or "",
        refusal=choice.message.refusal or None,
        tokens=tokens or None,
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        has_reasoning=bool(choice.message.reasoning_content or choice.message.reasoning),
    )


def _text(content: str | list[str | _Part | None] | None) -> str:
    """The text of a message, whose content some servers give as a list of parts; parts without text have none."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part.text or "" for part in content if part is not None)
    return content or ""


def _token(found: _TokenLogprob | None) -> Token:
    found = found or _TokenLogprob()
    given = [each for each in found.top_logprobs or () if each is not None]
    alternatives = tuple(
        (each.token, each.logprob) for each in given if each.token is not None and each.logprob is not None
    )
    return Token(found.token or "", found.logprob, alternatives)


# What servers call errors that are about the request, where they name no status.
_OF_THE_REQUEST = {
    *("invalid_request_error", "BadRequestError"),
    *("context_length_exceeded", "content_filter", "content_policy_violation"),
}


def _raise_error_in(content: str | bytes) -> None:
    """Raise ErrorAnswer where a body that is no chat completion is a server's error; servers differ in its form."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(body, dict):
        return
    if error := body.get("error"):
        _raise_error(error)
    if body.get("object") == "error" or (isinstance(body.get("message"), str) and "choices" not in body):
        _raise_error(body)


def _raise_error(error: Any) -> None:
    told = error if isinstance(error, dict) else {"message": error}
    said = str(told.get("message") or json.dumps(error))
    code = str(told.get("code") or told.get("status") or "")
    if re.fullmatch("[45][0-9][0-9]", code):
        status = int(code)
    else:
        status = 400 if {code, str(told.get("type"))} & _OF_THE_REQUEST else None
    raise ErrorAnswer(said, status=status)
