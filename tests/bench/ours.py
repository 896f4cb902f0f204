"""Runs the trainer on a workload and reads what it measured of itself from its run folder."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from peers import ALPHA, LEARNING_RATES, RANK, WARM_STEPS
from workloads import MODEL


def job(workload, rows_path, steps, seed, full, hyperparameters):
    """The FineTuneJob of a run. bf16 means bf16 copies of fp32 masters, for adapters as for all weights."""
    method = {"type": workload.method}
    if workload.method == "LoRA":
        method["lora"] = {"rank": RANK, "alpha": ALPHA}
    if full:
        method["full"] = full
    return {
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"},
        "spec": {
            "model": {"uri": f"file://{MODEL}"}, "dataset": {"train": {"uri": f"file://{rows_path}"}}, "method": method,
            "hyperparameters": {"maxSteps": steps, "batchSize": workload.batch, "maxSequenceLength": workload.longest, "seed": seed,
                                "learningRate": str(LEARNING_RATES[workload.method]), "precision": workload.precision,
                                **hyperparameters}},
    }


def train(trainer, workload, rows_path, steps, seed, full=None, **hyperparameters):
    """Trains and returns the same numbers as a peer prints; seconds of a step are those of metrics.jsonl, the peak is that of the
    whole process, saving and output included. `full` is the job's method.full; `hyperparameters` are others than the workload's."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # JSON is YAML.
        (folder / "job.yaml").write_text(json.dumps(job(workload, rows_path, steps, seed, full, hyperparameters)))
        run = folder / "run"
        with open(folder / "messages", "w+") as messages:
            started = time.time()
            process = subprocess.Popen([trainer, "run", str(folder / "job.yaml"), "--dir", str(run)], stdout=subprocess.DEVNULL,
                                       stderr=messages)
            metrics, first_end = run / "metrics.jsonl", None
            while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                if first_end is None and metrics.exists() and metrics.stat().st_size > 0:
                    first_end = time.time()
                time.sleep(0.01)
            _, status, usage = ended
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                messages.seek(0)
                sys.exit(f"{trainer} ended with {process.returncode}:\n{messages.read()[-2000:]}")
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        report = json.loads((run / "report.json").read_text())
    records = [record for record in records if "loss" in record]
    tokens = records[-1]["input_tokens"] - records[WARM_STEPS - 1]["input_tokens"]
    return {
        "tokensPerSecond": tokens / sum(record["seconds"] for record in records[WARM_STEPS:]),
        "peakBytes": usage.ru_maxrss * 1024,
        "startSeconds": first_end - started - records[0]["seconds"],
        "firstStepSeconds": records[0]["seconds"],
        "datasetTokens": report["data"]["tokens"],
        "trainedTokens": report["data"]["trainedTokens"],
    }
