"""Measures the trainer beside bare transformers + PEFT and beside TRL's SFTTrainer: same model, same rows, same precision,
alternating order in one run.

Usage: bench.py TRAINER [--rounds N] [--steps N] [--workload NAME ...]

Per workload it prints, writes to tests/bench/results/<workload>.json, and puts into docs/benchmarks.md:
  tokens/s   useful tokens (padding is never counted) over all steps after the second, medians over the rounds
  peak       peak resident memory of the process
  start      seconds from process start to the end of the first step, less that step's own time

All train bf16 weights with LoRA rank 8 on every linear layer and fp32 optimizer state. PEFT and TRL compute the adapters in
fp32, their default; ours computes them in bf16 copies of fp32 masters. TRL runs with its defaults but for gradient
checkpointing, which is off: it is on by default and would slow TRL by a third. Run it on a quiet machine: OpenMP collapses
beside a busy process.
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
RESULTS = REPOSITORY / "tests/bench/results"
MODEL = REPOSITORY / "models/SmolLM2-135M-Instruct"
DEMO_ROWS = REPOSITORY / "crds/examples/demo/train.jsonl"
RANK, ALPHA, LEARNING_RATE = 8, 16, 2e-4
WARM_STEPS = 2
PEERS = ("peft", "trl")


def dense_rows(count, length):
    """Text rows of exactly `length` tokens, the end token included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rng = random.Random(5)
    words = [" river", " stone", " light", " garden", " paper", " winter", " engine", " market", " bridge", " morning"]
    rows = []
    while len(rows) < count:
        text = "".join(rng.choice(words) for _ in range(length - 1))
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == length - 1:
            rows.append({"text": text})
    return rows


def demo_rows(count):
    """The first conversations of the demo's training rows."""
    return [json.loads(line) for line in DEMO_ROWS.read_text().splitlines()[:count]]


# name: (rows of `count`, examples a step, longest row)
WORKLOADS = {
    "dense-4x256": (lambda count: dense_rows(count, 256), 4, 256),
    "demo-rows": (demo_rows, 16, 256),
}


def report(started, step_seconds, step_tokens, first_step_end):
    print(json.dumps({
        "tokensPerSecond": sum(step_tokens[WARM_STEPS:]) / sum(step_seconds[WARM_STEPS:]),
        "peakBytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "startSeconds": first_step_end - started - step_seconds[0],
    }))


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def peft_loop(rows, batch, steps, started):
    """A plain loop: rows padded to the longest of their step, as everybody writes it."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16), lora_config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model.train()

    def encode(row):
        if "text" in row:
            return tokenizer(row["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    seconds, tokens, first = [], [], None
    for step in range(steps):
        began = time.time()
        examples = [encode(row) for row in rows[step * batch:(step + 1) * batch]]
        longest = max(map(len, examples))
        ids = torch.tensor([example + [tokenizer.pad_token_id] * (longest - len(example)) for example in examples])
        mask = torch.tensor([[1] * len(example) + [0] * (longest - len(example)) for example in examples])
        padded = bool((mask == 0).any())
        loss = model(input_ids=ids, attention_mask=mask if padded else None, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.time() - began)
        tokens.append(int(mask.sum()))
        first = first or time.time()
    report(started, seconds, tokens, first)


def trl_trainer(rows, batch, longest, steps, started):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seconds, first, began, tokens = [], [], [None], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            began[0] = time.time()

        def on_step_end(self, *_, **__):
            seconds.append(time.time() - began[0])
            first.append(time.time())

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *arguments, **keywords):
            tokens.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *arguments, **keywords)

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, max_length=longest, use_cpu=True,
                           bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1000,
                           learning_rate=LEARNING_RATE, disable_tqdm=True, model_init_kwargs={"dtype": "bfloat16"})
        trainer = Counting(model=str(MODEL), args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
                           peft_config=lora_config())
        trainer.train()
    report(started, seconds, tokens, first[0])


def ours(trainer, rows_path, batch, longest, steps):
    with tempfile.TemporaryDirectory() as folder:
        job = pathlib.Path(folder, "job.yaml")
        job.write_text(
            "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bench}\nspec:\n"
            f"  model: {{uri: file://{MODEL}}}\n  dataset: {{train: {{uri: file://{rows_path}}}}}\n"
            f"  method: {{type: LoRA, lora: {{rank: {RANK}, alpha: {ALPHA}}}}}\n"
            f"  hyperparameters: {{maxSteps: {steps}, batchSize: {batch}, maxSequenceLength: {longest}, learningRate: \"{LEARNING_RATE}\", precision: BF16}}\n"
        )
        run = pathlib.Path(folder, "run")
        started = time.time()
        process = subprocess.Popen([trainer, "run", str(job), "--dir", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics, first = run / "metrics.jsonl", None
        while process.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size > 0:
                first = time.time()
            time.sleep(0.01)
        assert process.returncode == 0, f"the trainer ended with {process.returncode}"
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        records = [record for record in records if "loss" in record]
        peak = json.loads((run / "report.json").read_text())["plan"]["measuredPeak"]
    tokens = records[-1]["input_tokens"] - records[WARM_STEPS - 1]["input_tokens"]
    rate = tokens / sum(record["seconds"] for record in records[WARM_STEPS:])
    return {"tokensPerSecond": rate, "peakBytes": peak, "startSeconds": first - started - records[0]["seconds"]}


def peer(name, rows_path, workload, steps):
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--peer", name, "--rows", str(rows_path), "--workload", workload, "--steps", str(steps),
               "--started", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def measure(trainer, workload, rounds, steps):
    make_rows, batch, longest = WORKLOADS[workload]
    runs = {name: [] for name in ("ours", *PEERS)}
    with tempfile.TemporaryDirectory() as folder:
        rows_path = pathlib.Path(folder, "rows.jsonl")
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(batch * steps)))
        for turn in range(rounds):
            for name in (list(runs) if turn % 2 == 0 else reversed(list(runs))):
                values = ours(trainer, rows_path, batch, longest, steps) if name == "ours" else peer(name, rows_path, workload, steps)
                runs[name].append(values)
                print(f"  {workload} round {turn + 1} {name}: {values['tokensPerSecond']:.1f} tokens/s", file=sys.stderr, flush=True)
    median = {name: {key: statistics.median(run[key] for run in values) for key in values[0]} for name, values in runs.items()}
    ratios = {name: {key: median["ours"][key] / median[name][key] for key in median[name]} for name in PEERS}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{workload}.json").write_text(json.dumps({
        "workload": f"{workload}: bf16, LoRA rank {RANK}, {batch} examples a step, {steps} steps", "rounds": rounds,
        "cores": os.cpu_count(), "processor": processor(), "median": median, "oursAgainst": ratios, "runs": runs}, indent=1) + "\n")
    print(f"\n{workload} ({batch} examples a step, {steps} steps, {rounds} rounds)")
    print(f"{'':8}{'tokens/s':>10}{'range':>16}{'peak MiB':>10}{'start s':>9}")
    for name, values in median.items():
        rates = [run["tokensPerSecond"] for run in runs[name]]
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        print(f"{name:8}{values['tokensPerSecond']:10.1f}{spread:>16}{values['peakBytes'] / 2**20:10.0f}{values['startSeconds']:9.2f}")
    for name in PEERS:
        print(f"ours against {name}: {ratios[name]['tokensPerSecond']:.2f}x the speed, {ratios[name]['peakBytes']:.2f}x the memory")


def write_page():
    """Puts the results that are there into docs/benchmarks.md, between its two marks."""
    lines = ["| workload | | tokens/s (range) | peak memory | start | ours against it: speed, memory |", "|---|---|---|---|---|---|"]
    for name in WORKLOADS:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        for program, values in result["median"].items():
            rates = [run["tokensPerSecond"] for run in result["runs"][program]]
            ratio = result["oursAgainst"].get(program)
            against = f"{ratio['tokensPerSecond']:.2f}×, {ratio['peakBytes']:.2f}×" if ratio else ""
            lines.append(f"| {name if program == 'ours' else ''} | {program} | {values['tokensPerSecond']:.0f} ({min(rates):.0f}–{max(rates):.0f}) | "
                         f"{values['peakBytes'] / 2**20:.0f} MiB | {values['startSeconds']:.2f} s | {against} |")
        machine = f"Measured on {result['cores']} cores of an {result['processor']}, medians of {result['rounds']} rounds."
    page = REPOSITORY / "docs/benchmarks.md"
    before, rest = page.read_text().split("<!-- results -->")
    after = rest.split("<!-- end of results -->")[1]
    page.write_text(before + "<!-- results -->\n" + "\n".join(lines) + f"\n\n{machine}\n<!-- end of results -->" + after)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.peer:
        for workload in arguments.workload:
            measure(arguments.trainer, workload, arguments.rounds, arguments.steps)
        write_page()
        return
    rows = [json.loads(line) for line in pathlib.Path(arguments.rows).read_text().splitlines()]
    _, batch, longest = WORKLOADS[arguments.workload[0]]
    if arguments.peer == "peft":
        peft_loop(rows, batch, arguments.steps, arguments.started)
    else:
        trl_trainer(rows, batch, longest, arguments.steps, arguments.started)


if __name__ == "__main__":
    main()
