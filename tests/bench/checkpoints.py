"""How long checkpoints hold training up.

Usage: checkpoints.py [TRAINER] [--print-only]

Trains dense-4x256 (LoRA) and full-4x256 (all weights) for two checkpoints' worth of steps with `checkpoint.everySteps: 50`, prints
a table, writes tests/bench/results/checkpoints.json, and puts the table into docs/benchmarks.md:
  waited   seconds that training waited for a checkpoint, of all seconds of the steps
  slower   what the steps beside the thread that writes a checkpoint took beyond the median step, of all seconds of the steps
Without TRAINER it only puts the results that are there into the page.
"""

import argparse
import json
import pathlib
import re
import statistics
import tempfile

import ours
import page
from bench import RESULTS, commit
from machine import processor
from workloads import WORKLOADS

EVERY, STEPS = 50, 110
# Steps after a checkpoint begins that may run beside its writing.
BESIDE = 10
RESULT = RESULTS / "checkpoints.json"
CHECKPOINT = re.compile(r"checkpoint at step (\d+): (.+) in ([\d.]+) s, for which training waited ([\d.]+) s")


def measure(trainer, name):
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        rows_path = folder / "rows.jsonl"
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in workload.data(STEPS)))
        job = ours.training_job(workload, rows_path, STEPS, 1, None, {})
        job["spec"]["checkpoint"] = {"everySteps": EVERY}
        run, *_ = ours.execute(trainer, job, folder)
        seconds = {record["step"]: record["seconds"] for record in ours.lines(run / "metrics.jsonl") if "loss" in record}
        commits = CHECKPOINT.findall((folder / "messages").read_text())
    due = [commit for commit in commits if int(commit[0]) % EVERY == 0]
    beside = [step for commit, *_ in due for step in range(int(commit) + 1, int(commit) + 1 + BESIDE)]
    median = statistics.median(seconds.values())
    total = sum(seconds.values())
    return {
        "bytes": due[0][1], "commits": len(due), "commitSeconds": statistics.median(float(commit[2]) for commit in due),
        "stepSeconds": median,
        "waited": sum(float(commit[3]) for commit in due) / total,
        "slower": sum(seconds[step] - median for step in beside) / total,
    }


def table(result):
    lines = ["| workload | a checkpoint | written in | a step | waited | steps beside it are slower |", "|---|---|---|---|---|---|"]
    for name, values in result["workloads"].items():
        lines.append(f"| {name} | {values['bytes']} | {values['commitSeconds']:.2f} s | {values['stepSeconds']:.2f} s | {values['waited']:.2%} "
                     f"| {values['slower']:.2%} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", nargs="?")
    parser.add_argument("--print-only", action="store_true", help="write neither results nor page")
    arguments = parser.parse_args()
    if arguments.trainer:
        result = {"every": EVERY, "commit": commit(), "processor": processor(),
                  "workloads": {name: measure(arguments.trainer, name) for name in ("dense-4x256", "full-4x256")}}
        print("\n".join(table(result)))
        if not arguments.print_only:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.print_only:
        page.put(page.CHECKPOINT_MARKS, table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
