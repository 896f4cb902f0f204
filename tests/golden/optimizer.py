"""Writes optimizer.safetensors: steps of torchao's AdamW with 8-bit moments, which the trainer's is tested against.

Usage: optimizer.py OUTPUT_FOLDER

Tensors have whole blocks of 256, at least 4,096 elements (torchao keeps smaller ones in fp32); what the trainer has in a short
last block is padded here with zeros that never get a gradient, which change neither a scale nor a code. Weights and gradients
are fractions that bf16 holds exactly, made from integers on both sides (`start`, `gradient`), so that no file is needed for
them and fp32 and bf16 parameters see the same. Learning rates and weight decay are exact in fp32.

Written: the values that the codes of each moment stand for; and of STEPS steps on fp32 and on bf16 parameters the weights, and
codes and scales of both moments after the last step, which depend on all before.
"""

import os
import pathlib
import subprocess
import sys

# Two of torch's kernels round otherwise where the CPU has a fused multiply-add, on AVX2 and AVX512 alike: lerp, which the step is
# made of and which is not fused here, as it is not in the trainer; and linspace, which the values of the codes are made of: those
# are taken from where it is, as everybody who trains with torchao has them. And no compiler: torchao's step is Python that
# torch.compile only makes faster.
MAPS = "maps"
if sys.argv[1] != MAPS:
    os.environ["ATEN_CPU_CAPABILITY"] = "default"
os.environ.update(TORCHDYNAMO_DISABLE="1", TORCHAO_FORCE_SKIP_LOADING_SO_FILES="1")
# See tools/peers-env.sh.
sys.path.append(str(pathlib.Path(sys.prefix, "torchao")))

import torch  # noqa: E402
from safetensors.torch import load, save, save_file  # noqa: E402
from torchao.optim import AdamW8bit, subclass_8bit  # noqa: E402

STEPS, SAVED, WEIGHT_DECAY = 12, (1, 12), 0.125
# Name, elements, elements with padding; the order is the one that the trainer keeps them in: what is decayed comes first.
TENSORS = [("wide.weight", 5120, 5120), ("odd.weight", 4103, 4352), ("norm.weight", 4096, 4096)]


def learning_rate(step):
    """Of steps counted from 1."""
    return (17 - step) / 2048


def start(tensor, length):
    index = torch.arange(length, dtype=torch.int64)
    return ((index * 3571 + tensor * 101) % 511 - 255).double() / 512


def gradient(tensor, step, length):
    """Numbers of magnitudes that span 2^-19 to 1 in a block and 2^-15 to 1 from block to block, with some zeros among them; one
    block has none but zeros, one has zeros in every other step, and one is so small that its scale is the least there is."""
    index = torch.arange(length, dtype=torch.int64)
    number = (index * 7919 + step * 104729 + tensor * 1299709) % 509 - 254
    block = index // 256
    exponent = (index * 5 + step) % 12 + block % 16
    exponent[block == 3] += 60
    number[block == 1] = 0
    if step % 2 == 0:
        number[block == 2] = 0
    return number.double() / 256 * torch.pow(2.0, -exponent.double())


def padded(values, length, kind):
    exact = values.to(kind)
    assert torch.equal(exact.double(), values), "both sides can make these numbers"
    return torch.cat([exact, torch.zeros(length - len(exact), dtype=kind)])


def run(kind):
    parameters = [torch.nn.Parameter(padded(start(index, length), whole, kind)) for index, (_, length, whole) in enumerate(TENSORS)]
    decay = lambda name: 0.0 if "norm" in name else WEIGHT_DECAY
    groups = [{"params": [parameter], "weight_decay": decay(name)} for (name, _, _), parameter in zip(TENSORS, parameters)]
    optimizer = AdamW8bit(groups, lr=learning_rate(1), block_size=256)
    result = {}
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"].fill_(learning_rate(step))
        for index, (parameter, (_, length, whole)) in enumerate(zip(parameters, TENSORS)):
            parameter.grad = padded(gradient(index, step, length), whole, kind)
        optimizer.step()
        if step in SAVED:
            for (name, length, _), parameter in zip(TENSORS, parameters):
                result[f"{name}.step{step}"] = parameter.detach()[:length].clone()
    for (name, length, _), parameter in zip(TENSORS, parameters):
        for moment in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][moment]
            assert state.block_size == 256 and len(state.codes.unique()) > 100, "the codes are worth comparing"
            result[f"{name}.{moment}"] = state.codes[:length].clone()
            result[f"{name}.{moment}_scale"] = state.scale.clone()
    return result


def maps():
    """The values of the codes, fp32, as the CPU's own kernels make them."""
    assert torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"), "linspace is not fused here"
    values = {"exp_avg.map": subclass_8bit.get_qmap_signed(), "exp_avg_sq.map": subclass_8bit.get_qmap_unsigned()}
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def main():
    if sys.argv[1] == MAPS:
        sys.stdout.buffer.write(save(maps()))
        return
    output = pathlib.Path(sys.argv[1])
    torch.set_num_threads(1)
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    printed = subprocess.run([sys.executable, __file__, MAPS], check=True, capture_output=True, env=environment).stdout
    values = load(printed)
    subclass_8bit.get_qmap_signed = values["exp_avg.map"].tolist
    subclass_8bit.get_qmap_unsigned = values["exp_avg_sq.map"].tolist
    wide, narrow = run(torch.float32), run(torch.bfloat16)
    moments = [name for name in wide if "exp_avg" in name]
    assert all(torch.equal(wide[name], narrow[name]) for name in moments), "moments depend on gradients alone"
    # fp32 weights after the first step would say no more than those after the last; bf16 ones lose small updates as they go, which
    # the trainer's masters do not.
    first, last = SAVED
    saved = {**values, **{name: wide[name] for name in moments}}
    for name, _, _ in TENSORS:
        saved[f"{name}.fp32"] = wide[f"{name}.step{last}"]
        saved[f"{name}.bf16"] = narrow[f"{name}.step{first}"]
    save_file(saved, output / "optimizer.safetensors")


if __name__ == "__main__":
    main()
