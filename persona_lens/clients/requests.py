"""Requests to a chat server, its answers in the form of OpenAI's chat completions, and what they cost.

A request holds everything that shapes its answer, so that its hash can name the answer in a cache; the API key is not
part of it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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
        seed          sent to the server, which may ignore it; None sends none
        top_logprobs  how many alternatives to report at each token, at most 20; None asks for no log-probabilities
        json_schema   the JSON schema that the answer must follow; None for free text
        prefill       the beginning of the answer, from which the server continues
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
        """The JSON body to post for the model of this name."""
        body: dict[str, Any] = {"model": model, "messages": [dict(message) for message in self.messages]}
        body |= {limit_field: self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        if self.seed is not None:
            body["seed"] = self.seed
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.json_schema is not None:
            schema = {"name": "answer", "strict": True, "schema": dict(self.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.prefill:
            # llama.cpp continues a last assistant message by itself; vLLM has to be told.
            body["messages"].append({"role": "assistant", "content": self.prefill})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body


def request_key(body: Mapping[str, Any], *, url: str, sample: int) -> str:
    """32 hexadecimal digits that change with anything that shapes the answer: server, body, number of the sample."""
    canonical = json.dumps([url, body, sample], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


class Token(NamedTuple):
    """A token of an answer, with its alternatives: (text, natural log-probability), likeliest first.

    `logprob` is None where the server gave none for this token.
    """

    text: str
    logprob: float | None
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ChatCompletion:
    """A server's answer.

    Fields
        refusal        the model's own refusal, None without one
        tokens         None without log-probabilities
        rejection      why the server did not take the request; None for every answer
        has_reasoning  whether the server returned reasoning beside the text; the reasoning itself is not kept
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

    # JSON has no number for an infinite log-probability; written as a constant it is read back unchanged.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="constants")

    @property
    def only_reasoned(self) -> bool:
        """Whether there is no text because the answer ended inside the model's reasoning."""
        return not self.text.strip() and not self.refusal and (self.has_reasoning or self.finish_reason == "length")

    def to_json(self) -> str:
        """As JSON text, for `from_json`."""
        return _COMPLETION.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "ChatCompletion":
        """The completion that `to_json` wrote."""
        return _COMPLETION.validate_json(text)


_COMPLETION = TypeAdapter(ChatCompletion)


class ServerError(ConnectionError):
    """A server could not be asked; the message never holds the key, `status` is the HTTP status."""

    def __init__(self, message: str, *, status: int | None = None):
        super().__init__(message)
        self.status = status


class RejectedRequest(ServerError):
    """The server will not take this request however often it is asked, for example because it is too long."""


class UnusableAnswer(ServerError):
    """A response came with success and is no answer; asking again may help."""


class MissingLogprobs(UnusableAnswer):
    """A response without the log-probabilities that were asked for."""


class ErrorAnswer(UnusableAnswer):
    """An error in the body of a response that came with success; `said` is the server's own message."""

    def __init__(self, said: str, *, status: int | None = None):
        super().__init__(f"an error ({said})", status=status)
        self.said = said


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
    # The name in vLLM, SGLang and llama.cpp; newer vLLM, Ollama and OpenRouter say `reasoning`.
    reasoning_content: Any = None
    reasoning: Any = None


class _Choice(_Wire):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    error: Any = None


class _Tokens(_Wire):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Response(_Wire):
    choices: list[_Choice] = Field(min_length=1)
    model: str | None = None
    usage: _Tokens | None = None


def read_completion(content: str | bytes, *, with_logprobs: bool) -> ChatCompletion:
    """The completion in the body of a server's response; a null anywhere in it counts as an absent field.

    Raises:
        UnusableAnswer: It is no chat completion (broken JSON, no choice).
        ErrorAnswer: It is a server's error.
        MissingLogprobs: It lacks log-probabilities although `with_logprobs`.
    """
    try:
        response = _Response.model_validate_json(content)
    except ValidationError as error:
        _raise_error_in(content)
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise UnusableAnswer(f"no chat completion ({where}: {first['msg']})") from None
    choice, usage = response.choices[0], response.usage or _Tokens()
    if choice.error:
        _raise_error(choice.error)
    tokens = tuple(map(_token, (choice.logprobs.content if choice.logprobs else None) or []))
    logprobs = [token.logprob for token in tokens] + [logprob for token in tokens for _, logprob in token.alternatives]
    # Rounding may leave a hair above 0; more than that is no probability, and neither is NaN.
    if any(not logprob <= 0.01 for logprob in logprobs if logprob is not None):
        raise UnusableAnswer("log-probabilities above 0")
    if with_logprobs and not tokens:
        raise MissingLogprobs("an answer without the log-probabilities that were asked for")
    text = choice.message.content or ""
    if isinstance(text, list):  # some servers send parts
        text = "".join(part if isinstance(part, str) else part.text or "" for part in text if part is not None)
    return ChatCompletion(
        text=text,
        finish_reason=choice.finish_reason or "",
        model=response.model or "",
        refusal=choice.message.refusal or None,
        tokens=tokens or None,
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        has_reasoning=bool(choice.message.reasoning_content or choice.message.reasoning),
    )


def _token(wire: _TokenLogprob | None) -> Token:
    wire = wire or _TokenLogprob()
    places = [place for place in wire.top_logprobs or () if place is not None]
    alternatives = [(place.token, place.logprob) for place in places]
    return Token(
        wire.token or "",
        wire.logprob,
        tuple((text, logprob) for text, logprob in alternatives if text is not None and logprob is not None),
    )


# Codes and types of errors that are about the request, in servers that give no status.
_REQUEST_ERRORS = {
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
    fields = error if isinstance(error, dict) else {"message": error}
    code = str(fields.get("code") or fields.get("status") or "")
    if re.fullmatch("[45][0-9][0-9]", code):
        status = int(code)
    else:
        status = 400 if {code, str(fields.get("type"))} & _REQUEST_ERRORS else None
    raise ErrorAnswer(str(fields.get("message") or json.dumps(error)), status=status)


TEXTLESS_LIMIT = 5
"""A run stops where this many of its first answers hold reasoning alone."""

_EXTRA_BODY = '{"chat_template_kwargs": {"enable_thinking": false}}'
Item = TypeVar("Item")


def only_reasoning(subject: str, option: str) -> str:
    """The error for a model that reasons where text is wanted; `option` is the command-line option that stops it.

    Such a server returns `content: null`, its reasoning in a field of its own, and often `finish_reason: "length"`.
    """
    return (
        f"{subject} reasons before it answers, and its answer ends before there is text: turn reasoning off with "
        f"OpenAIClient(..., extra_body={_EXTRA_BODY.replace('false', 'False')}), or {option} '{_EXTRA_BODY}' on the "
        'command line (for OpenAI\'s own models {"reasoning_effort": "minimal"}), or name a model that does not reason.'
    )


def stop_if_textless(items: Iterable[Item], is_textless: Callable[[Item], bool], message: str) -> Iterator[Item]:
    """The items; raises ValueError with `message` where the first `TEXTLESS_LIMIT` of them are all without text.

    Textless items before the first one with text are held back, so that a run that stops writes nothing. After it, and
    where there are fewer, they pass: one long chain of thought must not stop a run for good.
    """
    textless: list[Item] = []
    has_text = False
    for item in items:
        if not has_text and is_textless(item):
            textless.append(item)
            if len(textless) == TEXTLESS_LIMIT:
                raise ValueError(message)
            continue
        has_text = True
        yield from textless
        textless.clear()
        yield item
    yield from textless


class Prices(NamedTuple):
    """US dollars per million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars for so many tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


# The paper's judge, at OpenAI's list prices of April 2025; the caller gives those of any other model.
LIST_PRICES = {"gpt-4.1-mini": Prices(0.40, 1.60), "gpt-4.1-mini-2025-04-14": Prices(0.40, 1.60)}


@dataclass
class Usage:
    """What a client has used so far: calls that the server or the cache answered, retries, tokens.

    `rejected` counts the requests that the server did not take although it took others.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prices: Prices | None = None
    rejected: int = 0

    def add(self, completion: ChatCompletion) -> None:
        """Count an answer of the server."""
        self.calls += 1
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens

    @property
    def cost(self) -> float | None:
        """US dollars, None where no prices are known."""
        return None if self.prices is None else self.prices.cost(self.prompt_tokens, self.completion_tokens)

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        rejected = f", {self.rejected:,} rejected by the server" if self.rejected else ""
        return (
            f"{self.calls:,} calls ({self.cached:,} more from the cache, {self.retries:,} retries{rejected}), {tokens}"
            f"{_dollars(self.cost)}"
        )


class CallEstimate(NamedTuple):
    """What calls would take: their number, how many are cached, and at most how many tokens the rest would use.

    A prompt is estimated at four bytes a token, a completion at its limit.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    @classmethod
    def of(cls, missing: Sequence[ChatRequest], *, cached: int, prices: Prices | None) -> "CallEstimate":
        """For the requests that are not in the cache; those that are there are only counted."""
        texts = (json.dumps(request.messages, ensure_ascii=False) for request in missing)
        prompt = sum(len(text.encode()) // 4 + 1 for text in texts)
        completion = sum(request.max_tokens for request in missing)
        cost = None if prices is None else prices.cost(prompt, completion)
        return cls(len(missing) + cached, cached, prompt, completion, cost)

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, {self.cached:,} of them in the cache; the rest would send about "
            f"{self.prompt_tokens:,} tokens and receive at most {self.completion_tokens:,}{_dollars(self.cost)}"
        )


def _dollars(cost: float | None) -> str:
    return "" if cost is None else f", about ${cost:.2f}" if cost >= 0.01 else ", less than $0.01"
