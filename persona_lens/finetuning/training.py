"""A planned finetuning run: resumed where it stopped, trained with what acts in training, and left without a trace.

Knows nothing about chats: rows of token ids come in.
"""

import hashlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from persona_lens.activations import projected_residuals
from persona_lens.adapters import Adapter, lora, read_weights
from persona_lens.finetuning.dataset import TrainingRows
from persona_lens.finetuning.penalty import ProjectionPenalty
from persona_lens.finetuning.result import RECORD_FILE, Finetuning
from persona_lens.finetuning.trainer import Trainer, Watch, checked_checkpoint, collate_rows, last_checkpoint
from persona_lens.interventions import Intervention, intervene
from persona_lens.locks import writes_folder
from persona_lens.models import Model, identify, model_device
from persona_lens.records import ensure_writable, write_json

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
        }


def _digest(rows: TrainingRows) -> str:
    return hashlib.sha256(repr(rows.rows).encode()).hexdigest()[:16]


def run_plan(model: Model, plan: Plan, output: Path | None) -> Finetuning:
    """Train as planned, or go on, or read what is finished; see `finetune`."""
    settings = plan.settings(model)
    if output is None:
        with tempfile.TemporaryDirectory() as scratch:
            return _train(model, plan, settings, Path(scratch), record=None)
    _refuse_another_run(output, settings)
    if (output / RECORD_FILE).exists():
        # What a run that was killed at its very end had no time to take away; nothing where that may not be written to.
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        return Finetuning.load(output)
    ensure_writable(output / RECORD_FILE)
    with writes_folder(output):
        done = _train(model, plan, settings, output / CHECKPOINTS, record=output / SETTINGS_FILE)
        done.save(output)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return done


def _refuse_another_run(output: Path, settings: dict[str, Any]) -> None:
    path = output / SETTINGS_FILE
    begun = (output / RECORD_FILE).exists() or last_checkpoint(output / CHECKPOINTS) is not None
    if not (begun and path.exists()):
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): choose another output folder.") from error
    before, now = _flat(kept), _flat(json.loads(json.dumps(settings)))
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
    with ExitStack() as stack:
        stack.enter_context(_seeded(seed))
        carrier = stack.enter_context(lora(model, plan.adapter))
        attachment = None
        if plan.during:
            context = intervene(model, *plan.during, only_in_training=True, allow_other_model=plan.allow_other_model)
            attachment = stack.enter_context(context)
        projections = None
        if plan.penalty is not None:
            context = projected_residuals(model, plan.penalty.each, allow_other_model=plan.allow_other_model)
            projections = stack.enter_context(context)
        # Nothing is written before all that could refuse has agreed.
        if record is not None:
            write_json(record, settings)
        watch = Watch(attachment, progress=plan.progress)
        stack.callback(watch.close)
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
        trainer.train(resume_from_checkpoint=_resumed(folder))
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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators seeded, since PEFT and the Trainer draw from them, and put back on leaving."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
