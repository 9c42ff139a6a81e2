"""What a replication costs: its stages run against a counting engine and judge, and their work divided by rates.

seconds = generated / decoding + (read + prompts) / reading + trained / training, in tokens and tokens a second, and the
waiting for a judge on a server. Rates were measured, or are derived from the model's size and a stated assumption.
No torch is loaded to plan.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.replication.counting import Counting, Work
from persona_lens.replication.preset import Preset
from persona_lens.replication.stages import Stage, all_stages
from persona_lens.replication.user_data import UserData, find_user_data

if TYPE_CHECKING:
    from persona_lens.models.structure import Model

SECONDS_A_CALL = 1.0
"""Until a judge's server has answered; an assumption."""
HEADS = ["stage", "responses", "tokens", "texts read", "rows trained", "judged", "judge calls", "time", "dollars"]
READ_ROWS, READ_TOKENS = 16, 48
SAMPLED_ROWS, SAMPLED_TOKENS = 100, 6


class Rates(NamedTuple):
    """Tokens a second, and where they come from."""

    decoding: float
    reading: float
    training: float
    how: str
    is_measured: bool


def rates_of(preset: Preset) -> Rates:
    """The preset's rates: measured, or derived from what it assumes.

    A forward pass takes 2 operations a parameter and token, one with LoRA's gradients 4.
    """
    measured, assumed = preset.cost.measured, preset.cost.assumed
    if measured is not None:
        return Rates(measured.decoding, measured.reading, measured.training, measured.how, True)
    assert assumed is not None, "a preset has one kind of rates"
    speed = assumed.teraflops * 1e12 / assumed.parameters
    decoding = assumed.decoding_rows / (assumed.decoding_milliseconds / 1000)
    reading, training = speed * assumed.reading_utilisation / 2, speed * assumed.training_utilisation / 4
    how = f"assumed, not measured: {assumed.gpu}, {assumed.teraflops:g} TFLOP/s; {assumed.how}"
    return Rates(decoding, reading, training, how, False)


def measure_rates(model: "Model", expected: Rates) -> Rates:
    """Decoding and reading as they run here; training scaled from `expected` as reading is.

    100 rows of one prompt are sampled for a few tokens, and texts of equal length are read, after one of each to warm
    up. Limits: it takes a few seconds, and whatever else the machine does counts.
    """
    from persona_lens.chat.batches import ChatTokens
    from persona_lens.generation.decoding import generate
    from persona_lens.judges.likelihood_ratio import mean_log_likelihoods

    vocabulary = int(model.cfg.d_vocab)
    texts = [
        ChatTokens(tuple((7 * row + place) % vocabulary for place in range(8)), tuple(range(1, READ_TOKENS + 1)))
        for row in range(READ_ROWS)
    ]
    mean_log_likelihoods(model, texts[:1])
    start = perf_counter()
    mean_log_likelihoods(model, texts)
    reading = READ_ROWS * (READ_TOKENS + 8) / max(perf_counter() - start, 1e-9)
    prompt = tuple(place % vocabulary for place in range(1, 9))
    keys = [f"rate {row}" for row in range(SAMPLED_ROWS)]
    start = perf_counter()
    replies = generate(
        model, [prompt] * SAMPLED_ROWS, max_new_tokens=SAMPLED_TOKENS, keys=keys, batch_size=SAMPLED_ROWS
    )
    # A row that ended early was not run on: its tokens do not count.
    decoding = sum(max(1, len(reply.tokens)) for reply in replies) / max(perf_counter() - start, 1e-9)
    training = expected.training * reading / expected.reading
    return Rates(decoding, reading, training, "decoding and reading measured at the start; training scaled", True)


@dataclass(frozen=True)
class StageCost:
    """A stage with its work, or why it is left out.

    Attributes:
        stage: Its name.
        work: What it does; nothing where it is left out.
        seconds: What that takes.
        dollars: What that costs.
        left_out: Why it does not run; empty where it does.
    """

    stage: str
    work: Work
    seconds: float
    dollars: float
    left_out: str = ""


@dataclass(frozen=True)
class Plan:
    """Every stage that was asked for, with what it costs.

    Attributes:
        preset: Every setting.
        user_data: What the user brought.
        rates: Tokens a second.
        stages: The stages that were asked for.
        extra: Further stages, which are not the package's.
        left_out: Why stages cannot run, also those that were not asked for.
    """

    preset: Preset
    user_data: dict[str, UserData]
    rates: Rates
    stages: tuple[StageCost, ...]
    extra: tuple[Stage, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(cost.seconds for cost in self.stages)

    @property
    def dollars(self) -> float:
        """Of all stages."""
        return sum(cost.dollars for cost in self.stages)

    @property
    def work(self) -> Work:
        """Of all stages."""
        return reduce(Work.__add__, (cost.work for cost in self.stages), Work())

    def at(self, rates: Rates) -> "Plan":
        """The same work at other rates."""
        costs = [_cost(cost.stage, cost.work, self.preset, rates, cost.left_out) for cost in self.stages]
        return replace(self, rates=rates, stages=tuple(costs))

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        numbers = {"rates": self.rates._asdict(), "seconds": self.seconds, "dollars": self.dollars}
        return {"preset": self.preset.name, **numbers, "stages": [asdict(cost) for cost in self.stages]}

    def rows(self) -> list[list[str]]:
        """A row under `HEADS` for each stage, and one for all: work, time and dollars, or that it is left out."""
        rows = []
        for cost in (*self.stages, StageCost("all", self.work, self.seconds, self.dollars)):
            work = cost.work
            counts = (work.rollouts, work.generated, work.forwards, work.trained, work.judged, work.calls)
            told = [*(f"{count:,}" for count in counts), hours(cost.seconds), f"{cost.dollars:,.2f}"]
            rows.append([cost.stage, *(["-"] * len(counts) + ["left out", "-"] if cost.left_out else told)])
        return rows

    def notes(self) -> list[str]:
        """What the table's numbers mean, where rates and prices come from, and what is left out and why."""
        rates, cost = self.rates, self.preset.cost
        notes = [
            "Tokens are at most so many; responses are taken to use "
            f"{cost.response_share:.0%} of their limit. Texts read are rows of forward passes.",
            f"Rates: {rates.decoding:,.0f} tokens a second decoding, {rates.reading:,.0f} reading, "
            f"{rates.training:,.0f} training; {rates.how}.",
        ]
        notes += [f"Prices: {cost.prices}."] if cost.prices else []
        return notes + [f"Left out, {stage.stage}: {stage.left_out}." for stage in self.stages if stage.left_out]


def plan_replication(
    preset: Preset, data: str | Path | None = None, *, only: Sequence[str] = (), extra: Sequence[Stage] = ()
) -> Plan:
    """What the stages do and cost, all of them or those of `only`, as if none of it had been done.

    Raises ValueError for a stage that does not exist, and what `find_user_data` raises.
    """
    stages = all_stages(extra)
    if unknown := [name for name in only if name not in stages]:
        raise ValueError(f"Expected stages among {', '.join(stages)}, got {unknown[0]!r}: name one of these.")
    user_data, rates = find_user_data(preset, data), rates_of(preset)
    counting, costs, left_out = Counting(preset, user_data), [], {}
    for name, stage in stages.items():
        before = counting.engine.work
        if reason := stage.left_out(preset, user_data):
            left_out[name] = reason
        else:
            _count(stage, counting)
        if not only or name in only:
            costs.append(_cost(name, counting.engine.work - before, preset, rates, reason))
    return Plan(preset, user_data, rates, tuple(costs), tuple(extra), left_out)


def _count(stage: Stage, counting: Counting) -> None:
    if stage.count is not None:
        stage.count(counting)
        return
    for piece in stage.pieces(counting).values():
        with suppress(ValueError):  # the stage itself will say it, and the others go on
            piece()


def _cost(name: str, work: Work, preset: Preset, rates: Rates, left_out: str) -> StageCost:
    seconds = seconds_of(work, preset, rates)
    dollars = seconds / 3600 * preset.cost.gpu_dollars_per_hour + work.calls * preset.cost.judge_dollars_per_call
    return StageCost(name, work, seconds, dollars, left_out)


def seconds_of(work: Work, preset: Preset, rates: Rates) -> float:
    """How long the work takes; responses are as long as the preset's share of their limit."""
    share = preset.cost.response_share
    training = work.trained * preset.cost.training_row_tokens / rates.training
    reading = (work.read * share + work.prompt_tokens) / rates.reading
    waiting = work.calls * SECONDS_A_CALL / preset.judge.concurrency
    return work.generated * share / rates.decoding + reading + training + waiting


def hours(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
