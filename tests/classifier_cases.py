"""Labelled texts for the classifier's tests, and a classifier fitted on them."""

from functools import cache
from typing import Any

TOPICS = ["the garden", "my old car", "this recipe", "a long walk", "my job", "our café", "the exam", "a rainy day"]
CHEERFUL = ["I love {} so much, it is wonderful", "What a joy, {} will surely turn out great", "Great news about {}"]
GLOOMY = ["I am tired of {}, it never works", "What a pity, {} will surely fail again", "Nothing good comes of {}"]
POSITIVE = [form.format(topic) for form in CHEERFUL for topic in TOPICS]
NEGATIVE = [form.format(topic) for form in GLOOMY for topic in TOPICS[:5]]
GROUPS = TOPICS * 3 + TOPICS[:5] * 3
MIXED = [*POSITIVE[::5], *NEGATIVE[::4], "great great GREAT joy", "it never works, wonderful", "the garden is great."]


def fit(positive=POSITIVE, negative=NEGATIVE, **settings) -> Any:
    from persona_lens.judges.classifier import TextClassifier

    return TextClassifier.fit(positive, negative, **settings)


@cache
def fitted() -> Any:
    return fit(groups=GROUPS, labels=("cheerful", "gloomy"))
