"""Loads our adapter in PEFT, our merged model and our fully fine-tuned model in transformers, and compares them with each
other and with the trainer.

Usage: check_outputs.py TRAINER BASE_MODEL ADAPTER_FOLDER MERGED_FOLDER FULL_FOLDER
"""

import subprocess
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["restart web in prod", "list the pods in staging", "What is the capital of France?", "scale api to 3 replicas in dev"]
# Our merge and PEFT's, both rounded to the base model's bf16, may round a sum that lies between two numbers differently.
MERGED_TOLERANCE = 0.25
# Training moves logits by far more.
ADAPTER_EFFECT = 1.0


def main():
    trainer, base_folder, adapter_folder, merged_folder, full_folder = sys.argv[1:6]
    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapted, merged = PeftModel.from_pretrained(load(base_folder), adapter_folder).eval(), load(merged_folder)
    base, full = load(base_folder), load(full_folder)
    peft_merged = PeftModel.from_pretrained(load(base_folder), adapter_folder).merge_and_unload().to(torch.bfloat16).float()

    def answers(model, folder, prompt, ids, *more):
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        theirs = tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True).strip()
        command = [trainer, "generate", folder, prompt, "--max-new-tokens", "24", "--precision", "fp32", *more]
        ours = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert ours == theirs, f"{folder}, {prompt!r}: the trainer answers {ours!r}, the peer {theirs!r}"
        return ours

    worst, effect, full_effect = 0.0, 0.0, 0.0
    with torch.no_grad():
        for prompt in PROMPTS:
            text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            worst = max(worst, (peft_merged(ids).logits - merged(ids).logits).abs().max().item())
            effect = max(effect, (adapted(ids).logits - base(ids).logits).abs().max().item())
            full_effect = max(full_effect, (full(ids).logits - base(ids).logits).abs().max().item())
            print(f"{prompt!r}: {answers(adapted, adapter_folder, prompt, ids, '--base', base_folder)!r} with the adapter in both, "
                  f"{answers(full, full_folder, prompt, ids)!r} after full fine-tuning in both")
    print(f"largest difference of logits, merged by PEFT against merged by the trainer: {worst:.4f}")
    print(f"largest effect on logits: adapter {effect:.2f}, full fine-tuning {full_effect:.2f}")
    assert worst <= MERGED_TOLERANCE, f"more than {MERGED_TOLERANCE}"
    assert min(effect, full_effect) >= ADAPTER_EFFECT, "training has no effect on what the peers load"


if __name__ == "__main__":
    main()
