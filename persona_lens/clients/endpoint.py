"""One model on one server: its address, its key, its names, and what its errors mean.

The key comes from the environment, goes only to the server that it is for, and is in no error, name or file.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from persona_lens.clients.requests import RejectedRequest, ServerError

if TYPE_CHECKING:
    import openai

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"  # sent to a server that wants no key
REJECTING = (400, 413, 422)
"""Statuses with which a server refuses a request for good: too long, filtered, or malformed."""
PASSING = (None, 408, 409, 429, *range(500, 600))
"""Statuses that a retry may mend, as in the SDK; None is an error without a status."""


@dataclass(frozen=True)
class Endpoint:
    """A model on the server at `url`.

    Fields
        key_variable  the environment variable that holds the key
        is_ambient    whether the environment's own OpenAI settings are for this server
        needs_key     whether a missing key is an error
        aliases       other names under which the model may answer
    """

    model: str
    url: str
    key_variable: str
    is_ambient: bool
    needs_key: bool
    aliases: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: str, base_url: str | None, key_variable: str | None, aliases: Sequence[str] = ()) -> "Endpoint":
        """The endpoint for a client's arguments; raises ValueError for a URL that is none or carries a password."""
        url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError("A server's URL carries no password and no query: put the key into the environment.")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Expected a server's URL such as http://localhost:8000/v1, got {url!r}.")
        is_ambient = not base_url or url == OPENAI_URL
        variable = key_variable or ("OPENAI_API_KEY" if is_ambient else "PERSONA_LENS_API_KEY")
        if isinstance(aliases, str) or not all(alias.strip() for alias in aliases):
            raise ValueError(f"Expected aliases as a list of model names, such as ['gpt-4.1-mini'], got {aliases!r}.")
        needs_key = key_variable is not None or url == OPENAI_URL
        return cls(model, url, variable, is_ambient, needs_key, tuple(aliases))

    @property
    def model_name(self) -> str:
        """The model's name and its aliases."""
        return self.model + (f" (also answering as {', '.join(self.aliases)})" if self.aliases else "")

    @property
    def key(self) -> str | None:
        """The key, None if none is set and none needed; raises ValueError for a missing or malformed one."""
        key = os.environ.get(self.key_variable, "").strip() or None
        if key is None and self.needs_key:
            raise ValueError(f"{self.url} wants a key: set the environment variable {self.key_variable}.")
        # The connection would refuse it too, but its error and its log would repeat the key.
        if key is not None and re.search(r"[^!-~]", key):
            raise ValueError(f"The environment variable {self.key_variable} holds a blank or a sign that no key has.")
        return key

    @property
    def withheld_headers(self) -> dict[str, Any]:
        """Headers that keep the environment's settings for OpenAI, which the SDK would send, from any other server."""
        import openai

        if self.is_ambient:
            return {}
        custom = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
        names = ["OpenAI-Organization", "OpenAI-Project", *(line.partition(":")[0].strip() for line in custom)]
        withheld: dict[str, Any] = {name: openai.Omit() for name in names if name.casefold() != "authorization"}
        # Stated, because an Authorization among the custom headers would otherwise be sent in place of the key.
        return withheld | {"Authorization": f"Bearer {self.key or NO_KEY}"}

    def check(self, answered: str) -> None:
        """Raise ServerError where a model of another name answered; a server may omit the name."""
        if answered and not any(_same_model(name, answered) for name in (self.model, *self.aliases)):
            raise ServerError(
                f"{self.url} was asked for the model {self.model!r}, and {answered!r} answered: "
                "pass that name if it is the model you mean, "
                f"or aliases=[{answered!r}] (--alias {self.model}={answered}) if it is another name for the same model."
            )

    def explain(self, error: "openai.OpenAIError", *, tries: int, timeout: float) -> ServerError:
        """What failed and what to do, without the key even where the server repeated it."""
        import openai

        from persona_lens.clients.connection import UnacceptableResponse

        if isinstance(error, openai.APIStatusError):
            return self.explain_status(error.status_code, error.body or error, tries=tries)
        if isinstance(error, openai.APITimeoutError):
            failure = f"did not answer within {timeout:g} s in {tries} tries: raise timeout, or lower concurrency."
        elif isinstance(error, openai.APIConnectionError):
            failure = (
                f"could not be reached in {tries} tries ({self._redacted(error.__cause__ or error)}): does it run?"
            )
        elif isinstance(error, UnacceptableResponse):
            failure = self._redacted(error)
        else:
            failure = f"could not be asked ({self._redacted(error)})."
        return ServerError(f"{self.url} {failure}")

    def explain_status(self, status: int | None, said: object, *, tries: int) -> ServerError:
        """The error for an HTTP status (None: unknown) and the server's message.

        A `RejectedRequest` where the status is about the request rather than about the server.
        """
        answered = f"{self.url} answered {status or 'with an error'} ({self._redacted(said)})"
        kind = RejectedRequest if status is None or status in REJECTING else ServerError
        return kind(f"{answered}: {self._remedy(status, tries)}.", status=status)

    def _remedy(self, status: int | None, tries: int) -> str:
        if status in (401, 403):
            return f"set the environment variable {self.key_variable} to a key that may use {self.model!r}"
        if status == 404:
            return f"name a model that it serves instead of {self.model!r}, and check the URL, which mostly ends in /v1"
        if status == 429:
            return f"{tries} tries were too many for it, so lower concurrency or wait; what was answered is kept"
        if status is not None and status >= 500:
            return f"so did {tries} tries; what was answered is kept, try again later"
        return "it does not take this request"

    def _redacted(self, said: object) -> str:
        said = said.get("message") or said if isinstance(said, dict) else said
        text, key = " ".join(str(said).split()), self.key
        return shorten(text.replace(key, "[key]") if key else text, 300, placeholder=" ...")


# Suffixes of a model's name: a date or its four digits, a quantisation, a file's ending, the place that serves it.
_SUFFIX = re.compile(
    r"([-.:@](latest|free|\d{4}-\d\d-\d\d|\d\d-\d{4}|\d\d-\d\d|\d{8}|\d{4}|0\d\d"
    r"|ud|i?q\d\w*|(mx|nv)?(fp|bf|int|f|nf)\d+|w\d+a\d+|\d+-?bit|awq|gptq|dynamic"
    r"|gguf|safetensors|\d{5}-of-\d{5}))*"
)


def _same_model(requested: str, answered: str) -> bool:
    """Whether two names mean one model: they may differ by a folder, a date, a quantisation or `:latest`."""
    one, other = (re.split(r"[/\\]", name.casefold())[-1] for name in (requested, answered))
    shorter, longer = sorted((one, other), key=len)
    return bool(shorter) and longer.startswith(shorter) and _SUFFIX.fullmatch(longer[len(shorter) :]) is not None
