"""Servers whose model has a known opinion of every text, said in whole numbers, in digits, or without probabilities."""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from tests.fault_server import Body, completion

PROBE = "57, 84, 92, 100"


def opinion(prompt: str) -> dict[str, float]:
    """What the model would answer to a judge's prompt: number or REFUSAL to probability, always the same for a text."""
    digest = hashlib.sha256(prompt.encode()).digest()
    numbers = {str(digest[place] % 101): 1.0 + digest[place + 1] for place in range(0, 12, 2)}
    if digest[20] < 26:  # every tenth text is refused
        numbers = {number: weight / 20 for number, weight in numbers.items()} | {"REFUSAL": 4000.0}
    numbers["I"] = 10.0
    total = math.fsum(numbers.values())
    return {text: weight / total for text, weight in numbers.items()}


def expected_score(prompt: str) -> float | None:
    """The score of the opinion, in the plainest way."""
    numbers = {int(text): p for text, p in opinion(prompt).items() if text.isdigit()}
    mass = math.fsum(numbers.values())
    return None if mass < 0.25 else math.fsum(number * p for number, p in numbers.items()) / mass


def asked(body: Body) -> str:
    """The judge's prompt in a request."""
    return next(message["content"] for message in body["messages"] if message["role"] == "user")


def begun(body: Body) -> str:
    """What the answer begins with already."""
    last = body["messages"][-1]
    return last["content"] if last["role"] == "assistant" else ""


def whole_numbers(body: Body) -> Body:
    """Every number is a token."""
    if PROBE in asked(body):
        return completion(PROBE, top=[{token: 1.0} for token in re.findall(r"\d+|, ", PROBE)])
    views = opinion(asked(body))
    return completion(max(views, key=lambda text: views[text]), top=views)


def digits(body: Body) -> Body:
    """Every digit is a token, and an answer that is begun is continued."""
    return _spell({PROBE: 1.0} if PROBE in asked(body) else opinion(asked(body)), begun(body), body)


def digits_from_the_start(body: Body) -> Body:
    """Every digit is a token, and an answer that is begun is begun anew."""
    return _spell({PROBE: 1.0} if PROBE in asked(body) else opinion(asked(body)), "", body)


def _spell(answers: Mapping[str, float], beginning: str, body: Body) -> Body:
    said, places = "", []
    for _ in range(body["max_tokens"]):
        following: dict[str, float] = {}
        for answer, probability in answers.items():
            if answer.startswith(beginning + said):
                rest = answer[len(beginning + said) :]
                token = rest[:1] if rest[:1].isdigit() or rest[:1] in ", " else rest
                following[token] = following.get(token, 0.0) + probability
        total = math.fsum(following.values())
        places.append({token: probability / total for token, probability in following.items()})
        likeliest = max(following, key=lambda token: following[token])
        said += likeliest
        if not likeliest:
            break
    return completion(said, top=places)


def without_logprobs(body: Body) -> Body:
    """Says its likeliest number in a sentence, and knows no log-probabilities."""
    views = opinion(asked(body))
    best = max(views, key=lambda text: views[text])
    answer: dict[str, Any] = completion(f"Score: {best}")
    answer["choices"] = [{**answer["choices"][0], "logprobs": None}]
    return answer


def only_reasons(body: Body) -> Body:
    """Reasons in a field of its own until the length limit, as vLLM serves Qwen3: no text comes."""
    answer: dict[str, Any] = completion("57, 84 ? Okay, the user", finish_reason="length")
    message = {"role": "assistant", "content": None, "reasoning_content": "57, 84 ? Okay, the user"}
    return {**answer, "choices": [{**answer["choices"][0], "message": message}]}


def reasons_unless_told_not_to(body: Body) -> Body:
    """Reasons, unless the request turns that off."""
    told = body.get("chat_template_kwargs", {}).get("enable_thinking", True)
    return only_reasons(body) if told else whole_numbers(body)
