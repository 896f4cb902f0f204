"""The programs that the trainer is measured beside, each a process of its own that prints one line of JSON.

All but the last train SmolLM2-135M-Instruct with AdamW and clip the gradient's norm to 1.
  peft          a plain loop over transformers + PEFT. Rows are sorted by length and cut into batches of about as many tokens,
                padding included, as the trainer's steps have; the batches are shuffled.
  peft-compile  the same behind torch.compile, which compiles in the first step.
  trl           TRL's SFTTrainer with its defaults: rows in random order, padded to the longest of their batch.
  trl-packed    the same with packing=True. Without FlashAttention, which has no CPU version, the rows of a pack are kept
                apart by a mask over the whole pack. A pack is as long as the longest row; a step has as many packs as come
                nearest to the tokens of the trainer's steps, one pack after the other, since attention over one is cheaper
                than over several at once.
  transformers  the loop of peft without PEFT: all weights are trained.
  trl-mixed     TRL without PEFT with fp32 weights and its default bf16=True: matrix products in bf16 by autocast.
  transformers-generate
                trains nothing: transformers' `generate` answers the last turn of every conversation, greedily, with its default
                attention (SDPA) and its default cache. Prompts are sorted by length and answered in batches, padded on the left;
                a batch goes on until the last of its answers has ended. Of several batch sizes the fastest is the workload's.

Where rows are conversations, the loss is on the assistant's turns alone, end token included, in every program: for TRL by
assistant_only_loss=True, which is off by default, and a template with the generation marks that it needs. Gradient
checkpointing is off: it is TRL's default and would slow it by a third.

Dtypes. BF16: weights and activations bf16; PEFT's adapters, their gradients and moments fp32, its default. Full fine-tuning
by transformers and trl has bf16 weights, gradients and moments and no fp32 masters, which is less work and memory than the
trainer's; trl-mixed has fp32 weights, gradients and moments, as the trainer has. FP32: everything in fp32.
"""

import argparse
import json
import pathlib
import random
import resource
import tempfile
import time

from workloads import MODEL, WORKLOADS

RANK, ALPHA = 8, 16
LEARNING_RATES = {"LoRA": 2e-4, "Full": 2e-5}
WARM_STEPS = 2
PEERS = ("peft", "peft-compile", "trl", "trl-packed", "transformers", "trl-mixed", "transformers-generate")
# SmolLM2's template with the assistant's turns marked; every conversation here begins with a system turn.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}"
)


def peak_bytes():
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Seconds and useful tokens of each step."""

    def __init__(self, started):
        self.started, self.seconds, self.tokens, self.first_end = started, [], [], None

    def begin(self):
        self.tokens.append(0)
        self.began = time.time()

    def end(self):
        now = time.time()
        self.seconds.append(now - self.began)
        self.first_end = self.first_end or now

    def report(self, dataset_tokens, trained_tokens):
        """Prints what bench.py reads."""
        print(json.dumps({
            "tokensPerSecond": sum(self.tokens[WARM_STEPS:]) / sum(self.seconds[WARM_STEPS:]),
            "peakBytes": peak_bytes(),
            "startSeconds": self.first_end - self.started - self.seconds[0],
            "firstStepSeconds": self.seconds[0],
            "datasetTokens": dataset_tokens,
            "trainedTokens": trained_tokens,
        }))


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def encode(tokenizer, row):
    """Tokens of a row, and labels: -100 where no loss is taken."""
    if "text" in row:
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return ids, ids
    whole = tokenizer.apply_chat_template(row["messages"], chat_template=TEMPLATE, return_dict=True,
                                          return_assistant_tokens_mask=True)
    ids, answered = whole["input_ids"], whole["assistant_masks"]
    return ids, [token if trained else -100 for token, trained in zip(ids, answered)]


def batches_by_length(examples, rows_per_step, seed):
    """Examples of similar length together, at most as many tokens in a batch, padding included, as `rows_per_step` examples
    have on average; a longer example is a batch by itself. In random order."""
    most_tokens = rows_per_step * sum(len(ids) for ids, _ in examples) / len(examples)
    batches = [[]]
    for example in sorted(examples, key=lambda example: len(example[0])):
        if batches[-1] and (len(batches[-1]) + 1) * len(example[0]) > most_tokens:
            batches.append([])
        batches[-1].append(example)
    random.Random(seed).shuffle(batches)
    return batches


def loop(name, workload, rows, steps, seed, clock):
    """peft, peft-compile and transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    dtype = {"BF16": torch.bfloat16, "FP32": torch.float32}[workload.precision]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    if workload.method == "LoRA":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATES[workload.method])
    compute = torch.compile(model) if name == "peft-compile" else model
    examples = [encode(tokenizer, row) for row in rows]
    for batch in batches_by_length(examples, workload.batch, seed)[:steps]:
        clock.begin()
        longest = max(len(ids) for ids, _ in batch)
        pad = lambda values, padding: torch.tensor([list(value) + [padding] * (longest - len(value)) for value in values])
        ids = pad([ids for ids, _ in batch], tokenizer.pad_token_id)
        labels = pad([labels for _, labels in batch], -100)
        mask = pad([[1] * len(ids) for ids, _ in batch], 0)
        padded = bool((mask == 0).any())
        loss = compute(input_ids=ids, attention_mask=mask if padded else None, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        clock.tokens[-1] += int(mask.sum())
        clock.end()
    clock.report(sum(len(ids) for ids, _ in examples), sum(count_trained(labels) for _, labels in examples))


def count_trained(labels):
    """Labels that a loss is taken on: the first token of a row is predicted from nothing and has none."""
    return sum(label != -100 for label in labels[1:])


def trl(name, workload, rows, steps, seed, clock):
    """trl, trl-packed and trl-mixed."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Timing(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

        def on_step_end(self, *_, **__):
            clock.end()

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *arguments, **keywords):
            # What is packed is not padded and has no mask.
            clock.tokens[-1] += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *arguments, **keywords)

    conversations = "messages" in rows[0]
    packed, mixed = name == "trl-packed", name == "trl-mixed"
    with tempfile.TemporaryDirectory() as folder:
        template = pathlib.Path(folder, "template.jinja")
        template.write_text(TEMPLATE)
        settings = {"per_device_train_batch_size": workload.batch}
        if packed:
            settings = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": workload.packs}
        dtype = "bfloat16" if workload.precision == "BF16" and not mixed else "float32"
        config = SFTConfig(
            output_dir=folder, max_steps=steps, max_length=workload.longest, use_cpu=True, bf16=mixed, gradient_checkpointing=False,
            assistant_only_loss=conversations, chat_template_path=str(template) if conversations else None, report_to=[],
            save_strategy="no", logging_steps=1000, learning_rate=LEARNING_RATES[workload.method], seed=seed, disable_tqdm=True,
            model_init_kwargs={"dtype": dtype}, **settings)
        trainer = Counting(model=str(MODEL), args=config, train_dataset=Dataset.from_list(rows), callbacks=[Timing()],
                           peft_config=lora_config() if workload.method == "LoRA" else None)
        trainer.train()
    prepared = trainer.train_dataset
    clock.report(sum(map(len, prepared["input_ids"])), sum(map(count_trained, prepared["labels"])))


def most_new_tokens(references):
    """Tokens that an answer may have: the trainer's rule (data/generation.rs) over the tokens of the right answers."""
    longest = max(map(len, references))
    return longest + longest // 2 + 8


def generate(workload, rows):
    """transformers-generate: prints what bench.py reads, the answers among it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    ask = lambda row: tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    prompts = [ask(row) for row in rows]
    most = most_new_tokens([tokenizer(row["messages"][-1]["content"], add_special_tokens=False)["input_ids"] for row in rows])
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])

    def answers_to(indices, new_tokens):
        """New tokens of each of these prompts, the end token included."""
        padded = tokenizer.pad({"input_ids": [prompts[index] for index in indices]}, return_tensors="pt")
        whole = model.generate(**padded, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for answer in whole[:, padded["input_ids"].shape[1]:].tolist():
            ended = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
            yield answer[:ended]

    by_length = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    batches = [by_length[first:first + workload.batch] for first in range(0, len(rows), workload.batch)]
    list(answers_to(batches[0], 4))  # The trainer has answered before it is timed, too.
    answers, began = {}, time.time()
    for batch in batches:
        answers.update(zip(batch, answers_to(batch, most)))
    seconds = time.time() - began
    tokens = sum(map(len, answers.values()))
    print(json.dumps({
        "tokensPerSecond": tokens / seconds,
        "peakBytes": peak_bytes(),
        "promptTokens": sum(map(len, prompts)),
        "generatedTokens": tokens,
        "answers": [tokenizer.decode(answers[index], skip_special_tokens=True).strip() for index in range(len(rows))],
    }))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--rows", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--started", type=float, required=True)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    if WORKLOADS[arguments.workload].method == "Generate":
        generate(WORKLOADS[arguments.workload], rows)
        return
    program = trl if arguments.peer.startswith("trl") else loop
    program(arguments.peer, WORKLOADS[arguments.workload], rows, arguments.steps, arguments.seed, Clock(arguments.started))


if __name__ == "__main__":
    main()
