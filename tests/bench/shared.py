"""What two trainers do that share the cores, each with a thread for every one of them.

Usage: shared.py TRAINER [--steps N] [--spins N ...]

Trains dense-4x256 twice at once and prints the tokens/s of either, with libgomp's default of turns that a thread spins while it
waits and with each number of --spins as GOMP_SPINCOUNT; beside it what one trainer does alone.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import tempfile

import ours
from peers import WARM_STEPS
from workloads import WORKLOADS

WORKLOAD = WORKLOADS["dense-4x256"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer")
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps of a run, more than {WARM_STEPS}")
    parser.add_argument("--spins", type=int, nargs="*", default=[1000])
    arguments = parser.parse_args()
    if arguments.steps <= WARM_STEPS:
        parser.error(f"expected more than {WARM_STEPS} steps")
    with tempfile.TemporaryDirectory() as folder:
        rows_path = pathlib.Path(folder, "rows.jsonl")
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in WORKLOAD.data(arguments.steps)))
        rate = lambda seed: ours.train(arguments.trainer, WORKLOAD, rows_path, arguments.steps, seed)["tokensPerSecond"]
        for spins in [None, *arguments.spins]:
            os.environ.pop("GOMP_SPINCOUNT", None)
            if spins is not None:
                os.environ["GOMP_SPINCOUNT"] = str(spins)
            alone = rate(1)
            with concurrent.futures.ThreadPoolExecutor() as both:
                first, second = both.map(rate, (1, 2))
            print(f"GOMP_SPINCOUNT {'not set' if spins is None else spins}: alone {alone:.0f} tokens/s, two at once {first:.0f} and {second:.0f}", flush=True)


if __name__ == "__main__":
    main()
