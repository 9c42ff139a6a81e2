"""The plan of a screening: samples as token ids, filtered, drawn and cut into units, with what was left out and why.

It is made once, in one pass over the data, and everything after it reads the plan: a run that was interrupted, its
shards and its workers need the data no more (arXiv:2507.21509, sections 6 and L). Every random choice is a hash of the
seed and of what names the row, so it depends on no other row.
"""

import hashlib
import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from persona_lens.chat.batches import ChatTokens, UnclosedBlock, chat_messages, render_prompt, tokenize_chat
from persona_lens.chat.encoding import refuse_half_characters
from persona_lens.chat.templates import date_told, fixed_date
from persona_lens.models.structure import refuse_other_threads
from persona_lens.screening.batches import (
    SCORES,
    PlannedRow,
    cut_units,
    read_files,
    read_samples,
    read_unit,
    sample_of,
    score_file,
    score_schema,
    scored_units,
    spooled,
    write_units,
)
from persona_lens.screening.near_duplicates import Seen, require_datasketch
from persona_lens.screening.samples import Kind, Rejection, Rows, Sample, fingerprint, stream_samples
from persona_lens.storage.files import DAMAGE, JsonLines, empty_folder, read_json, room_for, write_json
from persona_lens.storage.locks import alone, sweep_up

PLAN, UNITS = "plan", "units.arrow"
REJECTS, SETTINGS, SUMMARY = "rejects.jsonl", "settings.json", "summary.json"
# Version 1, of persona_lens 0.1.0, had one table of scores, and texts in the plan alone.
FORMAT_VERSION, OLD_TABLE = 2, "scores.parquet"
_REJECT_FIELDS = [column.name for column in fields(Rejection)]


@dataclass(frozen=True)
class RowChoice:
    """Which rows of the data are screened, and what is read of them.

    Attributes:
        first_turn: Screen the first response of a chat, as the paper does with logs of real chats; else the last.
        max_prompt_tokens: Leave longer prompts out (the paper: 512); they are counted.
        max_response_tokens: Read so many tokens of a response; responses that are cut are counted.
        sample: Screen so many random samples of each data set (the paper: 200,000).
        after: Average only what follows this text, such as `</think>`.
        system_prompt: For rows without a system turn; None leaves them to the chat template, which may add its own.
        base_fraction: The share of rows, drawn at random, that get a base response; the others are left out of a data
            set's projection difference, whose interval grows.
        near_duplicates: Detect responses that nearly repeat an earlier one (needs the extra `screening`).
        seed: Of what is drawn at random.
    """

    first_turn: bool = False
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    sample: int | None = None
    after: str | None = None
    system_prompt: str | None = None
    base_fraction: float = 1.0
    near_duplicates: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is 1 or more, or None for no limit; got {value}.")
        refuse_half_characters(self.system_prompt or "", "system_prompt")
        if not 0 < self.base_fraction <= 1:
            raise ValueError(f"base_fraction is above 0 and at most 1, got {self.base_fraction}.")


@dataclass(frozen=True)
class ScreeningPlan:
    """A run's folder, of which everything is planned and some units may be scored.

    Attributes:
        folder: The run's folder.
        n_units: How many units there are.
        n_rows: How many samples they hold.
        counts: What became of every row that was read; see `Screening`.
        settings: Everything that shapes the run.
    """

    folder: Path
    n_units: int
    n_rows: int
    counts: Mapping[str, Any] = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)

    def unit(self, number: int) -> list[PlannedRow]:
        """The rows of a unit, counted from 0."""
        return read_unit(self.folder / PLAN / UNITS, number)

    @property
    def is_old(self) -> bool:
        """Whether persona_lens 0.1.0 wrote it."""
        return self.settings.get("format_version") == 1

    def missing(self) -> set[int]:
        """The units that are not scored yet; raises ValueError for a run that 0.1.0 began and did not finish."""
        if self.is_old and not (self.folder / OLD_TABLE).exists():
            raise ValueError(
                f"{self.folder} holds a screening that persona_lens 0.1.0 began: finish it with that version, or "
                "choose another folder."
            )
        if self.is_old:
            return set()
        return set(range(self.n_units)).difference(scored_units(self.folder))

    def scores(self, columns: list[str]) -> Any:
        """A pandas table of these columns, indexed by `row` in the order of the data; the others are not read.

        Raises ValueError where the files do not hold every row once.
        """
        files = [score_file(self.folder, unit) for unit in range(self.n_units)]
        schema = score_schema(self.settings["vectors"])
        table = read_files([self.folder / OLD_TABLE] if self.is_old else files, ["row", *columns], schema)
        frame = table.to_pandas().set_index("row")
        if len(frame) != self.n_rows or not frame.index.is_unique:
            raise ValueError(
                f"{self.folder} has scores of {frame.index.nunique()} rows, and {self.n_rows} are planned: take the "
                f"folder from a copy, or delete the files of {SCORES} that are not the run's and screen again."
            )
        return frame

    def samples(self, rows: list[int], units: list[int]) -> list[Sample]:
        """The samples of rows that are in these units, with their base responses, sorted by `row`."""
        if not self.is_old:
            return read_samples([score_file(self.folder, unit) for unit in sorted(set(units))], rows)
        # 0.1.0 kept texts as JSON in the plan, and base responses that were generated in the table.
        names = ["row", "dataset", "id", "line", "text"]
        texts = read_files(sorted((self.folder / PLAN).glob("units-*.arrow")), names, rows=rows).to_pylist()
        generated = read_files([self.folder / OLD_TABLE], ["row", "base_response"], rows=rows).to_pylist()
        return [sample_of(own | row | json.loads(row["text"])) for own, row in zip(generated, texts, strict=True)]


def read_plan(output: Path) -> ScreeningPlan:
    """The plan of a run's folder; raises FileNotFoundError where it has none."""
    if not (output / PLAN / "plan.json").exists():
        raise FileNotFoundError(f"{output} holds no screening: make one with `screen`.")
    settings, plan = _read_settings(output), read_json(output / PLAN / "plan.json")
    try:
        return ScreeningPlan(output, plan["units"], plan["rows"], plan["counts"], settings)
    except DAMAGE as error:
        raise ValueError(f"{output / PLAN} does not hold the plan of a screening: choose another folder.") from error


def make_plan(
    tokenizer: Any,
    context: int,
    datasets: Mapping[str, Rows],
    choice: RowChoice,
    settings: Mapping[str, Any],
    output: Path,
    *,
    progress: bool = True,
) -> ScreeningPlan:
    """The plan of a run, made or read from its folder; several processes may ask for it at once.

    `context` is how many tokens the model reads at once, `settings` everything beside the choice of rows that shapes
    the run. Raises ValueError where the folder holds another run, and where no sample is left to screen.
    """
    render_prompt(tokenizer, chat_messages(None, "?"))  # without a template every row would be rejected for it
    sources = [{"name": name, "fingerprint": fingerprint(rows)} for name, rows in datasets.items()]
    wanted = {"format_version": FORMAT_VERSION, **settings, **asdict(choice), "datasets": sources}
    wanted = json.loads(json.dumps(wanted))
    output.mkdir(parents=True, exist_ok=True)
    with alone(output / ".plan.lock"), fixed_date():
        sweep_up(output)
        _refuse_other_run(output, wanted)
        if not (output / PLAN).exists():
            day = date_told(tokenizer)
            wanted |= {"template_date": day} if day else {}
            _write_plan(_Planner(tokenizer, context, choice, wanted), datasets, output, progress)
    return read_plan(output)


def _refuse_other_run(output: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first difference, where a folder holds a run with other settings.

    A folder with files that have the names of a screening's, and are not, is refused too.
    """
    if not (output / PLAN / "plan.json").exists():
        # Nothing is begun, so nothing may be here yet that a screening writes, but for what an interrupted plan left.
        for name in (PLAN, SCORES, OLD_TABLE, SUMMARY):
            if os.path.lexists(output / name):
                raise ValueError(f"{output} holds {name} without the plan of a screening: choose another folder.")
        if (output / SETTINGS).exists():
            _read_settings(output)
        JsonLines(output / REJECTS).refuse_other_file(_REJECT_FIELDS)
        return
    plan = read_plan(output)
    own, wanted, missing = dict(plan.settings), dict(wanted), plan.missing()
    own.pop("template_date", None)  # the prompts of that day are in the plan
    threads, now = own.pop("threads", None), wanted.pop("threads", None)
    if plan.is_old:
        own.pop("given_base", None)
        own |= {"format_version": FORMAT_VERSION, "near_duplicates": True}
    if missing:  # a finished run is only read
        refuse_other_threads(output, threads, now)
    for name in (*wanted, *own):
        if own.get(name) != wanted.get(name):
            raise ValueError(
                f"{output} holds a screening with another {name} ({own.get(name)!r}, now {wanted.get(name)!r}): "
                "choose another folder, or the same settings to go on."
            )


def _read_settings(output: Path) -> dict[str, Any]:
    if not (output / SETTINGS).exists():
        raise ValueError(f"{output} holds a plan without its settings: choose another folder, or delete it.")
    settings = read_json(output / SETTINGS)
    if not isinstance(settings, dict) or "datasets" not in settings:
        raise ValueError(f"{output / SETTINGS} does not hold the settings of a screening: choose another folder.")
    return settings


def _write_plan(planner: "_Planner", datasets: Mapping[str, Rows], output: Path, progress: bool) -> None:
    choice, settings = planner.choice, planner.settings
    if choice.near_duplicates:
        require_datasketch()
    unfinished = empty_folder(output / f".{PLAN}.unfinished")
    (unfinished / PLAN).mkdir()
    samples = stream_samples(datasets, first_turn=choice.first_turn, needs_base=settings["base"] == "given")
    with (
        room_for(output / PLAN),
        closing(Seen(unfinished / "seen.sqlite")) as seen,
        (unfinished / REJECTS).open("w", encoding="utf-8") as rejects,
    ):
        bar = iter(tqdm(samples, desc="plan", unit="row", disable=not progress))
        rows: Iterable[PlannedRow] = planner.planned(bar, seen, rejects)
        if choice.sample is not None:
            rows = planner.drawn(rows, choice.sample, unfinished / "spool.arrow")
        n_units, n_rows = write_units(unfinished / PLAN / UNITS, cut_units(planner.with_families(rows, seen)))
        rejects.flush()
        os.fsync(rejects.fileno())
    os.replace(unfinished / REJECTS, output / REJECTS)
    if not n_rows:
        raise ValueError(f"No sample is left to screen: {planner.in_words()}. {output / REJECTS} lists rejected rows.")
    plan = {"units": n_units, "rows": n_rows, "counts": planner.counts(n_rows)}
    write_json(unfinished / PLAN / "plan.json", plan)
    # The settings first: a plan without them would be nobody's.
    write_json(output / SETTINGS, settings)
    (unfinished / PLAN).rename(output / PLAN)
    unfinished.rmdir()


class _Planner:
    """Turns samples into planned rows, and counts what becomes of the others."""

    def __init__(self, tokenizer: Any, context: int, choice: RowChoice, settings: Mapping[str, Any]):
        self.tokenizer, self.context, self.choice, self.settings = tokenizer, context, choice, settings
        self.read = self.cut = self.repeated = 0
        self.rejected: Counter[Kind] = Counter()
        self.left_out: Counter[str] = Counter()

    def planned(self, rows: Iterable[Sample | Rejection], seen: Seen, rejects: TextIO) -> Iterator[PlannedRow]:
        """The samples that are screened; rejected rows are counted, and written to `rejects`."""
        for row in rows:
            self.read += 1
            planned = self._tokenized(row, seen) if isinstance(row, Sample) else row
            if isinstance(planned, PlannedRow):
                yield planned
            elif planned is not None:
                self.rejected[planned.kind] += 1
                record = {**vars(planned), "content": _as_json(planned.content)}
                rejects.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def _tokenized(self, sample: Sample, seen: Seen) -> PlannedRow | Rejection | None:
        """A sample with its token ids, or why it is rejected; None, and counted, where it is left out."""
        choice, context, messages = self.choice, self.context, sample.messages
        first = seen.first_line(sample.dataset, sample.id, sample.line)
        if first != sample.line:
            return _rejection(sample, "duplicate id", f"the id {sample.id!r} stands at line {first} already")
        if choice.system_prompt is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": choice.system_prompt}, *messages)
        try:
            whole = tokenize_chat(self.tokenizer, messages, sample.response, after=choice.after)
            if sample.base_response is not None:  # refused now rather than when it is scored
                tokenize_chat(self.tokenizer, messages, sample.base_response)
        except UnclosedBlock:
            return _rejection(sample, "no token to average", f"it never says {choice.after!r}")
        except ValueError as error:
            return _rejection(sample, "malformed", str(error))
        if choice.max_prompt_tokens is not None and len(whole.prompt) > choice.max_prompt_tokens:
            self.left_out[f"prompt longer than {choice.max_prompt_tokens} tokens"] += 1
            return None
        chat = ChatTokens(whole.prompt, whole.response[: choice.max_response_tokens], whole.skip)
        wants_base = _draw(choice.seed, sample, "base") < choice.base_fraction
        if len(chat) > context:
            return _rejection(sample, "too long", f"{len(chat)} tokens, and the model's context holds {context}")
        answer = self.settings.get("max_new_tokens") or 0
        if wants_base and len(chat.prompt) + answer > context:
            reason = f"with {answer} tokens of a base response the prompt passes the context"
            return _rejection(sample, "too long", reason)
        if not chat.n_averaged:
            return _rejection(sample, "no token to average", "no token is left of its response")
        group = _number(*map(str, chat.prompt)) >> 1
        stated = replace(sample, messages=messages)
        return PlannedRow(stated, chat, wants_base, len(chat) < len(whole), group, family=sample.row)

    def drawn(self, rows: Iterable[PlannedRow], n: int, spool: Path) -> Iterator[PlannedRow]:
        """At most `n` random rows of each data set, in their order."""
        # Of each data set the n rows with the smallest random numbers, the greatest of them on top of its heap.
        smallest: dict[str, list[tuple[float, int]]] = defaultdict(list)

        def key(row: PlannedRow) -> tuple[float, int]:
            return -_draw(self.choice.seed, row.sample, "sample"), -row.sample.row

        def note(row: PlannedRow) -> None:
            heap = smallest[row.sample.dataset]
            if len(heap) < n:
                heapq.heappush(heap, key(row))
            else:
                heapq.heappushpop(heap, key(row))

        for row in spooled(rows, spool, note=note):
            if key(row) >= smallest[row.sample.dataset][0]:
                yield row
            else:
                self.left_out["not drawn"] += 1

    def with_families(self, rows: Iterable[PlannedRow], seen: Seen) -> Iterator[PlannedRow]:
        """The rows, each with its family; rows that are cut or repeat others are counted."""
        for row in rows:
            self.cut += row.cut
            if self.choice.near_duplicates:
                row = replace(row, family=seen.family(row.sample.response, row.sample.row))
                self.repeated += row.family != row.sample.row
            yield row

    def counts(self, n_rows: int) -> dict[str, Any]:
        """What became of every row."""
        return {
            "read": self.read,
            "rejected": dict(self.rejected.most_common()),
            "left_out": dict(self.left_out),
            "planned": n_rows,
            "cut": self.cut,
            "repeated": self.repeated if self.choice.near_duplicates else None,
        }

    def in_words(self) -> str:
        """What became of the rows that are not screened."""
        lost = [f"{count} {what}" for what, count in (*self.rejected.items(), *self.left_out.items())]
        return f"of {self.read} rows {', '.join(lost) or 'none was there'}"


def _draw(seed: int, sample: Sample, purpose: str) -> float:
    """A number from 0 to 1 that depends on the seed, the purpose and what names the row alone."""
    return _number(str(seed), purpose, sample.dataset, str(sample.line)) / (1 << 64)


def _number(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def _rejection(sample: Sample, kind: Kind, reason: str) -> Rejection:
    return Rejection(sample.dataset, sample.line, kind, reason, {"id": sample.id, "messages": sample.conversation})


def _as_json(content: Any) -> Any:
    """The row, or how it reads where it cannot be written as JSON."""
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return repr(content)
    return content
