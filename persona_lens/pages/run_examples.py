"""The kept responses that a page shows, each token coloured by its projection.

At the layer that the sweep recommends, or else at the one with the best held-out AUC.
Knows nothing about how projections are measured.
"""

from collections.abc import Mapping
from itertools import chain

from persona_lens.extraction.pipeline import best_layer
from persona_lens.pages.run_findings import choice_of
from persona_lens.pages.run_folder import Run
from persona_lens.pages.tokens import colour_scale, coloured_tokens
from persona_lens.plots.style import number

LONGEST = 400
"""Tokens of a response that are shown."""


def coloured_texts(run: Run, min_coherence: float) -> tuple[Mapping[str, str], str]:
    """The responses as HTML by their rollouts' keys, and a sentence on their colours; nothing where none were read."""
    layer = _layer(run, min_coherence)
    measured = [] if run.examples is None else [each.layer for each in run.examples.vectors]
    if run.examples is None or layer not in measured:
        return {}, ""
    vector = measured.index(layer)
    read = {
        chat.name: (each.pieces[each.n_prompt :], each.values[each.n_prompt :, vector].tolist())
        for chat in run.examples.chats
        for each in (turn.tokens for turn in chat.turns)
        if each is not None
    }
    values = list(chain.from_iterable(values for _, values in read.values()))
    if not values:
        return {}, ""
    neutral, reach = colour_scale(values)
    texts = {}
    for name, (pieces, projections) in read.items():
        shown = coloured_tokens(
            pieces[:LONGEST], projections[:LONGEST], name=f"layer {layer}", neutral=neutral, reach=reach
        )
        left = len(pieces) - LONGEST
        texts[name] = shown + (f" <span class=cut>… {left:,} more tokens</span>" if left > 0 else "")
    said = (
        f"The kept ones' tokens are coloured by their projection on the direction of layer {layer}: vermilion above "
        f"{number(neutral)}, the median of what is shown, blue below. Hovering shows the number."
    )
    return texts, said


def _layer(run: Run, min_coherence: float) -> int | None:
    choice = None if run.sweep is None else choice_of(run.sweep, min_coherence)
    if choice is not None:
        return choice.layer
    return None if run.vectors is None else best_layer(run.vectors)
