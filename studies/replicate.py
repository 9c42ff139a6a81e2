"""The embedded model's replication with its moods: `python -m studies.replicate runs/replication`, from a checkout.

It is `persona-lens replicate` with the stages on moods in place of those on the user's own sets, and resumes the same
way. It made the committed results of docs/results/replication and, with --full, docs/results/replication_full.
"""

import argparse
from pathlib import Path

from persona_lens.replication.page import write_replication_report
from persona_lens.replication.plan import HEADS, Plan, plan_replication
from persona_lens.replication.preset import load_preset
from persona_lens.replication.run import run_plan
from studies.mood_stages import MOOD_STAGES, PRESET


def main() -> None:
    """Plan, and unless that is all that is wanted, run and report."""
    parser = argparse.ArgumentParser(description="The embedded model's replication with its moods.")
    parser.add_argument("output_dir", type=Path, help="folder of the run; a second call goes on where it stopped")
    parser.add_argument("--preset", type=Path, default=PRESET, help="a preset's file with a table moods")
    parser.add_argument("--only", action="append", default=[], help="only this stage; repeatable")
    parser.add_argument("--full", action="store_true", help="all traits and moods that the preset names")
    parser.add_argument("--dry-run", action="store_true", help="only print what it does and how long that takes")
    arguments = parser.parse_args()
    preset = load_preset(arguments.preset)
    plan = plan_replication(preset.in_full() if arguments.full else preset, only=arguments.only, extra=MOOD_STAGES)
    print_plan(plan)
    if not arguments.dry_run:
        run_plan(plan, arguments.output_dir)
        print(f"The page is {write_replication_report(arguments.output_dir, extra_stages=MOOD_STAGES)}.")


def print_plan(plan: Plan) -> None:
    """The plan's table and notes, as text."""
    for row in (HEADS, *plan.rows()):
        print("  ".join(f"{cell:>12}" for cell in row))
    print("\n".join(plan.notes()))


if __name__ == "__main__":
    main()
