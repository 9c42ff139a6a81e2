"""`replicate`: the stages of a preset, one after the other, each of which resumes; and the report of them all.

The plan is made and checked first: the preset, what the user brought, what is installed, and rates of this machine.
Knows nothing of its own: each stage is a function of the library.
"""

import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, strftime
from typing import Any

from tqdm.auto import tqdm

from persona_lens.judges.scores import Judge
from persona_lens.models.loading import load_model
from persona_lens.models.structure import Model, identify
from persona_lens.replication import brought_stages, grid_stages, mood_stages, trait_stages
from persona_lens.replication.brought import Brought, brought
from persona_lens.replication.context import Context, refuse_other_settings
from persona_lens.replication.cost import Plan, hours, plan_replication
from persona_lens.replication.preset import STAGES, Preset, load_preset
from persona_lens.replication.rates import measure_rates
from persona_lens.replication.result import (
    BENCHMARKS,
    FAILURES,
    PRESET,
    SETTINGS,
    Replication,
    read_replication,
    stage_record,
)
from persona_lens.replication.tables import Stage
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.storage.files import JsonLines, refuse_other_json, write_json, write_whole
from persona_lens.storage.locks import writes_output

TIMES = "times.jsonl"
_PACKAGES = ("persona-lens", "torch", "transformers", "transformer-lens", "peft")
Pieces = dict[str, Callable[[], None]]


@writes_output
def replicate(
    preset: Preset | str | Path,
    output: str | Path,
    *,
    model: Model | None = None,
    judge: Judge | None = None,
    only: Sequence[Stage] = (),
    full: bool = False,
    data: str | Path | None = None,
    progress: bool = True,
) -> Replication:
    """Run the stages of a preset that `output` does not hold yet, and give what the folder then holds.

    It always resumes. A piece that fails, such as a trait of which too few pairs are kept, is written down and tried
    again at the next call; what does not need it goes on. With `report.json` the numbers are kept beside the paper's;
    `write_replication_report` makes the page.

    Args:
        preset: A preset, a shipped one's name, or the path of a preset's file.
        output: Folder of the run.
        model: The model, where it is loaded already; by default the preset's is loaded.
        judge: Who scores, instead of the preset's judge.
        only: Only these stages; what they need of earlier ones must be there.
        full: Take the traits and moods of the preset's table `full`.
        data: Folder from which the preset's paths of the user's data start; by default the working folder.
        progress: Whether to print the plan and show bars.

    Raises:
        ValueError: The preset or the user's data are wrong, the model is another than the preset's, or `output` holds a
            replication with other settings.
        FileNotFoundError: There is no such preset, or a part of the user's data is missing.
        ImportError: What a stage needs is not installed; told before anything is spent.
        OSError: `output` cannot be written.
    """
    chosen = preset if isinstance(preset, Preset) else load_preset(preset)
    chosen = chosen.in_full() if full else chosen
    folder = Path(output)
    refuse_other_json(folder / PRESET, ("preset", "left_out"))
    refuse_unknown(only)
    there = brought(chosen, data)
    plan = plan_replication(chosen, there, only=only)
    require_installed(chosen, plan, judge)
    loaded = _load(chosen) if model is None else model
    _refuse_other_model(chosen, loaded)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(folder / SETTINGS, chosen.settings(), identify(loaded))
    if progress:
        _say_estimate(chosen, there, plan, loaded, only)
    _keep_preset(folder, chosen, there)
    run = Context(loaded, chosen, folder, there, progress, judge)
    failures: dict[str, str] = {}
    for each in plan.stages:
        if not each.left_out:
            failures |= _run_stage(run, each.stage)
    write_json(folder / FAILURES, failures)
    found = read_replication(folder)
    found.save()
    if progress:
        tqdm.write(f"{found}.", file=sys.stderr)
    return found


def refuse_unknown(only: Sequence[str]) -> None:
    """Raise ValueError for a stage that there is not."""
    if unknown := [name for name in only if name not in STAGES]:
        raise ValueError(f"There is no stage {unknown[0]!r}: expected one of {', '.join(STAGES)}.")


def require_installed(preset: Preset, plan: Plan, judge: Judge | None = None) -> None:
    """Raise ImportError where a stage of the plan needs a package that is not there."""
    stages = {each.stage for each in plan.stages if not each.left_out}
    needed: dict[str, str] = {}
    if preset.judge.kind == "openai" and judge is None:
        needed["openai"] = 'pip install "persona-lens[servers]"'
    if stages & {"finetuning", "mitigation", "new-facts", "real-chats"}:
        needed["peft"] = 'pip install "persona-lens[finetune]"'
    if stages & {"finetuning", "mitigation"}:
        needed["lm_eval"] = "pip install --no-deps lm-eval==0.4.13"
    if preset.finetuning.source == "moods" and stages & {"finetuning", "projection-difference", "mitigation"}:
        needed["moodswapper"] = "pip install --no-deps moodswapper==26.9.21"
    for package, command in needed.items():
        if find_spec(package) is None:
            raise ImportError(f"preset {preset.name} needs {package}, which is not installed. Run: {command}")


def _load(preset: Preset) -> Model:
    import torch

    return load_model(preset.model.name, dtype=getattr(torch, preset.model.dtype))


def _refuse_other_model(preset: Preset, model: Model) -> None:
    layers = int(model.cfg.n_layers)
    if layers != preset.model.n_layers:
        raise ValueError(
            f"preset {preset.name}, key model.n_layers: expected the {layers} layers of "
            f"{identify(model).name}, got {preset.model.n_layers}."
        )


def _say_estimate(preset: Preset, there: dict[str, Brought], plan: Plan, model: Model, only: Sequence[Stage]) -> None:
    here = plan_replication(preset, there, only=only, rates=measure_rates(model, plan.rates))
    tqdm.write(
        f"{preset.name}: planned {hours(plan.seconds)} by the preset's rates, {hours(here.seconds)} by this machine's "
        f"(decoding {here.rates.decoding:.0f}, reading {here.rates.reading:.0f} tokens a second); "
        f"{plan.dollars:,.2f} dollars. What is done already is not done again.",
        file=sys.stderr,
    )


def _keep_preset(folder: Path, preset: Preset, there: dict[str, Brought]) -> None:
    """The preset as it was, what is left out of the whole of it, and the benchmarks' scores."""
    left_out = {each.stage: each.left_out for each in plan_replication(preset, there).stages if each.left_out}
    kept = {"preset": preset.model_dump(mode="json", by_alias=True, exclude_none=True), "left_out": left_out}
    write_json(folder / PRESET, kept)
    if (item := there.get("benchmarks")) is not None and item.is_there:
        write_whole(folder / BENCHMARKS, item.path.read_bytes())


def stage_pieces(run: Context, stage: Stage) -> Pieces:
    """The parts of a stage, each of which may fail alone."""
    by_trait: dict[Stage, list[tuple[str, Callable[[Context, str], None]]]] = {
        "extraction": [("", trait_stages.extract)],
        "layers": [("", trait_stages.sweep_layers)],
        "dose-response": [("", trait_stages.measure_doses)],
        "monitoring": [
            (" system prompts", trait_stages.monitor_system_prompts),
            (" many-shot", trait_stages.monitor_many_shot),
        ],
    }
    if stage in by_trait:
        return {f"{name}{what}": partial(do, run, name) for name in run.preset.traits for what, do in by_trait[stage]}
    is_moods = run.preset.finetuning.source == "moods"
    whole: dict[Stage, Callable[[Context], None]] = {
        "finetuning": mood_stages.finetune_moods if is_moods else grid_stages.finetune_sets,
        "projection-difference": mood_stages.screen_moods if is_moods else grid_stages.screen_sets,
        "mitigation": mood_stages.mitigate_moods if is_moods else grid_stages.mitigate_sets,
        "new-facts": brought_stages.learn_facts,
        "real-chats": brought_stages.train_on_chats,
    }
    # Cosines and benchmarks are read off what is there.
    return {"all": partial(whole[stage], run)} if stage in whole else {}


def _run_stage(run: Context, stage: Stage) -> dict[str, str]:
    """Run what is missing of a stage; gives what failed, in words."""
    failures: dict[str, str] = {}
    for name, do in stage_pieces(run, stage).items():
        start = perf_counter()
        try:
            do()
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            failures[f"{stage}, {name}"] = str(error)
            if run.progress:
                tqdm.write(f"{stage}, {name} failed: {error}", file=sys.stderr)
        took = {"stage": stage, "piece": name, "seconds": round(perf_counter() - start, 1)}
        times = JsonLines(run.folder / TIMES)
        times.mend(list(took))
        times.append([{**took, "ended": strftime("%Y-%m-%dT%H:%M:%S")}])
    if not failures:
        write_json(stage_record(run.folder, stage), _record(run, stage))
    return failures


def _record(run: Context, stage: Stage) -> dict[str, Any]:
    """What a finished stage was made with."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # run from a checkout that is not installed
            versions[package] = version(package)
    judges = {name: _judge_name(run, name) for name in run.preset.traits}
    identity = identify(run.model)
    return {
        "format_version": 1,
        "stage": stage,
        "model": {"name": identity.name, "class": identity.model_class, "weights_hash": identity.weights_hash},
        "engine": ModelEngine(run.model, run.preset.extraction.max_new_tokens).name,
        "judges": judges,
        "seed": run.preset.seed,
        "versions": versions,
        "settings": run.preset.settings(),
    }


def _judge_name(run: Context, name: str) -> str | None:
    """The judge's name, where it is calibrated for the trait already; asking for it must not begin anything."""
    if run.judge is None and run.preset.judge.kind == "likelihood":
        if not (run.trait_folder(name) / "calibration.json").exists():
            return None
        return run.judge_of(run.trait(name)).name(run.trait(name))
    return run.unfitted_judge.name(run.trait(name))
