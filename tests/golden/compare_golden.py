"""Compares two folders of golden values: every number of the JSON files and every tensor, within a relative tolerance, which is
less than the distance of two codes of an 8-bit moment.

Usage: compare_golden.py COMMITTED NEW
"""

import json
import pathlib
import sys

from safetensors.torch import load_file

TOLERANCE = 2e-4
# A path, and what bf16 rounds to, which kernels differ in.
IGNORED = ("model", "bf16")


def differences(committed, new, path):
    if isinstance(committed, dict):
        assert committed.keys() == new.keys(), f"{path}: other keys"
        return [found for key in committed if key not in IGNORED for found in differences(committed[key], new[key], f"{path}.{key}")]
    if isinstance(committed, list):
        assert len(committed) == len(new), f"{path}: another length"
        return [found for index, pair in enumerate(zip(committed, new)) for found in differences(*pair, f"{path}[{index}]")]
    if isinstance(committed, float):
        difference = abs(committed - new) / max(abs(committed), 1.0)
        return [(difference, path)]
    assert committed == new, f"{path}: {committed!r} became {new!r}"
    return []


def main():
    for name in ("logits.json", "steps.json", "families.json", "schedules.json"):
        committed, new = (json.loads(pathlib.Path(folder, name).read_text()) for folder in sys.argv[1:3])
        worst, path = max(differences(committed, new, name))
        assert worst <= TOLERANCE, f"{path} differs by {worst}"
        print(f"{name}: reproduced, largest relative difference {worst:.1e}")
    root = pathlib.Path(sys.argv[1])
    for path in sorted(path.relative_to(root) for path in root.rglob("*.safetensors")):
        committed, new = ({name: tensor.double() for name, tensor in load_file(pathlib.Path(folder, path)).items()}
                          for folder in sys.argv[1:3])
        assert committed.keys() == new.keys(), f"{path}: other tensors"
        worst, name = max(((committed[name] - new[name]).abs().max() / committed[name].abs().max().clamp_min(1e-6), name) for name in new)
        assert worst <= TOLERANCE, f"{path}: {name} differs by {worst}"
        print(f"{path}: reproduced, largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
