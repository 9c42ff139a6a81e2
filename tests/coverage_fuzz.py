"""Fuzzing led by coverage: inputs that reach lines not reached before are kept, and changed again.

`python -m tests.coverage_fuzz FOLDER RUNS [NAME ...]` gives every reader of `test_hostile_files`, or those of the
names, so many inputs, each kind of file in a fork of its own, and prints a line of JSON a kind; what ended otherwise
stays in FOLDER with its log. It needs atheris (libFuzzer for Python).
"""

import json
import os
import random
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import atheris

from tests.hostile import Reader, changed_value

with atheris.instrument_imports(include=["persona_lens", "gguf"]):
    from tests.test_hostile_files import all_readers, assert_read_or_refused

SECONDS, BYTES = 60, 64_000
"""How long one input may take before libFuzzer calls it a hang, and its most bytes."""


def fuzz(reader: Reader, whole: Path | None, folder: Path, runs: int) -> None:
    """Never returns: the process ends with 0, or with another code and the input in FOLDER."""
    place, corpus = folder / "place", folder / "corpus"
    for each in (place, corpus):
        each.mkdir(parents=True)
    for each in whole.iterdir() if whole else ():
        (place / each.name).write_bytes(each.read_bytes())
    (corpus / "whole").write_bytes(reader.contents)

    def read(contents: bytes) -> None:
        assert_read_or_refused(reader, contents, place)

    def change(contents: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if reader.structured and contents and draw.random() < 0.5:
            return changed_value(draw, contents)[:most]
        return atheris.Mutate(contents, most)

    flags = [f"-runs={runs}", "-seed=1", f"-timeout={SECONDS}", f"-max_len={BYTES}", "-rss_limit_mb=8000"]
    atheris.Setup(
        ["fuzz", *flags, "-print_final_stats=1", f"-artifact_prefix={folder}/", str(corpus)],
        read,
        custom_mutator=change,
    )
    atheris.Fuzz()


def main(folder: Path, runs: int, names: list[str]) -> None:
    """Every kind of file in a fork of its own."""
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True)
    for number, (reader, whole) in enumerate(all_readers(folder)):
        if names and reader.name not in names:
            continue
        place, log = folder / f"fuzzed-{number}", folder / f"fuzzed-{number}.log"
        if (child := os.fork()) == 0:
            file = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(file, sys.stdout.fileno())
            os.dup2(file, sys.stderr.fileno())
            fuzz(reader, whole, place, runs)
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:  # this process was interrupted
            os.kill(child, signal.SIGKILL)
            raise
        said = log.read_text(errors="replace")
        executed = re.findall(r"number_of_executed_units: (\d+)", said)
        found: dict[str, Any] = {
            "kind": reader.name,
            "inputs": int(executed[-1]) if executed else 0,
            "reaching_further": len(list((place / "corpus").iterdir())),
        }
        if code := os.waitstatus_to_exitcode(status):
            found |= {"code": code, "error": said[said.find("Uncaught Python exception") :][:2000]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
