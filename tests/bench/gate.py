"""Fails if a new build of the trainer is over 10 % slower than the one before it.

Usage: gate.py BASE NEW [--pairs N] [--steps N] [--workload NAME ...]

Trains each workload with both binaries in turn, in alternating order, and compares the least seconds per token that either
needed over all steps after the second: a ratio within one run, so the machine's own speed does not matter, and what else the
machine does can only add to a run. Needs no package besides Python's own, and models/SmolLM2-135M-Instruct (`make base-model`).
"""

import argparse
import json
import pathlib
import sys
import tempfile

import ours
from peers import WARM_STEPS
from workloads import WORKLOADS

MOST = 1.10
# What a gain takes, that is worth keeping.
GAIN = 0.95


def seconds_per_token(builds, workload, pairs, steps):
    """The least of each build."""
    seconds = {build: [] for build in builds}
    with tempfile.TemporaryDirectory() as folder:
        rows_path = pathlib.Path(folder, "rows.jsonl")
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in WORKLOADS[workload].data(steps)))
        for pair in range(pairs):
            for build in builds if pair % 2 == 0 else reversed(builds):
                rate = ours.run(builds[build], WORKLOADS[workload], rows_path, steps, seed=1)["tokensPerSecond"]
                seconds[build].append(1 / rate)
                print(f"{workload}, pair {pair + 1}, {build}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    return {build: min(values) for build, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="trainer binary of the base build")
    parser.add_argument("new", help="trainer binary of the new build")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps of a run, more than {WARM_STEPS}")
    parser.add_argument("--workload", nargs="+", default=["dense-4x256", "demo-rows"], choices=WORKLOADS)
    arguments = parser.parse_args()
    if arguments.pairs < 1 or arguments.steps <= WARM_STEPS:
        parser.error(f"expected at least one pair and more than {WARM_STEPS} steps")
    slower = []
    for workload in arguments.workload:
        seconds = seconds_per_token({"base": arguments.base, "new": arguments.new}, workload, arguments.pairs, arguments.steps)
        ratio = seconds["new"] / seconds["base"]
        print(f"{workload}: the new build needs {ratio:.3f} times the base build's time for a token, at most {MOST:.2f} is allowed.")
        if ratio > MOST:
            slower.append(workload)
        if ratio < GAIN:
            print(f"{workload}: faster; name this commit in tests/bench/base, so that the gain is not lost unseen.")
    if slower:
        sys.exit(f"Slower on {', '.join(slower)}. Find out where with `finetune-trainer profile FILE` on both builds, or run again "
                 "if the machine was busy. Where the time is well spent, name the commit in tests/bench/base.")


if __name__ == "__main__":
    main()
