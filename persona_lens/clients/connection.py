"""The HTTP connection to a chat server: it follows no redirect and reads at most `MAX_ANSWER_BYTES` of an answer.

The openai SDK's own connection would take a request to whatever host a redirect names, and read an answer of any size.
Proxies that the environment names (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`) are used, as by the SDK.
It imports openai, which is optional: import this module only where a server is asked.
"""

from typing import Any
from urllib.parse import urljoin, urlsplit

import anyio
import httpx2
import openai

MAX_ANSWER_BYTES = 16 * 2**20
"""1,000 tokens with 20 log-probabilities each take about 2 MB."""


class UnacceptableResponse(openai.OpenAIError):
    """A response that is not read, and what to do; the SDK does not repeat a request for it."""


class BoundedHttpClient(openai.DefaultAsyncHttpxClient):
    """The SDK's HTTP client without redirects and with a limit on the size of a response, errors included.

    Args:
        max_bytes: The largest body that is read.
        timeout: Seconds that reading a whole body may take, however slowly it comes.
    """

    def __init__(self, *, max_bytes: int, timeout: float):
        # Uncompressed, so that the limit also bounds memory: a few kilobytes can unpack to gigabytes.
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
