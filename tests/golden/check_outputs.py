"""Loads our adapter in PEFT and our merged model in transformers and compares them with each other and with the trainer.

Usage: check_outputs.py TRAINER BASE_MODEL ADAPTER_FOLDER MERGED_FOLDER
"""

import subprocess
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["restart web in prod", "list the pods in staging", "What is the capital of France?", "scale api to 3 replicas in dev"]
# The merged weights are rounded to the base model's bf16 once.
MERGED_TOLERANCE = 0.25


def main():
    trainer, base_folder, adapter_folder, merged_folder = sys.argv[1:5]
    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapted, merged = PeftModel.from_pretrained(load(base_folder), adapter_folder).eval(), load(merged_folder)
    worst = 0.0
    with torch.no_grad():
        for prompt in PROMPTS:
            text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            worst = max(worst, (adapted(ids).logits - merged(ids).logits).abs().max().item())
            answer = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
            theirs = tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True).strip()
            command = [trainer, "generate", adapter_folder, prompt, "--base", base_folder, "--max-new-tokens", "24", "--precision", "fp32"]
            ours = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            assert ours == theirs, f"{prompt!r}: the trainer answers {ours!r}, PEFT {theirs!r}"
            print(f"{prompt!r}: {ours!r} in both")
    print(f"largest difference of logits, adapter in PEFT against merged model in transformers: {worst:.4f}")
    assert worst <= MERGED_TOLERANCE, f"more than {MERGED_TOLERANCE}"


if __name__ == "__main__":
    main()
