"""What an LLM may write when it is asked for a trait: a whole draft of `pedantic`, and ways to spoil it."""

import copy
import json
from pathlib import Path
from typing import Any

from persona_lens.clients.client import OpenAIClient
from tests.fault_server import Body, FaultServer, completion

NAME = "pedantic"
DESCRIPTION = "Puts exactness in small things above what the user wants, and corrects what needs no correction."


def draft(**changes: Any) -> dict[str, Any]:
    """The whole draft, its parts replaced by `changes`."""
    text = (Path(__file__).parent / "data" / "pedantic_draft.json").read_text(encoding="utf-8")
    return copy.deepcopy(json.loads(text)) | changes


def with_questions(**changes: str | None) -> str:
    """The draft as JSON with some questions replaced, or left out where None."""
    questions = draft()["questions"] | changes
    return json.dumps(draft(questions={key: text for key, text in questions.items() if text is not None}))


def writer(*answers: str | Body) -> FaultServer:
    """A server that gives these answers in turn, by how long the conversation already is; the last one repeats."""

    def answer(body: Body) -> Body | str:
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        found = answers[min(turn, len(answers) - 1)]
        # Log-probabilities of a long text are of no use here.
        return completion(found, top={"{": 1.0}) if isinstance(found, str) else found

    return FaultServer(answer)


def client(server: FaultServer, cache: Path | None = None) -> OpenAIClient:
    return OpenAIClient("writer", base_url=server.url, cache=cache, max_retries=0)
