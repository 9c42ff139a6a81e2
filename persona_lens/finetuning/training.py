"""A planned finetuning run: resumed where it stopped, trained with what acts in training, and left without a trace."""

import hashlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from persona_lens.activations.means import Projections, projected_residuals
from persona_lens.chat.templates import date_told
from persona_lens.finetuning.dataset import TrainingRows
from persona_lens.finetuning.result import RECORD_FILE, Finetuning
from persona_lens.finetuning.trainer import (
    ProjectionPenalty,
    Trainer,
    Watch,
    checked_checkpoint,
    collate_rows,
    last_checkpoint,
)
from persona_lens.interventions.hooks import Attachment, intervene
from persona_lens.interventions.values import Intervention
from persona_lens.models.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, lora, read_weights
from persona_lens.models.scopes import global_randomness_kept
from persona_lens.models.structure import Model, cpu_threads, identify, model_device, refuse_other_threads
from persona_lens.storage.files import DAMAGE, ensure_writable, read_json, write_json
from persona_lens.storage.locks import writes_folder

SETTINGS_FILE, CHECKPOINTS = "settings.json", "checkpoints"


class Plan(NamedTuple):
    """What a run trains on and how; `adapter` and `training` are settings in PEFT's and the Trainer's own words."""

    rows: TrainingRows
    evaluation: TrainingRows | None
    during: tuple[Intervention, ...]
    penalty: ProjectionPenalty | None
    adapter: dict[str, Any]
    training: dict[str, Any]
    checkpoint_every: int | None
    allow_other_model: bool
    progress: bool

    def settings(self, model: Model) -> dict[str, Any]:
        """Everything that decides the result, as JSON."""
        found = identify(model)
        penalty = self.penalty
        return {
            "model": {"name": found.name, "weights_hash": found.weights_hash},
            "during": [str(each) for each in self.during],
            "fingerprints": [each.fingerprint for each in self.during],
            "penalty": None if penalty is None else [str(penalty), *(vector.fingerprint for vector in penalty.each)],
            "adapter": self.adapter,
            "training": self.training,
            "rows": _digest(self.rows),
            "evaluation": None if self.evaluation is None else _digest(self.evaluation),
            "threads": cpu_threads(model),
            **({"template_date": day} if (day := date_told(model.tokenizer)) else {}),
        }


def _digest(rows: TrainingRows) -> str:
    return hashlib.sha256(repr(rows.rows).encode()).hexdigest()[:16]


def run_plan(model: Model, plan: Plan, output: Path | None) -> Finetuning:
    """Train as planned, or go on, or read what is finished; see `finetune`."""
    settings = plan.settings(model)
    if output is None:
        with tempfile.TemporaryDirectory() as scratch:
            return _train(model, plan, settings, Path(scratch), record=None)
    if (output / RECORD_FILE).exists():
        # Nobody changes a finished run, and it may lie where nothing can be written: reading it takes no lock.
        done = _finished_run(output, settings)
        # What a run that was killed at its very end had no time to take away.
        if (output / CHECKPOINTS).exists():
            with suppress(OSError), writes_folder(output):
                shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        return done
    ensure_writable(output / RECORD_FILE)
    with writes_folder(output):
        # Whoever held the folder until now may have begun or finished a run in it.
        if (output / RECORD_FILE).exists():
            return _finished_run(output, settings)
        _refuse_another_run(output, settings)
        done = _train(model, plan, settings, output / CHECKPOINTS, record=output / SETTINGS_FILE)
        done.save(output)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return done


def recorded_date(output: Path) -> str:
    """The day that the chat template was told in a folder's finetuning; empty where it records none."""
    with suppress(OSError, *DAMAGE):  # a damaged file is refused, in a sentence, before anything goes on
        return datetime.fromisoformat(read_json(output / SETTINGS_FILE)["template_date"]).date().isoformat()
    return ""


def _finished_run(output: Path, settings: dict[str, Any]) -> Finetuning:
    """The finished run of a folder, where it was made with these settings, which its record repeats."""
    done = Finetuning.load(output)
    path = output / SETTINGS_FILE
    for kept in (done.settings, *([_read_settings(path)] if path.exists() else [])):
        _refuse_other_settings(output, kept, settings)
    return done


def _refuse_another_run(output: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError where a folder holds the beginning of another run, or files that are no run's."""
    path, checkpoints = output / SETTINGS_FILE, output / CHECKPOINTS
    if not path.exists():
        if checkpoints.exists() and any(checkpoints.iterdir()):
            raise ValueError(
                f"{checkpoints} holds checkpoints, and there is no {path} that says of which run: choose another "
                "output folder, or move them away."
            )
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if (output / name).exists() or (output / name).is_symlink():
                raise ValueError(
                    f"{output / name} is of an adapter, and there is no {path} that says of which run: choose another "
                    "output folder, or move it away."
                )
        return
    kept = _read_settings(path)
    if last_checkpoint(checkpoints) is not None:
        _refuse_other_settings(output, kept, settings)


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's folder; raises ValueError where the file is damaged or no finetuning's."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another output folder.") from error
    if not (isinstance(kept, dict) and kept.keys() >= {"model", "during", "adapter", "training", "rows"}):
        raise ValueError(f"{path} does not hold the settings of a finetuning: choose another output folder.")
    return kept


def _refuse_other_settings(output: Path, kept: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ValueError, naming the first difference, where a folder's run has other settings."""
    before, now = _flat(kept), _flat(json.loads(json.dumps(settings)))
    threads = now.pop("threads")
    now.pop("template_date", None)  # the recorded one holds for the rows, which are compared
    if not (output / RECORD_FILE).exists():  # a finished run is only read
        refuse_other_threads(output, before.get("threads"), threads)
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{output} holds a finetuning with another {name} ({before.get(name)}, now {now[name]}): choose "
                "another output folder, or delete it."
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of groups named by group and name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{each}": value[each] for each in value} if isinstance(value, dict) else {name: value}
    return flat


def _train(model: Model, plan: Plan, settings: dict[str, Any], folder: Path, *, record: Path | None) -> Finetuning:
    """Train in `folder`; with `record`, a file for the settings, checkpoints stay there."""
    started = time.monotonic()
    seed = plan.training["seed"]
    with (
        global_randomness_kept(model),
        _lora_from(model, plan.adapter, seed) as carrier,
        _acting(model, plan) as acting,
    ):
        attachment, projections = acting
        # Nothing is written before all that could refuse has agreed.
        if record is not None:
            write_json(record, settings)
        watch = Watch(attachment, progress=plan.progress)
        trainer = Trainer(
            carrier,
            _arguments(model, plan, folder, checkpoints=record is not None),
            data_collator=partial(collate_rows, pad_token=_pad_token(model)),
            train_dataset=plan.rows.rows,
            eval_dataset=None if plan.evaluation is None else plan.evaluation.rows,
            callbacks=[watch],
            penalty_weight=0.0 if plan.penalty is None else plan.penalty.weight,
            projections=projections,
        )
        try:
            trainer.train(resume_from_checkpoint=_resumed(folder))
        finally:
            watch.close()
        weights = read_weights(carrier)
    rows = {"trained": len(plan.rows.rows), "cut": plan.rows.cut, "dropped": plan.rows.dropped}
    losses = tuple(
        {name: value for name, value in row.items() if name in _KEPT}
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    )
    return Finetuning(Adapter(plan.adapter, weights), losses, rows, settings, time.monotonic() - started)


_KEPT = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")


def _arguments(model: Model, plan: Plan, folder: Path, *, checkpoints: bool) -> transformers.TrainingArguments:
    saving = "no" if not checkpoints else "epoch" if plan.checkpoint_every is None else "steps"
    # transformers 5 has another name for it and warns of the old one.
    renamed = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
    names = {"gradient_checkpointing": "activation_checkpointing"} if renamed else {}
    device = model_device(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{names.get(name, name): value for name, value in plan.training.items()},
        data_seed=plan.training["seed"],
        logging_steps=1,
        # A loss that is no number is an error, not something to leave out of the mean.
        logging_nan_inf_filter=False,
        save_strategy=saving,
        save_steps=plan.checkpoint_every or 500,
        save_total_limit=2,
        eval_strategy="no" if plan.evaluation is None else "epoch",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )
    # Hooks hold for one copy of the model; the Trainer would spread it over all devices that it sees.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _pad_token(model: Model) -> int:
    # Masked wherever it stands.
    return int(model.tokenizer.pad_token_id or 0)


def _resumed(folder: Path) -> str | None:
    found = last_checkpoint(folder)
    return None if found is None else str(checked_checkpoint(found))


def _seed_global_generators(seed: int) -> None:
    """PEFT and the Trainer draw from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _lora_from(model: Model, adapter: dict[str, Any], seed: int) -> Iterator[Any]:
    """A model with fresh LoRA weights, and the global generators seeded."""
    _seed_global_generators(seed)
    with lora(model, adapter) as carrier:
        yield carrier


@contextmanager
def _acting(model: Model, plan: Plan) -> Iterator[tuple[Attachment | None, Projections | None]]:
    """What acts in training: the interventions, and the projections that a penalty holds."""
    other = plan.allow_other_model
    with (
        intervene(model, *plan.during, only_in_training=True, allow_other_model=other)
        if plan.during
        else nullcontext() as attachment,
        projected_residuals(model, plan.penalty.each, allow_other_model=other)
        if plan.penalty is not None
        else nullcontext() as projections,
    ):
        yield attachment, projections
