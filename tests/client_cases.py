"""Requests and clients for tests against a local chat server, and scripts that run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import ChatRequest
from tests.processes import child_process

SECRET = "sk-local-0123456789abcdef"
SETTINGS = [
    *("OPENAI_API_KEY", "PERSONA_LENS_API_KEY", "OPENAI_BASE_URL", "OPENAI_ADMIN_KEY"),
    *("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"),
    *("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"),  # the server is on this machine
]
START = """
import sys
from tests.client_cases import asked, client_of
from persona_lens.clients.cache import CallCache
url, path = sys.argv[1:]
"""


def forget_settings(monkeypatch):
    """No key, header or URL of whoever runs the tests reaches a client."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def asked(text="Hello?", **fields):
    """A request of one user turn."""
    return ChatRequest(({"role": "user", "content": str(text)},), **{"max_tokens": 10, **fields})


def client_of(server, model="tiny", **settings):
    """A client of a FaultServer, or of a URL."""
    return OpenAIClient(model, base_url=server if isinstance(server, str) else server.url, **settings)


def start_script(script, *arguments):
    """A process of its own, a context, that runs a script after the lines of START."""
    root = str(Path(__file__).parent.parent)
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | {"PYTHONPATH": root}
    return child_process(
        [sys.executable, "-W", "error", "-c", START + script, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
