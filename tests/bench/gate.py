"""Fails if a new build of the trainer is over 10 % slower than the one before it.

Usage: gate.py BASE NEW [--pairs N] [--steps N]

Trains dense-4x256 (bf16, LoRA) with both binaries in turn, in alternating order, and compares the medians of their seconds per
token over all steps after the second: a ratio within one run, so the machine's own speed does not matter. Needs no package
besides Python's own, and models/SmolLM2-135M-Instruct (`make base-model`).
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

import ours
from peers import WARM_STEPS
from workloads import WORKLOADS

MOST = 1.10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="trainer binary of the base build")
    parser.add_argument("new", help="trainer binary of the new build")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help=f"optimizer steps of a run, more than {WARM_STEPS}")
    arguments = parser.parse_args()
    if arguments.pairs < 1 or arguments.steps <= WARM_STEPS:
        parser.error(f"expected at least one pair and more than {WARM_STEPS} steps")
    workload = WORKLOADS["dense-4x256"]
    builds = {"base": arguments.base, "new": arguments.new}
    seconds_per_token = {build: [] for build in builds}
    with tempfile.TemporaryDirectory() as folder:
        rows_path = pathlib.Path(folder, "rows.jsonl")
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in workload.data(arguments.steps)))
        for pair in range(arguments.pairs):
            for build in builds if pair % 2 == 0 else reversed(builds):
                rate = ours.train(builds[build], workload, rows_path, arguments.steps, seed=1)["tokensPerSecond"]
                seconds_per_token[build].append(1 / rate)
                print(f"pair {pair + 1} {build}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    ratio = statistics.median(seconds_per_token["new"]) / statistics.median(seconds_per_token["base"])
    pairs = [new / base for base, new in zip(seconds_per_token["base"], seconds_per_token["new"])]
    print(f"The new build needs {ratio:.3f} times the base build's time for a token (medians of {arguments.pairs} runs each; "
          f"pair by pair {min(pairs):.3f} to {max(pairs):.3f}).")
    if ratio > MOST:
        sys.exit(f"It is slower by {(ratio - 1) * 100:.0f} %, at most {(MOST - 1) * 100:.0f} % is allowed. Find out where with "
                 "`finetune-trainer profile FILE` on both builds, or run again if the machine was busy.")
    print(f"At most {MOST:.2f} is allowed: passed.")


if __name__ == "__main__":
    main()
