"""Three warm and three timed steps of transformers + PEFT. Usage: peer.py MODEL ROWS LENGTH

Two rows a step, LoRA of rank 16 on every linear layer, bf16, AdamW. Prints the losses and tokens/s as the last line, in JSON.
"""

import json
import pathlib
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

STEPS = 6


def main():
    folder, rows, length = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    # The tokenizer of models.py: a token for each printable byte, then the blank.
    tokens = {chr(code): index for index, code in enumerate(range(0x21, 0x7F))} | {" ": 0x7F - 0x21}
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()[:2]]
    # A text ends with the end token, which is trained.
    ids = torch.tensor([[tokens[letter] for letter in text[:length]] + [255] for text in texts], device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses, seconds = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"losses": losses, "tokensPerSecond": ids.numel() * 3 / sum(seconds[3:])}))


if __name__ == "__main__":
    main()
