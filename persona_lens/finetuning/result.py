"""What finetuning gave: the adapter, the loss curve, and the settings that made them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.models.adapters import Adapter
from persona_lens.storage.files import DAMAGE, checked, write_json

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
RECORD_FILE = "finetuning.json"


@dataclass(frozen=True, eq=False)
class Finetuning:
    """A finished finetuning.

    Attributes:
        adapter: The LoRA adapter; `adapted(model, finetuning.adapter)` puts it on the model.
        losses: Mean loss per token of each optimizer step (`step`, `loss`, `learning_rate`, `grad_norm`), and of the
            evaluation rows where there are some (`step`, `eval_loss`); nats.
        rows: How many rows were trained on, cut, and dropped.
        settings: Everything that decides the result.
        seconds: What training took, this time; 0 where a finished run was read again.
    """

    adapter: Adapter
    losses: tuple[dict[str, float], ...] = field(repr=False)
    rows: dict[str, int]
    settings: dict[str, Any] = field(repr=False)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """The training loss of the last step, nats a token."""
        return next(row["loss"] for row in reversed(self.losses) if "loss" in row)

    def loss_curve(self) -> "pandas.DataFrame":
        """Losses by step: `loss`, and `eval_loss` where it was taken."""
        import pandas

        table = pandas.DataFrame(list(self.losses))
        names = [name for name in ("loss", "eval_loss") if name in table]
        return pandas.DataFrame(table.groupby("step").first(), columns=names)

    def __str__(self) -> str:
        first = next(row["loss"] for row in self.losses if "loss" in row)
        steps = int(max(row["step"] for row in self.losses))
        done = "; ".join(self.settings["during"]) or "no intervention"
        return f"{self.rows['trained']} rows, {steps} steps, loss {first:.2f} -> {self.loss:.2f}, {done}"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter and finetuning.json; the record last, since it says that all is there."""
        folder = Path(folder)
        self.adapter.save(folder)
        record = {
            "format_version": FORMAT_VERSION,
            "rows": self.rows,
            "seconds": self.seconds,
            "settings": self.settings,
            "losses": list(self.losses),
        }
        write_json(folder / RECORD_FILE, record)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Finetuning":
        """The finetuning in a folder. Raises FileNotFoundError where it is none, ValueError where it is damaged."""
        path = Path(folder) / RECORD_FILE
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no finished finetuning: expected {RECORD_FILE}; run it again.")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {record['format_version']}, and this reads {FORMAT_VERSION}")
            losses, rows, settings = tuple(record["losses"]), record["rows"], checked(record["settings"], dict)
        except DAMAGE as error:
            raise ValueError(f"{path} is not a record of finetuning ({error}): run it again.") from error
        return cls(Adapter.load(folder), losses, rows, settings)
