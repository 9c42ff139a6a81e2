"""How the CPU time of extraction grows with each thing that a user can ask more of.

Time is taken at several sizes of one axis while the others stay, and fitted by the power law time = c * size^exponent:
1 is linear. Rows are eight rollouts a prompt, so that more of them also have more prompts.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.contestants import with_stream_means
from benchmarks.extraction import _double, bridge
from benchmarks.measures import Measure, Measures
from benchmarks.oracle import minimum_cosine, oracle_means
from benchmarks.texts import Workload, many_rollouts
from benchmarks.timing import Result, inspect, race
from persona_lens.models.loading import bridge_from_transformers
from persona_lens.models.structure import Model

GROWTH = "Growth with "
SIZES = (16, 32, 64, 128)
LAYERS = (8, 15, 30)
WIDTHS = (288, 576, 1152)
"""Of the residual stream, of models of eight layers."""
TRAITS = (1, 7)
A_PROMPT, PROMPT_TOKENS = 8, 32
CHECKED_ROWS = 4
"""Rows that are compared with the oracle, which takes twice the time of what it checks."""


class Point(NamedTuple):
    """A size of an axis, what is run there, and the means that its first rows should have."""

    size: int
    model: Model
    workload: Workload
    expected: Float[Tensor, "row layer d_model"]


@dataclass(frozen=True)
class Axis:
    """What was measured along one axis."""

    name: str
    sizes: Sequence[int]
    results: Sequence[Result]
    tokens: Sequence[int]

    @property
    def exponents(self) -> list[float]:
        """The slope of log time over log size, of each round."""
        rounds = zip(*(result.cpu for result in self.results), strict=True)
        return [float(np.polyfit(np.log(self.sizes), np.log(seconds), 1)[0]) for seconds in rounds]


def growth(repeats: int) -> list[Measures]:
    """Exponents of rollouts, response length, layers, width and traits, and the seconds that they are fitted to."""
    return [_as_measures(_measure(name, points, repeats)) for name, points in _axes()]


def plot_growth(measures: Sequence[Mapping[str, Any]]) -> Any:
    """Of a results file's measures: a plotly figure of time over size, both relative to the smallest, logarithmic."""
    from persona_lens.plots.style import DASHED, graph_objects, styled_figure

    figure = styled_figure("CPU time of extraction by size", ["relative to each axis's smallest; dashed: linear"])
    go = graph_objects()
    largest = 1.0
    for found in measures:
        if not found["name"].startswith(GROWTH):
            continue
        exponent, *points = found["measures"]
        sizes = np.array([point["size"] for point in points]) / points[0]["size"]
        seconds = np.array([point["median"] for point in points]) / points[0]["median"]
        largest = max(largest, float(sizes[-1]))
        name = f"{found['name'].removeprefix(GROWTH)}, exponent {exponent['median']:.2f}"
        figure.add_trace(go.Scatter(x=sizes.tolist(), y=seconds.tolist(), name=name, mode="lines+markers"))
    figure.add_trace(go.Scatter(x=[1, largest], y=[1, largest], mode="lines", line=DASHED, showlegend=False))
    doublings = {"type": "log", "tickvals": [1, 2, 4, 8, 16]}
    figure.update_xaxes(**doublings, title="size / smallest size")
    figure.update_yaxes(**doublings, title="CPU time / time of the smallest size")
    return figure


def _measure(name: str, points: Sequence[Point], repeats: int) -> Axis:
    contestants = [with_stream_means(point.model, point.workload) for point in points]
    inspected = [
        (contestant, inspect(contestant, _cosine(point))) for contestant, point in zip(contestants, points, strict=True)
    ]
    race(inspected, repeats)
    results = [result for _, result in inspected]
    return Axis(name, [point.size for point in points], results, [point.workload.n_tokens for point in points])


def _cosine(point: Point) -> Callable[[Tensor], float]:
    return lambda means: minimum_cosine(means[:CHECKED_ROWS], point.expected, point.workload.positive[:CHECKED_ROWS])


def _as_measures(axis: Axis) -> Measures:
    measures = [Measure("exponent", axis.exponents, "")]
    for size, result, tokens in zip(axis.sizes, axis.results, axis.tokens, strict=True):
        name = f"{axis.name} {size}, {tokens} tokens, {result.forwards} forwards"
        measures.append(Measure(name, result.cpu, "CPU s", agreement=result.agreement, size=size))
    return Measures(f"{GROWTH}{axis.name}", f"{axis.sizes[0]} to {axis.sizes[-1]}", measures)


def _axes() -> Iterator[tuple[str, list[Point]]]:
    """The axes with their points; the random weights of one axis are let go before the next."""
    tokenizer = bridge().tokenizer

    def rows(n_rows: int, length: int) -> Workload:
        return many_rollouts(
            tokenizer, n_rows, per_prompt=A_PROMPT, n_prompt_tokens=PROMPT_TOKENS, n_response_tokens=length
        )

    yield "rollouts", [_embedded(size, rows(size, 16)) for size in SIZES]
    yield "response tokens", [_embedded(size, rows(16, size)) for size in SIZES]
    # A trait has rollouts of its own.
    yield "traits", [_embedded(size, rows(16 * size, 16)) for size in TRAITS]
    yield "layers", [_random(size, rows(32, 16), n_layers=size, width=576) for size in LAYERS]
    yield "width", [_random(size, rows(32, 16), n_layers=8, width=size) for size in WIDTHS]


def _embedded(size: int, workload: Workload) -> Point:
    return Point(size, bridge(), workload, _oracle(_double(), workload))


def _random(size: int, workload: Workload, *, n_layers: int, width: int) -> Point:
    """A Llama of random weights in the embedded model's proportions."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(_double().config)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = n_layers, width, width * 8 // 3
    config.head_dim = width // config.num_attention_heads
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    expected = _oracle(copy.deepcopy(made).double(), workload)  # first: a bridge changes the model that it wraps
    return Point(size, bridge_from_transformers(made, bridge().tokenizer), workload, expected)


def _oracle(model: Any, workload: Workload) -> Float[Tensor, "row layer d_model"]:
    return torch.stack([oracle_means(model, row) for row in workload.rows[:CHECKED_ROWS]])
