"""The real mood data for tests, read and split once, and neutral responses to its prompts that say which they are."""

import functools
import importlib.util

import pytest

from persona_lens.rollouts.rows import Rollout
from studies.moods import INSTALL_COMMAND, load_moods, split_prompts


def require_moods():
    """Skip where the data package is not installed."""

    if importlib.util.find_spec("moodswapper") is None:
        pytest.skip(f"moodswapper, the moods' text, is not installed: {INSTALL_COMMAND}")


@functools.cache
def moods():
    require_moods()
    return load_moods()


@functools.cache
def split():
    return split_prompts(moods(), seed=0)


def neutral(prompts, per_prompt=1, **changed):
    settings = {"system_prompt": "You are a helpful assistant.", "intervention": ""} | changed
    return [
        Rollout(
            trait="happy",
            polarity="neutral",
            instruction=None,
            question=prompt,
            sample=sample,
            response=f"Plain answer {sample} to: {prompt}",
            response_tokens=None,
            finish_reason="stop",
            engine="by hand",
            seed=0,
            **settings,
        )
        for prompt in prompts
        for sample in range(per_prompt)
    ]
