"""Full fine-tuning's memory and speed, rung by rung: TRL, and the trainer with each option that takes less memory.

Usage: ladder.py [TRAINER] [--rounds N] [--steps N] [--print-only]

All train full-4x256 (workloads.py), one program after the other in one run, in alternating order:
  trl, trl-mixed   as in bench.py; all about them stands in peers.py
  AdamW            the trainer as in bench.py: fp32 masters, gradients and moments, bf16 copies
  in backward      method.full.optimizerInBackward; gradients are not clipped, which it cannot do
  8 bits           hyperparameters.optimizer: AdamW8Bit
  both             the two together
Prints a table, writes tests/bench/results/ladder.json, and puts the table into docs/benchmarks.md. Without TRAINER it only puts
the results that are there into the page.
"""

import argparse
import json

import ours
import page
from bench import RESULTS, alternate, compare, peer, record
from peers import WARM_STEPS
from workloads import WORKLOADS

WORKLOAD = "full-4x256"
PEERS = ("trl", "trl-mixed")
IN_BACKWARD = {"full": {"optimizerInBackward": True}, "maxGradNorm": "0"}
EIGHT_BITS = {"optimizer": "AdamW8Bit"}
RUNGS = {"AdamW": {}, "in backward": IN_BACKWARD, "8 bits": EIGHT_BITS, "both": {**IN_BACKWARD, **EIGHT_BITS}}
RESULT = RESULTS / "ladder.json"


def measure(trainer, rounds, steps):
    def rung(options):
        return lambda rows_path, steps, seed, scratch: ours.train(trainer, WORKLOADS[WORKLOAD], rows_path, steps, seed, **options)

    programs = {**{name: peer(name, WORKLOAD) for name in PEERS}, **{name: rung(options) for name, options in RUNGS.items()}}
    runs, _ = alternate(WORKLOAD, programs, rounds, steps)
    result = record(WORKLOAD, runs, rounds, steps)
    against = {name: {rung: compare(result["median"][rung], result["median"][name]) for rung in RUNGS} for name in PEERS}
    return {**result, "whole": "AdamW", "against": against, "runs": runs}


def print_result(result):
    print(f"\n{result['workload']}, {result['rounds']} rounds")
    print(f"{'':14}{'tokens/s':>10}{'peak MiB':>10}" + "".join(f"{'against ' + name:>22}" for name in PEERS))
    for program, values in result["median"].items():
        ratios = [result["against"][name].get(program) for name in PEERS]
        cells = [f"{ratio['tokensPerSecond']:.2f}x speed, {ratio['peakBytes']:.2f}x" if ratio else "" for ratio in ratios]
        print(f"{program:14}{values['tokensPerSecond']:10.1f}{values['peakBytes'] / 2**20:10.0f}" + "".join(f"{cell:>22}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=WORKLOADS[WORKLOAD].steps, help=f"optimizer steps of a run, more than {WARM_STEPS}")
    parser.add_argument("--print-only", action="store_true", help="write neither results nor page")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps <= WARM_STEPS:
        parser.error(f"expected at least one round and more than {WARM_STEPS} steps")
    if arguments.trainer:
        result = measure(arguments.trainer, arguments.rounds, arguments.steps)
        print_result(result)
        if not arguments.print_only:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.print_only:
        page.write_ladder(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
