"""Runs on a disk that fills up end with the files of one that had room: none lost, none half-written."""

import subprocess

import pytest

from tests.fault_cases import mounted
from tests.killed_runs import KINDS, StoppedClock
from tests.test_killed_runs import assert_nothing_lost_or_doubled


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_disk_fills_up_again_and_again_goes_on(kind, tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.vectors.provenance.datetime", StoppedClock)
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", 4)
    KINDS[kind](tiny_bridge, tmp_path / "whole")
    refused, blocks, disk = 0, 2, tmp_path / "disk"
    with mounted(disk, "size=8k"):
        while True:
            try:
                KINDS[kind](tiny_bridge, disk / "run")
                break
            except OSError as error:
                if "free disk space and run again" not in str(error):
                    raise
                refused += 1
            blocks += 1 + blocks // 4
            subprocess.run(["mount", "-o", f"remount,size={4 * blocks}k", disk], check=True)
        print(f"{kind}: refused {refused} times, {4 * blocks} KiB in the end")
        assert refused > 3
        assert_nothing_lost_or_doubled(kind, tmp_path, [disk / "run"])
