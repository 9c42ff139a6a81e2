"""The transformers Trainer with the checks of a finetuning run, and the penalty on changed projections.

It refuses interventions that do not act, losses that are not numbers, and full disks; batches, optimizer, schedule,
accumulation, checkpoints and resuming are the Trainer's own.

The penalty is the control that the paper found weak: loss + weight * mean over tokens and vectors of (p - p_base)²,
where p is a token's scalar projection on a unit vector while training, and p_base the one without the adapter
(arXiv:2507.21509, section J.5, which gives no formula).
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from einops import rearrange
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor

from persona_lens.activations.means import Projections
from persona_lens.finetuning.dataset import IGNORED, TrainingRow
from persona_lens.interventions.hooks import Attachment
from persona_lens.storage.files import checked
from persona_lens.vectors.persona_vector import PersonaVector
from persona_lens.vectors.persona_vectors import PersonaVectors


@dataclass(frozen=True)
class ProjectionPenalty:
    """Hold projections on vectors where the base model has them.

    Attributes:
        vectors: One vector, or those of every layer.
        weight: What a squared change of one, in the units of the residual stream, adds to the loss.
    """

    vectors: PersonaVector | PersonaVectors
    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"The weight of a penalty is positive, got {self.weight}: leave the penalty out for none.")

    @property
    def each(self) -> tuple[PersonaVector, ...]:
        """Its vectors, one after another."""
        given = self.vectors
        return (given,) if isinstance(given, PersonaVector) else tuple(given.at(layer) for layer in given.known_layers)

    def __str__(self) -> str:
        layers = sorted({vector.layer for vector in self.each})
        where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        return f"penalty of {self.weight:g} on the projection change of {self.each[0].trait}, {where}"


def projection_change(
    before: Float[Tensor, "batch pos vector"],
    after: Float[Tensor, "batch pos vector"],
    attended: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Mean square of the change of projections, over tokens that are not padding and over vectors."""
    squares = (after - before).square() * rearrange(attended, "batch pos -> batch pos 1")
    return squares.sum() / (attended.sum() * after.shape[-1])


def penalised(loss: Tensor, carrier: Any, inputs: dict[str, Any], found: Projections, weight: float) -> Tensor:
    """A loss whose forward pass left its projections in `found`, with the penalty; runs the pass without the adapter.

    `carrier` is the PEFT model that ran.
    """
    after = found.read()
    # In evaluation mode, so that what acts in training only is off too.
    carrier.eval()
    try:
        with torch.no_grad(), carrier.disable_adapter():
            carrier(**{name: value for name, value in inputs.items() if name != "labels"})
    finally:
        carrier.train()
    return loss + weight * projection_change(found.read(), after, inputs["attention_mask"].bool().cpu()).to(loss)


class TrainingDiverged(ValueError):
    """The loss is no finite number any more."""


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written, for want of disk space for instance."""


def collate_rows(rows: Sequence[TrainingRow], *, pad_token: int) -> dict[str, Tensor]:
    """Rows padded on the right to one length, as a causal model takes them."""
    width = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), width), pad_token)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        labels[index, : len(row.tokens)] = torch.tensor(row.labels)
        mask[index, : len(row.tokens)] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


class Trainer(transformers.Trainer):
    """A Trainer whose loss may have a projection penalty, and that leaves no half-written checkpoint behind."""

    def __init__(self, *args: Any, penalty_weight: float = 0.0, projections: Projections | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._penalty_weight = penalty_weight
        self._projections = projections
        self._evaluated: list[tuple[float, int]] = []
        # They print to standard output, where results belong.
        for callback in (transformers.PrinterCallback, transformers.trainer_callback.ProgressCallback):
            self.remove_callback(callback)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, in training with the penalty on top."""
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            loss = found[0] if return_outputs else found
            self._evaluated.append((float(loss), int((inputs["labels"][:, 1:] != IGNORED).sum())))
            return found
        if self._projections is None:
            return found
        assert not return_outputs, "a training step wants the loss alone"
        # A model that divides its loss by the tokens of all accumulated batches leaves the sum of them to the Trainer.
        parts = self.current_gradient_accumulation_steps if self.model_accepts_loss_kwargs else 1
        weight = self._penalty_weight / parts
        return penalised(found, self.accelerator.unwrap_model(model), inputs, self._projections, weight)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with a loss that is the mean over all tokens, where the Trainer has the mean over batches."""
        self._evaluated = []
        found: Any = super().evaluation_loop(*args, **kwargs)
        tokens = sum(count for _, count in self._evaluated)
        found.metrics["eval_loss"] = sum(loss * count for loss, count in self._evaluated) / tokens
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _resuming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        # torch reports a failed write as RuntimeError.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointNotWritten(
                f"Cannot write a checkpoint to {folder} ({str(error).splitlines()[0]}): free disk space and run again, "
                "which goes on from the last checkpoint."
            ) from error


class Watch(transformers.TrainerCallback):
    """Stops training where an intervention does not act or the loss is no number, and shows progress."""

    def __init__(self, attachment: Attachment | None, *, progress: bool):
        self._attachment = attachment
        self._progress = progress
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, where a resumed run stands."""
        from tqdm.auto import tqdm

        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", disable=not self._progress)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse to go on where what should act in training did not."""
        self._bar.update()
        attached = self._attachment
        if attached is not None and not set(attached.layers) <= attached.ran:
            raise RuntimeError(
                f"{attached.interventions[0]}: the first step of training never reached its layers, so the "
                "intervention did not act: train the model that it is attached to."
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Stop on a loss that is no number."""
        for name in ("loss", "eval_loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is None:
                continue
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"The {name} is {value} at step {state.global_step}: lower learning_rate, a coefficient or the "
                    "penalty's weight, or look for broken rows. The checkpoints before it are kept."
                )
            if name != "grad_norm" and self._bar is not None:
                self._bar.set_postfix({name: f"{value:.3f}"})

    def close(self) -> None:
        """Close the bar, also where training was interrupted."""
        if self._bar is not None:
            self._bar.close()


_CHECKPOINT_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scaler.pt",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}
"""What the Trainer writes for an adapter. It would also load weights of the model itself, or more adapters."""


@contextmanager
def _resuming(checkpoint: str | os.PathLike[str] | None) -> Iterator[None]:
    """Around the Trainer's reading of a checkpoint: whatever is wrong with its files is one sentence."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files make torch, safetensors and PEFT fail in any way
        reason = (str(error).splitlines() or [""])[0].rstrip(".:") or type(error).__name__
        raise _damaged(checkpoint, reason) from error


def _damaged(checkpoint: object, reason: str) -> ValueError:
    return ValueError(
        f"The checkpoint {checkpoint} cannot be resumed from ({reason:.200}): delete that folder, and the run goes on "
        "from the checkpoint before it, or from the start."
    )


def checked_checkpoint(folder: Path) -> Path:
    """A checkpoint whose files are those of the Trainer and can be read without running anything in them.

    Raises ValueError in one sentence for any other. `training_args.bin`, which holds a pickle, is never read.
    """
    if foreign := sorted(each.name for each in folder.iterdir() if each.name not in _CHECKPOINT_FILES):
        raise _damaged(folder, f"it holds {foreign[0]!r:.60}, which the Trainer does not write for an adapter")
    with _resuming(folder):
        state = transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
        for name in ("global_step", "max_steps", "num_train_epochs"):
            checked(getattr(state, name), int, low=0)
        checked(state.epoch, float, low=0)
        if not all(isinstance(row, dict) for row in checked(state.log_history, list)):
            raise TypeError("log_history holds rows that are no objects")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
    return folder


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole, if there is one: its state is written last."""

    def whole(checkpoint: Path) -> bool:
        try:
            return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False

    steps = {
        int(each.name.removeprefix("checkpoint-")): each
        for each in folder.glob("checkpoint-*")
        if each.name.removeprefix("checkpoint-").isdigit() and whole(each)
    }
    return steps[max(steps)] if steps else None
