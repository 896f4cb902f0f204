"""Where the time of a step of dense-4x256 goes: what `finetune-trainer profile` prints of it.

Usage: profile_step.py [TRAINER]

Writes tests/bench/results/profile.txt and puts it into docs/benchmarks.md. Without TRAINER it only puts what is there into the page.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import ours
import page
from workloads import WORKLOADS

WORKLOAD, STEPS = WORKLOADS["dense-4x256"], 10
RESULT = page.RESULTS / "profile.txt"


def profile(trainer):
    """The table that the trainer prints, from the line about the step on."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        rows_path = folder / "rows.jsonl"
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in WORKLOAD.data(STEPS)))
        (folder / "job.yaml").write_text(json.dumps(ours.training_job(WORKLOAD, rows_path, STEPS, 1, None, {})))
        command = [trainer, "profile", str(folder / "job.yaml"), "--dir", str(folder / "run"), "--trace", str(folder / "trace.json")]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = printed[printed.index("a step of"):].splitlines()
    return "\n".join(line for line in lines if not line.startswith("roofline:")).strip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", nargs="?")
    arguments = parser.parse_args()
    if arguments.trainer:
        RESULT.write_text(profile(arguments.trainer))
    page.put(page.PROFILE_MARKS, ["```", RESULT.read_text().rstrip(), "```"])


if __name__ == "__main__":
    main()
