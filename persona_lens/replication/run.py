"""`replicate`: the stages of a preset, one after the other, each of which resumes; and the report of them all.

The plan is made and checked first: the preset, the user's data, what is installed, and this machine's speed.
"""

import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, strftime
from typing import Any

from tqdm.auto import tqdm

from persona_lens.judges.scores import Judge
from persona_lens.models.loading import load_model
from persona_lens.models.structure import Model, identify
from persona_lens.replication.context import Context, refuse_other_settings
from persona_lens.replication.plan import Plan, hours, measure_rates, plan_replication
from persona_lens.replication.preset import Preset, load_preset
from persona_lens.replication.result import BENCHMARKS, FAILURES, PRESET, SETTINGS, Replication, stage_record
from persona_lens.replication.stages import Stage, all_stages
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.storage.files import JsonLines, refuse_other_json, write_json, write_whole
from persona_lens.storage.locks import writes_folder

TIMES = "times.jsonl"
_PACKAGES = ("persona-lens", "torch", "transformers", "transformer-lens", "peft")


def replicate(
    preset: Preset | str | Path,
    output_dir: str | Path,
    *,
    model: Model | None = None,
    judge: Judge | None = None,
    only: Sequence[str] = (),
    full: bool = False,
    data: str | Path | None = None,
    extra_stages: Sequence[Stage] = (),
    progress: bool = True,
) -> Replication:
    """Run the stages of a preset that `output_dir` does not hold yet, and return what the folder then holds.

    It always resumes. A piece that fails, such as a trait of which too few pairs are kept, is written down and tried
    again at the next call; what does not need it goes on. With `report.json` the numbers are kept beside the paper's;
    `write_replication_report` makes the page.

    Args:
        preset: A preset, a shipped one's name, or the path of a preset's file.
        output_dir: Folder of the run.
        model: The model, where it is loaded already; by default the preset's is loaded.
        judge: Who scores, instead of the preset's judge.
        only: Only these stages; what they need of earlier ones must be there.
        full: Take the traits and moods of the preset's table `full`.
        data: Folder from which the preset's paths of the user's data start; by default the working folder.
        extra_stages: Further stages; one of a shipped stage's name takes its place.
        progress: Whether to print the plan and show bars.

    Raises:
        ValueError: The preset or the user's data are wrong, the model is another than the preset's, or `output_dir`
            holds a replication with other settings.
        FileNotFoundError: There is no such preset, or a part of the user's data is missing.
        ImportError: What a stage needs is not installed; raised before anything is spent.
        OSError: `output_dir` cannot be written.
    """
    preset = preset if isinstance(preset, Preset) else load_preset(preset)
    plan = plan_replication(preset.in_full() if full else preset, data, only=only, extra=extra_stages)
    return run_plan(plan, output_dir, model=model, judge=judge, progress=progress)


def run_plan(
    plan: Plan,
    output_dir: str | Path,
    *,
    model: Model | None = None,
    judge: Judge | None = None,
    progress: bool = True,
) -> Replication:
    """Run what `plan_replication` planned; otherwise like `replicate`."""
    folder = Path(output_dir)
    with writes_folder(folder):
        refuse_other_json(folder / PRESET, ("preset", "left_out"))
        return _run(plan, folder, model, judge, progress)


def _run(plan: Plan, folder: Path, model: Model | None, judge: Judge | None, progress: bool) -> Replication:
    preset = plan.preset
    require_installed(plan, judge)
    if model is None:
        import torch

        model = load_model(preset.model.name, dtype=getattr(torch, preset.model.dtype))
    layers = int(model.cfg.n_layers)
    if layers != preset.model.n_layers:
        raise ValueError(
            f"preset {preset.name}, key model.n_layers: expected the {layers} layers of "
            f"{identify(model).name}, got {preset.model.n_layers}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(folder / SETTINGS, preset.settings(), identify(model))
    if progress:
        _print_estimate(plan, model)
    kept = {"preset": preset.model_dump(mode="json", by_alias=True, exclude_none=True), "left_out": plan.left_out}
    write_json(folder / PRESET, kept)
    if (scores := plan.user_data.get("benchmarks")) is not None and scores.is_there:
        write_whole(folder / BENCHMARKS, scores.path.read_bytes())
    run = Context(model, preset, folder, plan.user_data, progress, judge)
    failures: dict[str, str] = {}
    stages = all_stages(plan.extra)
    for cost in plan.stages:
        if not cost.left_out:
            failures |= _run_stage(run, stages[cost.stage])
    write_json(folder / FAILURES, failures)
    replication = Replication.load(folder, extra_stages=plan.extra)
    replication.save()
    if progress:
        tqdm.write(f"{replication}.", file=sys.stderr)
    return replication


def require_installed(plan: Plan, judge: Judge | None = None) -> None:
    """Raise ImportError where a stage of the plan needs a package that is not there."""
    stages = all_stages(plan.extra)
    needed: dict[str, str] = {}
    if plan.preset.judge.kind == "openai" and judge is None:
        needed["openai"] = 'pip install "persona-lens[servers]"'
    for cost in plan.stages:
        if not cost.left_out:
            needed |= stages[cost.stage].packages or {}
    for package, command in needed.items():
        if find_spec(package) is None:
            raise ImportError(f"preset {plan.preset.name} needs {package}, which is not installed. Run: {command}")


def _print_estimate(plan: Plan, model: Model) -> None:
    here = plan.at(measure_rates(model, plan.rates))
    tqdm.write(
        f"{plan.preset.name}: planned {hours(plan.seconds)} by the preset's rates, {hours(here.seconds)} by this "
        f"machine's (decoding {here.rates.decoding:.0f}, reading {here.rates.reading:.0f} tokens a second); "
        f"{plan.dollars:,.2f} dollars. What is done already is not done again.",
        file=sys.stderr,
    )


def _run_stage(run: Context, stage: Stage) -> dict[str, str]:
    """Run what is missing of a stage; what failed, in words, by piece."""
    failures: dict[str, str] = {}
    for name, do in stage.pieces(run).items():
        start = perf_counter()
        try:
            do()
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            failures[f"{stage.name}, {name}"] = str(error)
            if run.progress:
                tqdm.write(f"{stage.name}, {name} failed: {error}", file=sys.stderr)
        took = {"stage": stage.name, "piece": name, "seconds": round(perf_counter() - start, 1)}
        times = JsonLines(run.folder / TIMES)
        times.mend(list(took))
        times.append([{**took, "ended": strftime("%Y-%m-%dT%H:%M:%S")}])
    if not failures:
        write_json(stage_record(run.folder, stage.name), _record(run, stage.name))
    return failures


def _record(run: Context, stage: str) -> dict[str, Any]:
    """What a finished stage was made with."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # run from a checkout that is not installed
            versions[package] = version(package)
    identity = identify(run.model)
    return {
        "format_version": 1,
        "stage": stage,
        "model": {"name": identity.name, "class": identity.model_class, "weights_hash": identity.weights_hash},
        "engine": ModelEngine(run.model, run.preset.extraction.max_new_tokens).name,
        "judges": {name: _judge_name(run, name) for name in run.preset.traits},
        "seed": run.preset.seed,
        "versions": versions,
        "settings": run.preset.settings(),
    }


def _judge_name(run: Context, name: str) -> str | None:
    """The judge's name, where it is calibrated for the trait already; asking for it must not begin anything."""
    trait = run.preset.trait(name)
    if run.judge is None and run.preset.judge.kind == "likelihood":
        is_calibrated = (run.trait_folder(name) / "calibration.json").exists()
        return run.judge_of(trait).name(trait) if is_calibrated else None
    return run.unfitted_judge.name(trait)
