"""The HTTP connection to a chat server: it follows no redirect, and reads no more of an answer than `MAX_ANSWER_BYTES`.

The openai SDK's own connection would take a request to whatever host a redirect names, and read an answer of any size.
Proxies that the environment names (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`) are used, as by the SDK.
Imports openai, which is optional: import this module where a server is asked.

One model on one server: its address, its key, what it calls itself, and what its errors mean.

The key comes from the environment, goes to the server that it is for, and stands in no error, name or file.
Knows nothing about requests.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import anyio
import httpx2
import openai

from persona_lens.clients.requests import RejectedRequest, ServerError

if TYPE_CHECKING:
    import openai

MAX_ANSWER_BYTES = 16 * 2**20
"""The longest answer that is read: 1,000 tokens with 20 log-probabilities each take about 2 MB."""


class UnacceptableResponse(openai.OpenAIError):
    """A response that is not read, and what to do; the SDK does not repeat a request for it."""


class BoundedHttpClient(openai.DefaultAsyncHttpxClient):
    """The SDK's HTTP client without redirects and with a limit on the size of a response, errors included.

    Args:
        max_bytes: The largest body that is read.
        timeout: Seconds that reading a body may take in all, however slowly it comes.
    """

    def __init__(self, *, max_bytes: int, timeout: float):
        # Uncompressed, so that the limit holds for what is in memory too: a few kilobytes can unpack to gigabytes.
        super().__init__(follow_redirects=False, headers={"Accept-Encoding": "identity"})
        self.max_bytes, self.max_seconds = max_bytes, timeout

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request and read its whole response.

        Raises:
            UnacceptableResponse: The response is a redirect, is compressed, or is larger than `max_bytes`.
        """
        response = await super().send(request, **{**options, "stream": True, "follow_redirects": False})
        try:
            self._check_head(response)
            with anyio.fail_after(self.max_seconds):
                content = await self._read(response)
        except TimeoutError:
            raise httpx2.ReadTimeout("the answer went on for too long", request=request) from None
        finally:
            await response.aclose()
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            content=content,
            request=request,
            extensions=response.extensions,
        )

    def _check_head(self, response: httpx2.Response) -> None:
        if 300 <= response.status_code < 400:
            raise UnacceptableResponse(
                f"answered {response.status_code}, a redirect to {_target(response)}: "
                "no redirect is followed, so pass that URL yourself if you trust it."
            )
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnacceptableResponse(
                f"sent an answer compressed as {encoding[:40]!r}, which was not asked for: "
                "switch compression off at the server or at the proxy before it."
            )

    async def _read(self, response: httpx2.Response) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > self.max_bytes:
                raise UnacceptableResponse(
                    f"sent an answer of more than {self.max_bytes / 2**20:g} MiB, and the rest was not read: "
                    "lower the length limit, or check that it serves chat completions."
                )
        return bytes(content)


def _target(response: httpx2.Response) -> str:
    """Where a redirect leads, as a base URL and without its query, which may hold anything."""
    location = response.headers.get("location", "")
    try:
        parts = urlsplit(urljoin(str(response.request.url), location))
        host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    except ValueError:
        return "an unreadable URL"
    return f"{parts.scheme}://{host}{parts.path.removesuffix('/chat/completions')}" if location else "no URL"


OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"  # what a server that wants no key is sent
REJECTING = (400, 413, 422)
"""Statuses by which a server says that it will never take this request: too long, filtered, or of another form."""
PASSING = (None, 408, 409, 429, *range(500, 600))
"""Statuses that asking again may mend, as the SDK has them; None is an error that names none."""


@dataclass(frozen=True)
class Endpoint:
    """A model's name on the server at `url`, and the environment variable that holds the key.

    `is_ambient` says whether it is the server that the environment's own OpenAI settings are for; `aliases` are other
    names under which the model may answer.
    """

    model: str
    url: str
    key_variable: str
    is_ambient: bool
    needs_key: bool
    aliases: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: str, base_url: str | None, key_variable: str | None, aliases: Sequence[str] = ()) -> "Endpoint":
        """The endpoint of a client's arguments; raises ValueError where the URL is none, or carries a password."""
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
        """The model's name, with its aliases where it has any."""
        return self.model + (f" (also answering as {', '.join(self.aliases)})" if self.aliases else "")

    @property
    def key(self) -> str | None:
        """The key, None where none is set and none is needed.

        Raises ValueError where one is needed, and where what is set could stand in no header.
        """
        key = os.environ.get(self.key_variable, "").strip() or None
        if key is None and self.needs_key:
            raise ValueError(f"{self.url} wants a key: set the environment variable {self.key_variable}.")
        # The connection would refuse it too, in an error and a log that repeat it.
        if key is not None and re.search(r"[^!-~]", key):
            raise ValueError(f"The environment variable {self.key_variable} holds a blank or a sign that no key has.")
        return key

    @property
    def withheld_headers(self) -> dict[str, Any]:
        """What the SDK would take from the environment's settings for OpenAI, kept from every other server."""
        import openai

        if self.is_ambient:
            return {}
        custom = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
        names = ["OpenAI-Organization", "OpenAI-Project", *(line.partition(":")[0].strip() for line in custom)]
        withheld: dict[str, Any] = {name: openai.Omit() for name in names if name.casefold() != "authorization"}
        # Set, it replaces one among the custom headers; left out, that one would be sent in place of the key.
        return withheld | {"Authorization": f"Bearer {self.key or NO_KEY}"}

    def check(self, answered: str) -> None:
        """Raise ServerError where a model of another name answered; a server may leave its name out."""
        if answered and not any(_same_model(name, answered) for name in (self.model, *self.aliases)):
            raise ServerError(
                f"{self.url} was asked for the model {self.model!r}, and {answered!r} answered: "
                "pass that name if it is the model you mean, "
                f"or aliases=[{answered!r}] (--alias {self.model}={answered}) if it is another name for the same model."
            )

    def explain(self, error: "openai.OpenAIError", *, tries: int, timeout: float) -> ServerError:
        """One sentence on what failed and what to do, without the key even where the server repeated it."""
        import openai

        pass

        if isinstance(error, openai.APIStatusError):
            return self.explain_status(error.status_code, error.body or error, tries=tries)
        if isinstance(error, openai.APITimeoutError):
            found = f"did not answer within {timeout:g} s in {tries} tries: raise timeout, or lower concurrency."
        elif isinstance(error, openai.APIConnectionError):
            found = f"could not be reached in {tries} tries ({self._redacted(error.__cause__ or error)}): does it run?"
        elif isinstance(error, UnacceptableResponse):
            found = self._redacted(error)
        else:
            found = f"could not be asked ({self._redacted(error)})."
        return ServerError(f"{self.url} {found}")

    def explain_status(self, status: int | None, said: object, *, tries: int) -> ServerError:
        """One sentence on an error of this status, None where it names none, and on what the server said of it.

        It is a `RejectedRequest` where the status is about the request rather than about the server.
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


# What may follow a model's name: a date or its four digits, a quantisation, a file's ending, and where it is served.
_SUFFIX = re.compile(
    r"([-.:@](latest|free|\d{4}-\d\d-\d\d|\d\d-\d{4}|\d\d-\d\d|\d{8}|\d{4}|0\d\d"
    r"|ud|i?q\d\w*|(mx|nv)?(fp|bf|int|f|nf)\d+|w\d+a\d+|\d+-?bit|awq|gptq|dynamic"
    r"|gguf|safetensors|\d{5}-of-\d{5}))*"
)


def _same_model(asked: str, answered: str) -> bool:
    """Whether a server that was asked for one name and gives another means the same model.

    A folder before the name, and a date, a quantisation or `:latest` after it, make no difference.
    """
    one, other = (re.split(r"[/\\]", name.casefold())[-1] for name in (asked, answered))
    shorter, longer = sorted((one, other), key=len)
    return bool(shorter) and longer.startswith(shorter) and _SUFFIX.fullmatch(longer[len(shorter) :]) is not None
