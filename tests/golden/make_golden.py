"""Writes the golden files that the trainer's numerics are tested against, with transformers, PEFT and torch in fp32.

Usage: make_golden.py BASE_MODEL_FOLDER OUTPUT_FOLDER

Written:
  tiny-llama/, tiny-llama3/   random Llama models: tied head and plain rotary embedding; untied, llama3 scaling, wide heads
  logits.json                 SmolLM2: token ids and logits of some positions and columns; a greedy answer
  steps.json                  ten optimizer steps: the examples, the learning rates, loss and gradient norm of each step
  gradients-*.safetensors     every gradient of the first of these steps on the tiny models, by tensor name
  schedules.json              learning rates of transformers' schedules

Adapters start from A[i, j] = sin(i * columns + j + layer) / sqrt(columns), computed in fp64, and B = 0, so that both
sides can make them without a file.
"""

import json
import math
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_scheduler

torch.set_num_threads(2)
STEPS, EXAMPLES_PER_STEP, MAX_NORM, WEIGHT_DECAY = 10, 4, 1.0, 0.01
PAD = 5  # begins every example of the tiny models: transformers does not train its embedding row from inputs
PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nList the pods of namespace web-7.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
]
TEXTS = [
    ("Name the largest planet.", "Jupiter is the largest planet."),
    ("Two plus two?", "4"),
    ("Translate 'bonjour'.", "It means hello, said when meeting someone during the day."),
    ("Which command lists files?", "ls"),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet around the year 1600."),
    ("Colour of grass?", "Green."),
    ("Sort 3, 1, 2.", "1, 2, 3"),
]


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def make_tiny(folder, **overrides):
    torch.manual_seed(len(folder.name))
    settings = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.08,
                    tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    settings.update(overrides)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def smollm_examples(tokenizer):
    examples = []
    for question, answer in TEXTS:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        examples.append({"tokens": prompt_ids + answer_ids, "trained": [0] * len(prompt_ids) + [1] * len(answer_ids)})
    return examples


def tiny_examples():
    generator = torch.Generator().manual_seed(3)
    examples = []
    for length in (5, 9, 9, 17, 3, 30, 12):
        tokens = [PAD, *torch.randint(3, 256, (length - 1,), generator=generator).tolist()]
        examples.append({"tokens": tokens, "trained": [int(index >= length // 3) for index in range(length)]})
    return examples


def start_adapters(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                rows, columns = parameter.shape
                layer = int(name.split(".layers.")[1].split(".")[0])
                index = torch.arange(rows * columns, dtype=torch.float64) + layer
                parameter.copy_((index.sin() / math.sqrt(columns)).view(rows, columns).float())


def step_loss(model, examples):
    """Summed negative log-likelihood over the trained tokens of the whole step, divided by their number."""
    total, count = 0.0, 0
    for example in examples:
        tokens = torch.tensor([example["tokens"]])
        logits = model(tokens).logits[0, :-1].float()
        labels = tokens[0, 1:]
        mask = torch.tensor(example["trained"][1:]).bool()
        total = total + torch.nn.functional.cross_entropy(logits[mask], labels[mask], reduction="sum")
        count += int(mask.sum())
    return total / count


def run_steps(folder, examples, method, learning_rate, gradients_path=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method["type"] == "LoRA":
        config = LoraConfig(r=method["rank"], lora_alpha=method["alpha"], lora_dropout=0.0, bias="none",
                            target_modules=method.get("targetModules") or "all-linear",
                            use_rslora=method.get("rankStabilized", False), task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        start_adapters(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decays = lambda name: not any(part == "bias" or part == "norm" or part.endswith("norm") for part in name.split("."))
    optimizer = torch.optim.AdamW([
        {"params": [parameter for name, parameter in trained if decays(name)], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for name, parameter in trained if not decays(name)], "weight_decay": 0.0},
    ], lr=learning_rate)
    model.train()
    steps = []
    for step in range(STEPS):
        ids = [(step * EXAMPLES_PER_STEP + index) % len(examples) for index in range(EXAMPLES_PER_STEP)]
        rate = learning_rate * (1 - step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = step_loss(model, [examples[index] for index in ids])
        loss.backward()
        if step == 0 and gradients_path:
            clean = lambda name: name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")
            save_file({clean(name): parameter.grad.clone() for name, parameter in trained}, gradients_path)
        norm = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trained], MAX_NORM)
        optimizer.step()
        steps.append({"examples": ids, "learningRate": rate, "loss": loss.item(), "gradientNorm": norm.item()})
    return steps


def golden_steps(base, output):
    tokenizer = AutoTokenizer.from_pretrained(base)
    smollm, tiny = smollm_examples(tokenizer), tiny_examples()
    lora = {"type": "LoRA", "rank": 8, "alpha": 16}
    cases = [
        ("smollm2-lora", str(base), smollm, lora, 2e-4, None),
        ("smollm2-full", str(base), smollm, {"type": "Full"}, 2e-5, None),
        ("tiny-llama-lora", "tiny-llama", tiny, lora, 1e-2, "gradients-tiny-llama-lora.safetensors"),
        ("tiny-llama-rslora", "tiny-llama", tiny,
         {"type": "LoRA", "rank": 4, "alpha": 8, "rankStabilized": True, "targetModules": ["q_proj", "v_proj", "down_proj"]}, 1e-2, None),
        ("tiny-llama-full", "tiny-llama", tiny, {"type": "Full"}, 1e-3, "gradients-tiny-llama-full.safetensors"),
        ("tiny-llama3-full", "tiny-llama3", tiny, {"type": "Full"}, 1e-3, "gradients-tiny-llama3-full.safetensors"),
    ]
    result = []
    for name, folder, examples, method, rate, gradients in cases:
        path = folder if folder == str(base) else str(output / folder)
        steps = run_steps(path, examples, method, rate, str(output / gradients) if gradients else None)
        print(name, [round(step["loss"], 4) for step in steps], flush=True)
        result.append({"name": name, "model": "base" if folder == str(base) else folder, "method": method,
                       "maxGradNorm": MAX_NORM, "weightDecay": WEIGHT_DECAY, "gradients": gradients,
                       "examples": examples, "steps": steps})
    write_json(output / "steps.json", result)


def golden_logits(base, output):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    columns = list(range(0, model.config.vocab_size, 251))
    prompts = []
    with torch.no_grad():
        for text in PROMPTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids])).logits[0]
            positions = sorted({0, len(ids) // 2, len(ids) - 1})
            prompts.append({"text": text, "tokens": ids, "positions": positions, "columns": columns,
                            "logits": [[logits[row, column].item() for column in columns] for row in positions]})
        question = "What is the capital of France?"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        answer = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids):]
    greedy = {"prompt": chat, "tokens": ids, "answer": tokenizer.decode(answer, skip_special_tokens=True)}
    write_json(output / "logits.json", {"prompts": prompts, "greedy": greedy})
    print(greedy["answer"])


def golden_schedules(output):
    names = {"Constant": ("constant_with_warmup", {}), "Linear": ("linear", {}), "Cosine": ("cosine", {}),
             "CosineWithMinLr": ("cosine_with_min_lr", {"min_lr_rate": 0.1}), "InverseSqrt": ("inverse_sqrt", {})}
    result = []
    for ours, (theirs, extra) in names.items():
        for total, warmup in ((20, 4), (15, 0)):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
            scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total,
                                      scheduler_specific_kwargs=extra)
            rates = []
            for _ in range(total):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            result.append({"scheduler": ours, "totalSteps": total, "warmupSteps": warmup, "peak": 0.5, "rates": rates})
    write_json(output / "schedules.json", result)


def main():
    base, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    make_tiny(output / "tiny-llama")
    make_tiny(output / "tiny-llama3", tie_word_embeddings=False, head_dim=24,
              rope_parameters={"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 32})
    golden_logits(base, output)
    golden_schedules(output)
    golden_steps(base, output)


if __name__ == "__main__":
    main()
