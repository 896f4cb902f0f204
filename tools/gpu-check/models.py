"""Models with random weights, rows and jobs for check.py. With PyTorch weights are made on the GPU; small ones need nothing."""

import json
import random
import struct

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 2048, "tie_word_embeddings": True}
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DEVIATION = 0.02
# Numbers that are drawn at once.
PIECE = 1 << 26


def tensors(shape):
    """Names and sizes, in the order of the file."""
    hidden, mlp, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    keys = hidden // heads * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
        for linear, rows, columns in (("q", hidden, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, hidden)):
            yield f"{name}.self_attn.{linear}_proj.weight", (rows, columns)
        for linear, rows, columns in (("gate", mlp, hidden), ("up", mlp, hidden), ("down", hidden, mlp)):
            yield f"{name}.mlp.{linear}_proj.weight", (rows, columns)
    yield "model.norm.weight", (hidden,)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", (shape["vocab_size"], hidden)


def pieces(count, is_norm, generator):
    """bf16 bytes of so many numbers: ones for a norm, normally distributed ones else."""
    try:
        import torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
    except ImportError:
        numbers = (1.0 if is_norm else generator.gauss(0, DEVIATION) for _ in range(count))
        yield b"".join(struct.pack("<f", number)[2:] for number in numbers)
        return
    for start in range(0, count, PIECE):
        some = torch.ones if is_norm else torch.randn
        numbers = some(min(PIECE, count - start), device=device, dtype=torch.float32) * (1 if is_norm else DEVIATION)
        yield numbers.to(torch.bfloat16).view(torch.uint8).cpu().numpy().tobytes()


def write_model(folder, shape):
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
              "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
              "bos_token_id": 254, "eos_token_id": 255, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    header, offset, sizes = {"__metadata__": {"format": "pt"}}, 0, list(tensors(shape))
    for name, size in sizes:
        count = size[0] * (size[1] if len(size) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, offset + 2 * count]}
        offset += 2 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = random.Random(1)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, size in sizes:
            for piece in pieces(size[0] * (size[1] if len(size) > 1 else 1), "norm" in name, generator):
                file.write(piece)
    write_tokenizer(folder)


def write_tokenizer(folder):
    """A token for each printable byte, as ByteLevel writes it, and two chat marks."""
    symbols = [*map(chr, range(0x21, 0x7F)), "Ġ", "Ċ"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)} | {"<|im_start|>": 254, "<|im_end|>": 255}
    special = [{"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for index, content in ((254, "<|im_start|>"), (255, "<|im_end|>"))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
                                                       "normalizer": None, "pre_tokenizer": level, "post_processor": None,
                                                       "decoder": level, "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def letters(count, generator):
    return "".join(generator.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(count - 1)) + "x"


def mixed_lengths(count, longest):
    generator = random.Random(2)
    return [generator.randrange(8, longest) for _ in range(count)]


def write_rows(path, lengths):
    """Text rows of so many characters each, which are as many tokens."""
    generator = random.Random(3)
    path.write_text("".join(json.dumps({"text": letters(length, generator)}) + "\n" for length in lengths))


def write_conversations(path, count, length, first=0):
    generator = random.Random(first)
    rows = ({"messages": [{"role": "user", "content": f"{first + number} {letters(length, generator)}"},
                          {"role": "assistant", "content": letters(16, generator)}]} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def job(name, rows, steps, batch, longest, seed):
    return {
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
        "spec": {
            "model": {"uri": "file://model"}, "dataset": {"train": {"uri": f"file://{rows}"}}, "method": {"type": "LoRA", "lora": {"rank": 16}},
            "hyperparameters": {"maxSteps": steps, "batchSize": batch, "maxSequenceLength": longest, "learningRate": "1e-4", "seed": seed},
        },
    }
