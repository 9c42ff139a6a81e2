"""What a replication costs: seconds, GPU hours and dollars from the work and the rates, stage by stage.

seconds = generated / decoding + (read + prompts) / reading + trained / training, in tokens and tokens a second, and the
waiting for a judge on a server. Rates were measured, or are derived from the model's size and a stated assumption.
Knows nothing about models in memory: no torch is needed to estimate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from persona_lens.replication.brought import Brought, missing_for
from persona_lens.replication.preset import STAGES, Preset
from persona_lens.replication.tables import AssumedRates, Stage
from persona_lens.replication.units import Work, total
from persona_lens.replication.work import stage_work

SECONDS_A_CALL = 1.0
"""Until a judge's server has answered; an assumption."""


class Rates(NamedTuple):
    """Tokens a second, and where they come from."""

    decoding: float
    reading: float
    training: float
    how: str
    is_measured: bool


def rates_of(preset: Preset) -> Rates:
    """The preset's rates: measured, or derived from what it assumes."""
    cost = preset.cost
    if cost.measured is not None:
        return Rates(cost.measured.decoding, cost.measured.reading, cost.measured.training, cost.measured.how, True)
    assert cost.assumed is not None
    return _derived(cost.assumed)


def _derived(given: AssumedRates) -> Rates:
    """A forward pass takes 2 operations a parameter and token, one with LoRA's gradients 4."""
    speed = given.teraflops * 1e12 / given.parameters
    decoding = given.decoding_rows / (given.decoding_milliseconds / 1000)
    reading, training = speed * given.reading_utilisation / 2, speed * given.training_utilisation / 4
    how = f"assumed, not measured: {given.gpu}, {given.teraflops:g} TFLOP/s; {given.how}"
    return Rates(decoding, reading, training, how, False)


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

    stage: Stage
    work: Work
    seconds: float
    dollars: float
    left_out: str = ""


@dataclass(frozen=True)
class Plan:
    """Every stage that was asked for, with what it costs."""

    preset: Preset
    rates: Rates
    stages: tuple[StageCost, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(each.seconds for each in self.stages)

    @property
    def dollars(self) -> float:
        """Of all stages."""
        return sum(each.dollars for each in self.stages)

    @property
    def work(self) -> Work:
        """Of all stages."""
        return total(each.work for each in self.stages)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        stages = [{**asdict(each), "work": asdict(each.work)} for each in self.stages]
        return {
            "preset": self.preset.name,
            "rates": self.rates._asdict(),
            "seconds": self.seconds,
            "dollars": self.dollars,
            "stages": stages,
        }

    def rows(self) -> list[list[str]]:
        """A row for each stage and one for all: work, hours, dollars, or why it is left out."""
        shown = [*self.stages, StageCost(self.stages[-1].stage, self.work, self.seconds, self.dollars)]
        names = [*(each.stage for each in self.stages), "all"]
        return [
            [name, *(f"{value:,}" for value in _numbers(each.work)), hours(each.seconds), f"{each.dollars:,.2f}"]
            if not each.left_out
            else [name, *["-"] * len(HEADS[1:-2]), "left out", "-"]
            for name, each in zip(names, shown, strict=True)
        ]

    def notes(self) -> list[str]:
        """What the table's numbers mean, where rates and prices come from, and what is left out and why."""
        rates, cost = self.rates, self.preset.cost
        said = [
            "Tokens are at most so many; responses are taken to use "
            f"{cost.response_share:.0%} of their limit. Texts read are rows of forward passes.",
            f"Rates: {rates.decoding:,.0f} tokens a second decoding, {rates.reading:,.0f} reading, "
            f"{rates.training:,.0f} training; {rates.how}.",
        ]
        said += [f"Prices: {cost.prices}."] if cost.prices else []
        return said + [f"Left out, {each.stage}: {each.left_out}." for each in self.stages if each.left_out]


HEADS = ["stage", "responses", "tokens", "texts read", "rows trained", "judged", "judge calls", "time", "dollars"]


def _numbers(work: Work) -> Sequence[int]:
    return (work.rollouts, work.generated, work.forwards, work.trained, work.judged, work.calls)


def hours(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_replication(
    preset: Preset, there: Mapping[str, Brought], *, only: Sequence[Stage] = (), rates: Rates | None = None
) -> Plan:
    """What the stages do and cost, all of them or those of `only`, as if none of it had been done."""
    rates = rates_of(preset) if rates is None else rates
    stages: list[StageCost] = []
    for stage in STAGES:
        if only and stage not in only:
            continue
        if reason := missing_for(stage, there, preset):
            stages.append(StageCost(stage, Work(), 0.0, 0.0, reason))
            continue
        work = stage_work(preset, stage, there)
        seconds = seconds_of(work, preset, rates)
        dollars = seconds / 3600 * preset.cost.gpu_dollars_per_hour + work.calls * preset.cost.judge_dollars_per_call
        stages.append(StageCost(stage, work, seconds, dollars))
    return Plan(preset, rates, tuple(stages))


def seconds_of(work: Work, preset: Preset, rates: Rates) -> float:
    """How long the work takes; responses are as long as the preset's share of their limit."""
    share = preset.cost.response_share
    training = work.trained * preset.cost.training_row_tokens / rates.training
    reading = (work.read * share + work.prompt_tokens) / rates.reading
    waiting = work.calls * SECONDS_A_CALL / preset.judge.concurrency
    return work.generated * share / rates.decoding + reading + training + waiting
