"""What a benchmark ran on."""

import pathlib
import platform

# What the trainer chooses its kernels by, the least first.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def processor():
    """The processor and its class, for example `AMD EPYC (avx512_bf16)`: figures of one class say nothing of another."""
    values = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    found = [name for name in INSTRUCTIONS if name in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())} ({found[-1] if found else 'no avx2'})"
