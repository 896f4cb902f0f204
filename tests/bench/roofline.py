"""What bounds a step of Llama-3-8B on an H100: arithmetic, not a measurement. Puts the table into docs/benchmarks.md.

Usage: roofline.py [--check]

Products are bound by the rate of the matrix units, LoRA's narrow ones and everything else by memory, and nothing overlaps. LoRA of rank
16 on every linear layer, bf16, two sequences of 4,096 tokens a step; recomputed are norms and SwiGLU products only. Left out, a
millisecond or less each: embedding, final norm, optimizer, and that the first layer's q, k and v need no gradient of their input.
"""

import argparse
import sys

import page

# What a bf16 product of 8192 x 8192 x 8192 reaches on an H100 SXM, and the memory bandwidth of its data sheet:
# https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306
FLOPS, BYTES_PER_SECOND = 798e12, 3.35e12
# The rate that is aimed at, tokens/s.
AIM = 14_000

# The shape of Llama-3-8B: https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
HIDDEN, MLP, LAYERS, VOCABULARY = 4096, 14_336, 32, 128_256
HEADS, KEY_HEADS, HEAD_SIZE = 32, 8, 128
SEQUENCES, LENGTH, RANK = 2, 4096, 16
TOKENS = SEQUENCES * LENGTH
# loss::chunk_rows on an accelerator: logits in fp32 of half a gibibyte.
CHUNK_ROWS = (512 << 20) // (4 * VOCABULARY)

# Inputs and outputs of each linear layer: q, k, v, o, gate, up, down.
QUERIES, KEYS = HEADS * HEAD_SIZE, KEY_HEADS * HEAD_SIZE
LINEARS = [(HIDDEN, QUERIES), (HIDDEN, KEYS), (HIDDEN, KEYS), (QUERIES, HIDDEN), (HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)]
# The buffers that gradients of inputs are summed in, and the linear layers that add to each: q k v; o; gate up; down.
SUMS = [(HIDDEN, 3), (QUERIES, 1), (HIDDEN, 2), (MLP, 1)]

# Bytes that an element goes through memory with, by one operation of libtorch; statistics and tables are smaller by a dimension.
HALF, WIDE = 2, 4
COPY, ADD = 2 * HALF, 3 * HALF
WIDEN = NARROW = HALF + WIDE
WIDE_UNARY, WIDE_BINARY, WIDE_REDUCE = 2 * WIDE, 3 * WIDE, WIDE


def elements(width):
    """Of an activation so wide, in all layers."""
    return TOKENS * width * LAYERS


def parts():
    """Each part of a step: its name, FLOP, bytes, and bytes by libtorch's own operations where they are others."""
    frozen = sum(inputs * outputs for inputs, outputs in LINEARS) * LAYERS
    ends = sum(inputs + outputs for inputs, outputs in LINEARS)
    # Forward and the gradient of the input.
    yield "products with the frozen weights: forward, input gradients", 2 * 2 * TOKENS * frozen, None, None
    yield f"head, in chunks of {CHUNK_ROWS:,} rows", 2 * 2 * TOKENS * HIDDEN * VOCABULARY, None, None
    # Two products forward and five backward, of which causality leaves half.
    yield "attention, forward and backward, causal", (2 + 5) * 2 * SEQUENCES * LENGTH**2 / 2 * QUERIES * LAYERS, None, None
    # Forward, input gradients, weight gradients. Inputs are read forward and for A's gradient, and their gradient is read and written;
    # outputs are read and written forward, and their gradient is read for the input's and for B's.
    yield ("LoRA's products, which are narrow: inputs and outputs pass four times each", 3 * 2 * TOKENS * RANK * ends * LAYERS,
           4 * HALF * elements(ends), None)
    yield ("buffers of input gradients: zeros, and what the sums read again", None,
           sum((1 + readers) * HALF * elements(width) for width, readers in SUMS), None)
    # Of libtorch's: to fp32, square, mean, times 1 / rms; to bf16, times the weight.
    normalized = WIDEN + WIDE_UNARY + WIDE_REDUCE + WIDE_UNARY
    norm = normalized + NARROW + COPY
    # Times the weight, to fp32; the mean of the product with what is normalised; times it, less it, times 1 / rms; to bf16, the residual.
    norm_backward = normalized + COPY + WIDEN + WIDE_BINARY + WIDE_REDUCE + WIDE_UNARY + WIDE_BINARY + WIDE_UNARY + NARROW + ADD
    # Two norms a layer, forward twice. Ours reads and writes forward, and reads x, gradient and residual and writes backward: the second
    # pass over a row finds it in the cache.
    yield ("RMSNorm, its backward pass with the residual", None, 2 * (2 * COPY + 4 * HALF) * elements(HIDDEN),
           2 * (2 * norm + norm_backward) * elements(HIDDEN))
    yield "residual sums of the forward pass", None, 2 * ADD * elements(HIDDEN), None
    # Forward twice. Of libtorch's: silu, product; backward silu, two products, silu's gradient.
    yield ("SwiGLU, backward too", None, (2 * ADD + 5 * HALF) * elements(MLP), (2 * (COPY + ADD) + COPY + 3 * ADD) * elements(MLP))
    # Queries and keys, forward and backward. Of libtorch's: halves swapped, two products, a sum.
    yield "RoPE, backward too", None, 2 * COPY * elements(QUERIES + KEYS), 2 * (3 * COPY + ADD) * elements(QUERIES + KEYS)
    # Ours reads twice, a row being too long for the cache, and writes once. Of libtorch's: to fp32; logsumexp by maximum, difference, exp, sum; difference, exp, scale; to bf16.
    logits = WIDEN + (2 * WIDE_REDUCE + 2 * WIDE_UNARY) + 3 * WIDE_UNARY + NARROW
    yield "loss and its gradient from the logits", None, ADD * TOKENS * VOCABULARY, logits * TOKENS * VOCABULARY


def table():
    """Lines of the table, and what they say about the aim."""
    lines = [f"| part of a step of {TOKENS:,} tokens | TFLOP | GB | bound | the same by libtorch's operations |", "|---|---|---|---|---|"]
    cell = lambda value, unit: f"{value / unit:.{1 if unit == 1e12 else 0}f}" if value else ""
    flop_sum, byte_sum, bound_sum, other_sum = 0, 0, 0, 0
    for name, flop, moved, others in parts():
        bound = moved / BYTES_PER_SECOND if moved else flop / FLOPS
        other = others / BYTES_PER_SECOND if others else bound
        by_libtorch = f"{others / 1e9:.0f} GB, {other * 1e3:.0f} ms" if others else ""
        lines.append(f"| {name} | {cell(flop, 1e12)} | {cell(moved, 1e9)} | {bound * 1e3:.0f} ms | {by_libtorch} |")
        flop_sum, byte_sum, bound_sum, other_sum = flop_sum + (flop or 0), byte_sum + (moved or 0), bound_sum + bound, other_sum + other
    rate = lambda seconds: f"{seconds * 1e3:.0f} ms, {round(TOKENS / seconds, -2):,.0f} tokens/s"
    lines += [f"| **all** | {flop_sum / 1e12:.0f} | {byte_sum / 1e9:.0f} | **{rate(bound_sum)}** | {rate(other_sum)} |", "",
              f"{AIM:,} tokens/s are {TOKENS / AIM * 1e3:.0f} ms a step, {AIM * bound_sum / TOKENS:.0%} of that bound; with libtorch's "
              f"operations they would be {AIM * other_sum / TOKENS:.0%} of theirs."]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and end with an error if the page has another table")
    if not parser.parse_args().check:
        page.put(page.ROOFLINE_MARKS, table())
    elif page.between(page.ROOFLINE_MARKS) != table():
        sys.exit(f"{page.PAGE} has another table: run {parser.prog}")


if __name__ == "__main__":
    main()
