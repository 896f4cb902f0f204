"""Measures the trainer beside bare transformers + PEFT and beside TRL's SFTTrainer, on the same rows, in alternating order.

Usage: bench.py TRAINER [--rounds N] [--steps N] [--out FILE]

Prints tokens per second (useful tokens: padding is never counted; median over the steps after the second), peak resident
memory, and seconds from process start to the end of the first step less that step; each a median over rounds with its
range. Run it on a quiet machine: OpenMP collapses beside a busy process.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models/SmolLM2-135M-Instruct"
RANK, BATCH, LENGTH = 8, 4, 256


def dense_rows(count):
    """Text rows of exactly LENGTH tokens, the end token included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rng = random.Random(5)
    words = [" river", " stone", " light", " garden", " paper", " winter", " engine", " market", " bridge", " morning"]
    rows = []
    while len(rows) < count:
        text = "".join(rng.choice(words) for _ in range(LENGTH - 1))
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == LENGTH - 1:
            rows.append({"text": text})
    return rows


def report(started, step_seconds, step_tokens, first_step_end):
    later = [tokens / seconds for tokens, seconds in list(zip(step_tokens, step_seconds))[2:]]
    print(json.dumps({
        "tokensPerSecond": statistics.median(later),
        "peakBytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "startSeconds": first_step_end - started - step_seconds[0],
    }))


def peft_loop(rows_path, steps, started):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [json.loads(line)["text"] for line in open(rows_path)]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    model.train()
    seconds, tokens, first = [], [], None
    for step in range(steps):
        began = time.time()
        texts = rows[step * BATCH:(step + 1) * BATCH]
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.time() - began)
        tokens.append(ids.numel())
        first = first or time.time()
    report(started, seconds, tokens, first)


def trl_trainer(rows_path, steps, started):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in open(rows_path)]
    seconds, first, began = [], [], [None]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            began[0] = time.time()

        def on_step_end(self, *_, **__):
            seconds.append(time.time() - began[0])
            first.append(time.time())

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, max_length=LENGTH, use_cpu=True,
                           bf16=False, report_to=[], save_strategy="no", logging_steps=1000, model_init_kwargs={"dtype": "float32"})
        trainer = SFTTrainer(model=str(MODEL), args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
                             peft_config=LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainer.train()
    report(started, seconds, [BATCH * LENGTH] * len(seconds), first[0])


def ours(trainer, rows_path, steps):
    with tempfile.TemporaryDirectory() as folder:
        job = pathlib.Path(folder, "job.yaml")
        job.write_text(
            "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bench}\nspec:\n"
            f"  model: {{uri: file://{MODEL}}}\n  dataset: {{train: {{uri: file://{rows_path}}}}}\n"
            f"  method: {{type: LoRA, lora: {{rank: {RANK}, alpha: 16}}}}\n"
            f"  hyperparameters: {{maxSteps: {steps}, batchSize: {BATCH}, precision: FP32}}\n"
        )
        run = pathlib.Path(folder, "run")
        started = time.time()
        process = subprocess.Popen([trainer, "run", str(job), "--dir", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics, first = run / "metrics.jsonl", None
        while process.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size > 0:
                first = time.time()
            time.sleep(0.02)
        assert process.returncode == 0, f"the trainer ended with {process.returncode}"
        records = [json.loads(line) for line in metrics.read_text().splitlines() if '"loss"' in line]
        peak = json.loads((run / "report.json").read_text())["plan"]["measuredPeak"]
    rates = [BATCH * LENGTH / record["seconds"] for record in records[2:]]
    return {"tokensPerSecond": statistics.median(rates), "peakBytes": peak, "startSeconds": first - started - records[0]["seconds"]}


def peer(name, rows_path, steps):
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--peer", name, "--rows", str(rows_path), "--steps", str(steps), "--started", str(time.time())]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("trainer", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default=str(REPOSITORY / "tests/bench/results/cpu-fp32-dense-4x256.json"))
    parser.add_argument("--peer", choices=("peft", "trl"))
    parser.add_argument("--rows")
    parser.add_argument("--started", type=float)
    arguments = parser.parse_args()
    if arguments.peer:
        {"peft": peft_loop, "trl": trl_trainer}[arguments.peer](arguments.rows, arguments.steps, arguments.started)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows_path = pathlib.Path(folder, "rows.jsonl")
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in dense_rows(BATCH * arguments.steps)))
        results = {"ours": [], "peft": [], "trl": []}
        for _ in range(arguments.rounds):
            results["ours"].append(ours(arguments.trainer, rows_path, arguments.steps))
            for name in ("peft", "trl"):
                results[name].append(peer(name, rows_path, arguments.steps))
    summary = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()}
    pathlib.Path(arguments.out).write_text(json.dumps({
        "workload": f"fp32 LoRA rank {RANK}, {BATCH}x{LENGTH} dense tokens a step", "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(), "median": summary, "runs": results}, indent=1) + "\n")
    print(f"{'':8}{'tokens/s':>10}{'peak MiB':>10}{'start s':>9}")
    for name, values in summary.items():
        print(f"{name:8}{values['tokensPerSecond']:10.1f}{values['peakBytes'] / 2**20:10.0f}{values['startSeconds']:9.2f}")
    for name in ("peft", "trl"):
        speed = summary["ours"]["tokensPerSecond"] / summary[name]["tokensPerSecond"]
        memory = summary["ours"]["peakBytes"] / summary[name]["peakBytes"]
        print(f"ours against {name}: {speed:.2f}x the speed, {memory:.2f}x the memory")


if __name__ == "__main__":
    main()
