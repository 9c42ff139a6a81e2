"""The plan of a screening: samples as token ids, filtered, drawn and cut into units, with what was left out and why.

It is made once, in one pass over the data, and everything after it reads the plan: a run that was interrupted, its
shards and its workers need the data no more (arXiv:2507.21509, sections 6 and L).
Knows tokenizers; knows nothing about models or vectors.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from persona_lens.chat.batches import chat_messages, render_prompt
from persona_lens.chat.templates import date_told, fixed_date
from persona_lens.models.structure import refuse_other_threads
from persona_lens.screening.batches import PlannedRow, cut_units, read_unit, write_units
from persona_lens.screening.near_duplicates import Seen
from persona_lens.screening.planning import Choices, Planner, Room
from persona_lens.screening.samples import Rejection, Rows, Sample, Turns, fingerprint, stream_samples
from persona_lens.storage.files import JsonLines, empty_folder, read_json, room_for, write_json
from persona_lens.storage.locks import alone, sweep_up

PLAN, REJECTS, SETTINGS = "plan", "rejects.jsonl", "settings.json"
_REJECT_FIELDS = [each.name for each in fields(Rejection)]


@dataclass(frozen=True)
class Plan:
    """Units in a folder.

    Attributes:
        folder: Where they stand.
        n_units: How many there are.
        n_rows: How many samples they hold.
        counts: What became of every row that was read: `read`, `rejected` by kind, `left_out` by reason, `cut`,
            `planned`, and how many `repeated` an earlier response nearly word for word.
    """

    folder: Path
    n_units: int
    n_rows: int
    counts: Mapping[str, Any] = field(repr=False)

    def unit(self, number: int) -> list[PlannedRow]:
        """The rows of a unit, counted from 0."""
        return read_unit(self.folder, number)


def read_plan(output: Path) -> Plan:
    """The plan of a run's folder; raises FileNotFoundError where it has none."""
    folder = output / PLAN
    if not (folder / "plan.json").exists():
        raise FileNotFoundError(f"{output} holds no screening: make one with `screen`.")
    made = read_json(folder / "plan.json")
    return Plan(folder, made["units"], made["rows"], made["counts"])


def make_plan(
    tokenizer: Any,
    room: Room,
    datasets: Mapping[str, Rows],
    choices: Choices,
    settings: Mapping[str, Any],
    output: Path,
    *,
    progress: bool = True,
) -> Plan:
    """The plan of a run, from its folder where it stands there; several processes may ask for it at once.

    `settings` is everything that shapes the run. Raises ValueError where the folder holds another run, and where no
    sample is left to screen.
    """
    render_prompt(tokenizer, chat_messages(None, "?"))  # without a template every row would be rejected for it
    given = [{"name": name, "fingerprint": fingerprint(rows)} for name, rows in datasets.items()]
    wanted = json.loads(json.dumps({**settings, **asdict(choices), "datasets": given}))
    output.mkdir(parents=True, exist_ok=True)
    with alone(output / ".plan.lock"), fixed_date():
        sweep_up(output)
        refuse_other_run(output, wanted)
        if not (output / PLAN).exists():
            day = date_told(tokenizer)
            settings = {**wanted, "template_date": day} if day else wanted
            _make(tokenizer, room, datasets, choices, output, settings, progress)
    return read_plan(output)


def refuse_other_run(output: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first difference, where a folder holds a run with other settings.

    A folder with files of these names that are no screening's is refused too.
    """
    if not (output / PLAN / "plan.json").exists():
        # Nothing is begun, so nothing may be here yet that a screening writes, but for what an interrupted plan left.
        written = (PLAN, "scores.parquet", "summary.json")
        for path in (*(output / name for name in written), *output.glob("scored*.jsonl")):
            if os.path.lexists(path):
                raise ValueError(f"{output} holds {path.name} without the plan of a screening: choose another folder.")
        if (output / SETTINGS).exists():
            _read_settings(output)
        JsonLines(output / REJECTS).refuse_other_file(_REJECT_FIELDS)
        return
    if not (output / SETTINGS).exists():
        raise ValueError(f"{output} holds a plan without its settings: choose another folder, or delete it.")
    kept = _read_settings(output)
    kept.pop("template_date", None)  # the prompts of that day are in the plan
    wanted, threads = dict(wanted), kept.pop("threads", None)
    now = wanted.pop("threads", None)
    if not (output / "scores.parquet").exists():  # a finished run is only read
        refuse_other_threads(output, threads, now)
    for name in (*wanted, *kept):
        if kept.get(name) != wanted.get(name):
            raise ValueError(
                f"{output} holds a screening with another {name} ({kept.get(name)!r}, now {wanted.get(name)!r}): "
                "choose another folder, or the same settings to go on."
            )


def _read_settings(output: Path) -> dict[str, Any]:
    kept = read_json(output / SETTINGS)
    if not isinstance(kept, dict) or "datasets" not in kept:
        raise ValueError(f"{output / SETTINGS} does not hold the settings of a screening: choose another folder.")
    return kept


def _make(
    tokenizer: Any,
    room: Room,
    datasets: Mapping[str, Rows],
    choices: Choices,
    output: Path,
    settings: Mapping[str, Any],
    progress: bool,
) -> None:
    unfinished = empty_folder(output / f".{PLAN}.unfinished")
    planner = Planner(tokenizer, room, choices, JsonLines(unfinished / REJECTS))
    turns = Turns(choices.first_turn, choices.given_base)
    with (
        room_for(output / PLAN),
        tqdm(desc="plan", unit="row", disable=not progress) as bar,
        closing(Seen(unfinished / "seen.sqlite")) as seen,
    ):
        rows = planner.planned(_counted(stream_samples(datasets, turns), bar), seen)
        if choices.sample is not None:
            rows = planner.drawn(rows, choices.sample, unfinished / "spool.arrow")
        n_units, n_rows = write_units(unfinished / PLAN, cut_units(planner.with_families(rows, seen)))
        planner.flush()
    os.replace(unfinished / REJECTS, output / REJECTS)
    if not n_rows:
        raise ValueError(f"No sample is left to screen: {planner.in_words()}. {output / REJECTS} lists rejected rows.")
    made = {"units": n_units, "rows": n_rows, "counts": planner.counts(n_rows)}
    write_json(unfinished / PLAN / "plan.json", made)
    # The settings first: a plan without them would be nobody's.
    write_json(output / SETTINGS, settings)
    (unfinished / PLAN).rename(output / PLAN)
    unfinished.rmdir()


def _counted(rows: Iterable[Sample | Rejection], bar: Any) -> Iterator[Sample | Rejection]:
    for row in rows:
        yield row
        bar.update()
