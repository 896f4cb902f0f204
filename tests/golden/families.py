"""Writes the golden files of each family of decoders, with transformers and PEFT in fp32, and bf16 beside it.

Usage: families.py OUTPUT_FOLDER

Written below OUTPUT_FOLDER:
  families/NAME/                    a random model of the family, as small as it can be with all that the family has
  families/NAME/logits.safetensors  the logits of one example, in fp32, and a greedy answer to its first tokens
  families/NAME/gradients-*.safetensors  every gradient of a first step, LoRA and Full, by tensor name
  families.json                     ten optimizer steps of each, as steps.json has them; how far bf16 is from fp32
"""

import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from make_golden import MAX_NORM, PAD, WEIGHT_DECAY, run_steps, start_adapters, step_loss, tiny_examples, write_json

ANSWERED, NEW_TOKENS = 9, 12
COMMON = dict(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.12,
              bos_token_id=1, eos_token_id=2, pad_token_id=PAD, use_cache=True)
# What each has that others have not is set to something that is not the default.
FAMILIES = {
    "llama-bias": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "mistral": ("mistral", dict(head_dim=16, sliding_window=64)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2, tie_word_embeddings=True)),
    "olmo2": ("olmo2", dict(tie_word_embeddings=False)),
    "granite": ("granite", dict(embedding_multiplier=6.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=3.0,
                                tie_word_embeddings=True)),
    "gemma": ("gemma", dict(head_dim=16, num_key_value_heads=1, tie_word_embeddings=True)),
}
LORA = {"type": "LoRA", "rank": 4, "alpha": 8}


def make(folder, model_type, overrides):
    torch.manual_seed(len(folder.name))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def relative(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def adapted(model):
    """With adapters that all have a gradient: B[i, j] = cos(i * columns + j) / 10."""
    config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    # In bf16 the adapters too are computed with in bf16, as the trainer does.
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    start_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                index = torch.arange(parameter.numel(), dtype=torch.float32)
                parameter.copy_((index.cos() * 0.1).view(parameter.shape))
    return model


def distance(folder, examples, method):
    """How far loss and gradients of a first step are in bf16 from those in fp32."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        model = (adapted(model) if method["type"] == "LoRA" else model).train()
        loss = step_loss(model, examples[:4])
        loss.backward()
        trained = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.requires_grad]
        found.append((loss.item(), dict(trained), torch.cat([gradient.flatten().double() for _, gradient in trained])))
    (rough_loss, rough, rough_whole), (loss, exact, whole) = found
    return {"loss": abs(rough_loss - loss) / loss, "gradient": relative(rough_whole, whole),
            "farthest": max(relative(rough[name], exact[name]) for name in exact)}


def reference(folder, examples):
    """Writes logits and an answer in fp32; how far logits in bf16 are from them."""
    tokens = torch.tensor([examples[-2]["tokens"]])
    load = lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    rough, model = load(torch.bfloat16), load(torch.float32)
    # No token ends the answer, and the one that pads is a token as any other.
    model.generation_config.eos_token_id = None
    prompt = tokens[:, :ANSWERED]
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)
    with torch.no_grad():
        logits, rough = model(tokens).logits[0], rough(tokens).logits[0].float()
    save_file({"tokens": tokens[0], "logits": logits.contiguous(), "answer": answer[0, ANSWERED:].contiguous()},
              folder / "logits.safetensors")
    return relative(rough, logits)


def main():
    output = pathlib.Path(sys.argv[1])
    examples, result = tiny_examples(), []
    for name, (model_type, overrides) in FAMILIES.items():
        folder = output / "families" / name
        make(folder, model_type, overrides)
        logits = reference(folder, examples)
        for method, rate in ((LORA, 1e-2), ({"type": "Full"}, 1e-3)):
            gradients = f"families/{name}/gradients-{method['type'].lower()}.safetensors"
            steps = run_steps(str(folder), examples, method, rate, str(output / gradients))
            print(name, method["type"], [round(step["loss"], 4) for step in steps], flush=True)
            result.append({"name": f"{name}-{method['type'].lower()}", "model": f"families/{name}", "method": method,
                           "maxGradNorm": MAX_NORM, "weightDecay": WEIGHT_DECAY, "gradients": gradients,
                           "examples": examples, "steps": steps,
                           "bf16": {"logits": logits, **distance(folder, examples, method)}})
    write_json(output / "families.json", result)


if __name__ == "__main__":
    main()
