"""Measures the trainer beside bare transformers + PEFT and beside TRL's SFTTrainer: same model, same rows, same precision,
one program after the other in one run, in alternating order.

Usage: bench.py [TRAINER] [--rounds N] [--steps N] [--workload NAME ...] [--print-only]

Per workload it prints, writes to tests/bench/results/<workload>.json, and puts into docs/benchmarks.md and docs/benchmarks.svg:
  tokens/s   useful tokens (padding is never counted) over the seconds of all steps after the second, medians over the rounds;
             where rows are answered the new tokens, end tokens included, over the seconds of all answers, prompts included
  peak       peak resident memory of the process
  start      seconds from process start to the end of the first step, less that step's own time
Without TRAINER it only puts the results that are there into page and chart.

What each program does, in which dtype, stands in peers.py, the workloads in workloads.py. All programs of a round draw the order
of the rows from the same seed, each in its own way; each round has another. A run ends with an error if the programs do not
count the same tokens in the rows, the same that the loss is on, and the same in prompts. Answers in bf16 may part where two
tokens are about equally likely: the new tokens of two programs may differ by 5 %, and the share of equal answers is told. Run it
on a quiet machine: OpenMP collapses beside a busy process. On chat-mixed TRL may need up to 18 GB for a step of four long rows
(extrapolated from packs of 1,500 tokens).
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import ours
import page
from machine import processor
from peers import RANK, WARM_STEPS
from workloads import WORKLOADS

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
# What need not work everywhere: null in the results where it does not.
OPTIONAL_PEER = "peft-compile"
# New tokens of one program may be so many times another's.
MOST_TOKENS = 1.05


def run_peer(name, workload, rows_path, steps, seed, scratch):
    """What the peer printed; None where torch.compile does not work, after saying so."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                   "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    command = [sys.executable, str(HERE / "peers.py"), "--peer", name, "--workload", workload, "--rows", str(rows_path),
               "--steps", str(steps), "--seed", str(seed), "--started", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    if name != OPTIONAL_PEER:
        sys.exit(f"{name} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    print(f"{name} does not work here and is recorded as null: {reason}", flush=True)
    return None


def check_equal_work(workload, runs):
    """Ends the run if programs disagree on the tokens of the rows, on those that the loss is on, or on those of the answers."""
    for key, most in (("datasetTokens", 1), ("trainedTokens", 1), ("promptTokens", 1), ("generatedTokens", MOST_TOKENS)):
        counts = {name: values[0][key] for name, values in runs.items() if values and key in values[0]}
        if counts and max(counts.values()) > most * min(counts.values()):
            sys.exit(f"{workload}: the programs do not do the same work, {key} is {counts}")


def equal_answers(answers):
    """By peer: the share of rows that it and the trainer answered with the same text."""
    ours = answers.pop("ours")
    return {peer: sum(map(str.__eq__, ours, theirs)) / len(ours) for peer, theirs in answers.items()}


def commit():
    """What was measured: the checkout's commit, and whether it has changes that are not in it."""
    git = lambda *arguments: subprocess.run(["git", "-C", str(HERE), *arguments], check=True, capture_output=True, text=True).stdout
    return git("rev-parse", "HEAD").strip() + (" with changes" if git("status", "--porcelain", "--", ":/trainer") else "")


def medians(values):
    return {key: statistics.median(run[key] for run in values) for key in values[0]}


def peer(name, workload):
    """A peer as `alternate` wants it."""
    return lambda rows_path, steps, seed, scratch: run_peer(name, workload, rows_path, steps, seed, scratch)


def alternate(name, programs, rounds, steps):
    """Runs all programs of a workload `rounds` times, in alternating order. `programs` by name: from the rows' path, steps, seed
    and a scratch folder to numbers, or to None where it does not work. Returns, by program, what it measured in every round, and
    its last answers, where rows were answered."""
    runs, answers = {program: [] for program in programs}, {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        rows_path = scratch / "rows.jsonl"
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in WORKLOADS[name].data(steps)))
        for turn in range(rounds):
            for program in programs if turn % 2 == 0 else reversed(programs):
                if runs[program] is None:
                    continue
                values = programs[program](rows_path, steps, turn + 1, scratch)
                if values is None:
                    runs[program] = None
                    continue
                if "answers" in values:
                    answers[program] = values.pop("answers")
                runs[program].append(values)
                print(f"  {name} round {turn + 1} {program}: {values['tokensPerSecond']:.1f} tokens/s", file=sys.stderr, flush=True)
            if turn == 0:
                check_equal_work(name, runs)
    return runs, answers


def record(name, runs, rounds, steps):
    """What was measured and where, without comparisons."""
    workload = WORKLOADS[name]
    method = {"LoRA": f"LoRA rank {RANK}, ", "Full": "full fine-tuning, ", "Generate": ""}[workload.method]
    length = "" if workload.method == "Generate" else f", {steps} steps"
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft", "trl")}
    return {"workload": f"{name}: {workload.precision.lower()}, {method}{workload.description}{length}", "rounds": rounds,
            "commit": commit(), "cores": os.cpu_count(), "processor": processor(), "versions": versions,
            "median": {program: medians(values) if values else None for program, values in runs.items()}}


def compare(ours, theirs):
    return {key: ours[key] / theirs[key] for key in theirs}


def measure(trainer, name, rounds, steps):
    """Runs all programs of a workload `rounds` times and returns the result that is written."""
    workload = WORKLOADS[name]
    ours_on_it = lambda rows_path, steps, seed, scratch: ours.run(trainer, workload, rows_path, steps, seed)
    runs, answers = alternate(name, {"ours": ours_on_it, **{other: peer(other, name) for other in workload.peers}}, rounds, steps)
    result = record(name, runs, rounds, steps)
    median = result["median"]
    against = {other: compare(median["ours"], median[other]) if median[other] else None for other in workload.peers}
    return {**result, "oursAgainst": against, **({"equalAnswers": equal_answers(answers)} if answers else {}), "runs": runs}


def print_result(result):
    print(f"\n{result['workload']}, {result['rounds']} rounds")
    print(f"{'':22}{'tokens/s':>10}{'range':>16}{'peak MiB':>10}{'start s':>9}{'first step s':>14}")
    for program, values in result["median"].items():
        if values is None:
            print(f"{program:22}{'-':>10}")
            continue
        rates = [run["tokensPerSecond"] for run in result["runs"][program]]
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        print(f"{program:22}{values['tokensPerSecond']:10.1f}{spread:>16}{values['peakBytes'] / 2**20:10.0f}"
              + (f"{values['startSeconds']:9.2f}{values['firstStepSeconds']:14.2f}" if "startSeconds" in values else ""))
    for peer, ratio in result["oursAgainst"].items():
        if ratio:
            print(f"ours against {peer}: {ratio['tokensPerSecond']:.2f}x the speed, {ratio['peakBytes']:.2f}x the memory")
    for peer, share in result.get("equalAnswers", {}).items():
        print(f"answers that {peer} gave, too: {share:.0%}; new tokens {result['median']['ours']['generatedTokens']} against "
              f"{result['median'][peer]['generatedTokens']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a run, more than {WARM_STEPS}; by default the workload's")
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--print-only", action="store_true", help="write neither results nor page nor chart")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps is not None and arguments.steps <= WARM_STEPS:
        parser.error(f"expected at least one round and more than {WARM_STEPS} steps")
    for name in arguments.workload if arguments.trainer else ():
        result = measure(arguments.trainer, name, arguments.rounds, arguments.steps or WORKLOADS[name].steps)
        print_result(result)
        if not arguments.print_only:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.print_only:
        page.write(page.read_results())


if __name__ == "__main__":
    main()
