"""Makes stub libraries for the CUDA libraries that torch's Python half needs in order to load, and never calls on a CPU.

Usage: stub_cuda.py TORCH_LIB_FOLDER

Every undefined symbol of the torch libraries that names one of the stubbed libraries by its version node, or by its
prefix where it has no version, gets an empty function; the loader wants all of them and their version nodes.
libcuda and libnvrtc are never stubbed: a stub would hide a real driver.
"""

import collections
import pathlib
import re
import subprocess
import sys
import tempfile

# soname: prefixes of symbols that carry no version.
STUBS = {
    "libcublas.so.13": ("cublas",),
    "libcublasLt.so.13": ("cublasLt",),
    "libcudnn.so.9": ("cudnn",),
    "libcufft.so.12": ("cufft",),
    "libcufile.so.0": ("cuFile",),
    "libcurand.so.10": ("curand",),
    "libcusolver.so.12": ("cusolver",),
    "libcusparse.so.12": ("cusparse",),
    "libcusparseLt.so.0": ("cusparseLt",),
    "libnccl.so.2": ("nccl", "pnccl"),
    "libnvshmem_host.so.3": ("nvshmem",),
}


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def node_owners(library):
    """Which soname each version node belongs to, from the library's version needs."""
    owners, current = {}, None
    for line in run("readelf", "-VW", library).splitlines():
        if match := re.search(r"File: (\S+)", line):
            current = match[1]
        elif match := re.search(r"Name: (\S+)", line):
            if current:
                owners[match[1]] = current
    return owners


def symbols(library, *flags):
    for line in run("nm", "-D", "--with-symbol-versions", *flags, library).splitlines():
        name, _, version = line.split()[-1].partition("@")
        yield name, version.lstrip("@")


def owner_by_prefix(name):
    matches = [(len(prefix), soname) for soname, prefixes in STUBS.items() for prefix in prefixes if name.startswith(prefix)]
    return max(matches)[1] if matches else None


def main():
    folder = pathlib.Path(sys.argv[1])
    libraries = sorted(str(path) for path in folder.glob("lib*.so*") if path.name not in STUBS)
    defined = {name for library in libraries for name, _ in symbols(library, "--defined-only")}
    wanted = collections.defaultdict(lambda: collections.defaultdict(set))
    for library in libraries:
        owners = node_owners(library)
        for name, version in symbols(library, "--undefined-only"):
            soname = owners.get(version) if version else (owner_by_prefix(name) if name not in defined else None)
            if soname in STUBS:
                wanted[soname][version].add(name)
    with tempfile.TemporaryDirectory() as scratch:
        for soname in STUBS:
            source, script = pathlib.Path(scratch, "stub.c"), pathlib.Path(scratch, "stub.map")
            nodes = wanted[soname]
            names = sorted({name for group in nodes.values() for name in group})
            source.write_text("".join(f"void {name}(void) {{}}\n" for name in names) or "void finetune_stub(void) {}\n")
            script.write_text(
                "".join(f"{version} {{ global: {' '.join(f'{name};' for name in sorted(group))} }};\n" for version, group in nodes.items() if version)
            )
            command = ["gcc", "-shared", "-fPIC", "-fno-builtin", "-w", "-o", str(folder / soname), str(source), f"-Wl,-soname,{soname}"]
            if any(nodes):
                command.append(f"-Wl,--version-script,{script}")
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
