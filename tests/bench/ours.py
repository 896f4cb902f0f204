"""Runs the trainer on a workload and reads what it measured of itself from its run folder."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from peers import ALPHA, LEARNING_RATES, RANK, WARM_STEPS
from workloads import DEMO_ROWS, MODEL


def training_job(workload, rows_path, steps, seed, full, hyperparameters):
    """The FineTuneJob of a run. bf16 means bf16 copies of fp32 masters, for adapters as for all weights."""
    method = {"type": workload.method}
    if workload.method == "LoRA":
        method["lora"] = {"rank": RANK, "alpha": ALPHA}
    if full:
        method["full"] = full
    return job({
        "dataset": {"train": {"uri": f"file://{rows_path}"}}, "method": method,
        "hyperparameters": {"maxSteps": steps, "batchSize": workload.batch, "maxSequenceLength": workload.longest, "seed": seed,
                            "learningRate": str(LEARNING_RATES[workload.method]), "precision": workload.precision, **hyperparameters},
    })


def answering_job(workload, rows_path, seed):
    """The FineTuneJob whose validation has the rows answered by the base model. A job trains, so this one does so for a step of
    one row; its tuned model is asked before the base model."""
    return job({
        "dataset": {"train": {"uri": f"file://{DEMO_ROWS}"}, "validation": {"uri": f"file://{rows_path}"}},
        "method": {"type": "LoRA", "lora": {"rank": RANK, "alpha": ALPHA}},
        "hyperparameters": {"maxSteps": 1, "batchSize": 1, "maxSequenceLength": workload.longest, "seed": seed,
                            "precision": workload.precision},
        "validation": {"baselines": {"zeroShot": True, "fewShot": {"examples": 0}}},
    })


def job(spec):
    return {
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"},
        "spec": {"model": {"uri": f"file://{MODEL}"}, **spec},
    }


def execute(trainer, job, folder):
    """Runs a job below `folder`; returns its run folder, when it began, when its first step had ended, and the peak resident
    memory of the whole process in bytes, saving and output included."""
    # JSON is YAML.
    (folder / "job.yaml").write_text(json.dumps(job))
    run = folder / "run"
    with open(folder / "messages", "w+") as messages:
        started = time.time()
        process = subprocess.Popen([trainer, "run", str(folder / "job.yaml"), "--dir", str(run)], stdout=subprocess.DEVNULL,
                                   stderr=messages)
        metrics, first_end = run / "metrics.jsonl", None
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            if first_end is None and metrics.exists() and metrics.stat().st_size > 0:
                first_end = time.time()
            # What is seen late counts as our start; peers take their own time.
            time.sleep(0.002 if first_end is None else 0.01)
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            messages.seek(0)
            sys.exit(f"{trainer} ended with {process.returncode}:\n{messages.read()[-2000:]}")
    return run, started, first_end, usage.ru_maxrss * 1024


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(trainer, workload, rows_path, steps, seed, full=None, **hyperparameters):
    """Trains and returns the same numbers as a peer prints; seconds of a step are those of metrics.jsonl. `full` is the job's
    method.full; `hyperparameters` are others than the workload's."""
    with tempfile.TemporaryDirectory() as name:
        job = training_job(workload, rows_path, steps, seed, full, hyperparameters)
        run, started, first_end, peak = execute(trainer, job, pathlib.Path(name))
        records, report = lines(run / "metrics.jsonl"), json.loads((run / "report.json").read_text())
    records = [record for record in records if "loss" in record]
    tokens = records[-1]["input_tokens"] - records[WARM_STEPS - 1]["input_tokens"]
    return {
        "tokensPerSecond": tokens / sum(record["seconds"] for record in records[WARM_STEPS:]),
        "peakBytes": peak,
        "startSeconds": first_end - started - records[0]["seconds"],
        "firstStepSeconds": records[0]["seconds"],
        "datasetTokens": report["data"]["tokens"],
        "trainedTokens": report["data"]["trainedTokens"],
    }


def generate(trainer, workload, rows_path, seed):
    """Has the rows answered and returns the same numbers as transformers-generate prints; tokens and seconds are the report's."""
    with tempfile.TemporaryDirectory() as name:
        run, _, _, peak = execute(trainer, answering_job(workload, rows_path, seed), pathlib.Path(name))
        report, answers = json.loads((run / "report.json").read_text()), lines(run / "answers.jsonl")
        asked = json.loads((run / "prepared/generation.json").read_text())
    generated = report["validation"]["generation"]["zeroShot"]
    return {
        "tokensPerSecond": generated["tokens"] / generated["seconds"],
        "peakBytes": peak,
        "promptTokens": sum(len(row["prompt"]) for row in asked),
        "generatedTokens": generated["tokens"],
        "answers": [row["zeroShot"]["text"] for row in answers],
    }


def run(trainer, workload, rows_path, steps, seed):
    """What the workload's method asks for."""
    if workload.method == "Generate":
        return generate(trainer, workload, rows_path, seed)
    return train(trainer, workload, rows_path, steps, seed)
