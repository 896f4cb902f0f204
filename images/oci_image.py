#!/usr/bin/env python3
"""Writes a container image as one tar archive that is an OCI image layout and a `docker save` archive at once.

    oci_image.py OUTPUT --name NAME --tag TAG --entrypoint PATH [--user ID] [--env NAME=VALUE]... LAYER...

A LAYER is `--layer` and what goes into it, in order:
    --add FILE=PATH           a file of this machine
    --folder FOLDER=PATH      every file of a folder, links kept
    --libraries-of FILE       the shared libraries that a program loads, and the loader; those of earlier layers are left out
    --library-path FOLDER     where --libraries-of looks first; kept for the layers that follow
    --symlink TARGET=PATH     a link at PATH
    --directory PATH=MODE     a folder with its own mode
    --text PATH=TEXT          a small file

The same input gives the same bytes: no times, no owners, a fixed order, and layers that are not compressed, so that the
digest does not depend on a compressor either (a registry's own tools compress where that pays).
It reads ELF through `ldd`, so the program has to be of this machine's kind. Prints the digest of the manifest.
"""

import argparse
import hashlib
import io
import json
import os
import pathlib
import stat
import subprocess
import sys
import tarfile

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = "lib64/ld-linux-x86-64.so.2"
BLOCK = 1 << 20


class Layer:
    """What one layer holds: path in the image without a leading slash → a tar header and the file it is read from."""

    def __init__(self):
        self.entries = {}

    def put(self, path, kind, mode, source=None, data=b"", link=""):
        header = tarfile.TarInfo(path)
        header.type, header.mode, header.linkname = kind, mode, link
        header.size = os.path.getsize(source) if source else len(data)
        self.entries[path] = (header, source, data)

    def add_file(self, source, path, mode=None):
        executable = os.stat(source).st_mode & stat.S_IXUSR
        self.put(path, tarfile.REGTYPE, mode or (0o755 if executable else 0o644), source=source)

    def add_folder(self, folder, path):
        for source in sorted(pathlib.Path(folder).rglob("*")):
            target = f"{path}/{source.relative_to(folder)}"
            if source.is_symlink():
                self.put(target, tarfile.SYMTYPE, 0o777, link=os.readlink(source))
            elif source.is_file():
                self.add_file(source, target)

    def add_parents(self):
        """Every folder gets an entry, or an unpacker chooses its mode."""
        for path in list(self.entries):
            for parent in pathlib.PurePosixPath(path).parents:
                if str(parent) != "." and str(parent) not in self.entries:
                    self.put(str(parent), tarfile.DIRTYPE, 0o755)

    def write(self, sink):
        self.add_parents()
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for path in sorted(self.entries):
                header, source, data = self.entries[path]
                if source:
                    with open(source, "rb") as content:
                        archive.addfile(header, content)
                else:
                    archive.addfile(header, io.BytesIO(data))


def shared_libraries(program, library_path):
    """Name → file of every shared library that a program loads, as the dynamic loader finds them."""
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(library_path), "LC_ALL": "C"}
    output = subprocess.run(["ldd", program], env=environment, check=True, capture_output=True, text=True).stdout
    found = {}
    for line in output.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if arrow and rest.startswith("not found"):
            sys.exit(f"error: {program} needs {name}, which is not on this machine")
        if arrow:
            found[name] = os.path.realpath(rest.split(" (")[0])
    return found


def layers_of(operations):
    layers, library_path, placed = [], [], set()
    for operation, value in operations:
        if operation == "layer":
            layers.append(Layer())
            continue
        if not layers:
            sys.exit(f"error: --{operation} stands before the first --layer")
        layer = layers[-1]
        left, separator, right = value.partition("=")
        if operation == "library-path":
            library_path.append(value)
        elif operation == "libraries-of":
            for name, source in shared_libraries(value, library_path).items():
                if name not in placed:
                    layer.add_file(source, f"{LIBRARIES}/{name}", mode=0o644)
                    placed.add(name)
            if LOADER not in placed:
                layer.add_file(os.path.realpath(f"/{LOADER}"), LOADER, mode=0o755)
                placed.add(LOADER)
        elif not separator:
            sys.exit(f"error: --{operation} wants A=B, found {value!r}")
        elif operation == "add":
            layer.add_file(left, right.lstrip("/"))
        elif operation == "folder":
            layer.add_folder(left, right.strip("/"))
        elif operation == "symlink":
            layer.put(right.lstrip("/"), tarfile.SYMTYPE, 0o777, link=left)
        elif operation == "directory":
            layer.put(left.strip("/"), tarfile.DIRTYPE, int(right, 8))
        elif operation == "text":
            layer.put(left.lstrip("/"), tarfile.REGTYPE, 0o644, data=right.encode())
    return layers


class Blobs:
    """The archive that is being written: blobs first, each under its digest, the indexes last."""

    def __init__(self, archive):
        self.archive = archive
        self.written = set()

    def file(self, path, data):
        header = tarfile.TarInfo(path)
        header.size, header.mode = len(data), 0o644
        self.archive.addfile(header, io.BytesIO(data))

    def blob(self, data):
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.written:
            self.file(f"blobs/sha256/{digest}", data)
            self.written.add(digest)
        return digest, len(data)

    def blob_file(self, path):
        """Half a gigabyte of libraries never lies in memory at once."""
        hasher = hashlib.sha256()
        with open(path, "rb") as content:
            while block := content.read(BLOCK):
                hasher.update(block)
        digest, size = hasher.hexdigest(), os.path.getsize(path)
        if digest not in self.written:
            header = tarfile.TarInfo(f"blobs/sha256/{digest}")
            header.size, header.mode = size, 0o644
            with open(path, "rb") as content:
                self.archive.addfile(header, content)
            self.written.add(digest)
        return digest, size


def encode(value):
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def write_image(output, options, layers):
    """Writes the archive beside its place and renames it; returns the manifest's digest."""
    partial, scratch = f"{output}.partial", f"{output}.layer"
    try:
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
            digest = write_archive(Blobs(archive), options, layers, scratch)
        os.replace(partial, output)
    finally:
        for left in (partial, scratch):
            if os.path.exists(left):
                os.remove(left)
    return digest


def write_archive(blobs, options, layers, scratch):
    layer_type = "application/vnd.oci.image.layer.v1.tar"
    descriptors = []
    blobs.file("oci-layout", encode({"imageLayoutVersion": "1.0.0"}))
    for layer in layers:
        with open(scratch, "wb") as sink:
            layer.write(sink)
        digest, size = blobs.blob_file(scratch)
        descriptors.append({"mediaType": layer_type, "digest": f"sha256:{digest}", "size": size})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "Entrypoint": [options.entrypoint],
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", *options.env],
            "WorkingDir": "/",
            **({"User": options.user} if options.user else {}),
        },
        "rootfs": {"type": "layers", "diff_ids": [descriptor["digest"] for descriptor in descriptors]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": f"layer {number}"} for number in range(len(layers))],
    }
    config_digest, config_size = blobs.blob(encode(config))
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": f"sha256:{config_digest}", "size": config_size},
        "layers": descriptors,
    }
    digest, size = blobs.blob(encode(manifest))
    reference = f"{options.name}:{options.tag}"
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                "mediaType": manifest["mediaType"],
                "digest": f"sha256:{digest}",
                "size": size,
                "platform": {"architecture": "amd64", "os": "linux"},
                "annotations": {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": options.tag},
            }
        ],
    }
    docker = [
        {
            "Config": f"blobs/sha256/{config_digest}",
            "RepoTags": [reference],
            "Layers": ["blobs/sha256/" + descriptor["digest"].removeprefix("sha256:") for descriptor in descriptors],
        }
    ]
    blobs.file("index.json", encode(index))
    blobs.file("manifest.json", encode(docker))
    return f"sha256:{digest}"


class Operation(argparse.Action):
    """Keeps the options of the layers in the order in which they were given."""

    def __call__(self, parser, namespace, values, option_string=None):
        operations = getattr(namespace, "operations", None) or []
        operations.append((option_string.lstrip("-"), values))
        namespace.operations = operations


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--name", required=True)
    parser.add_argument("--tag", required=True)
    parser.add_argument("--entrypoint", required=True)
    parser.add_argument("--user")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--layer", action=Operation, nargs=0)
    for operation in ("add", "folder", "libraries-of", "library-path", "symlink", "directory", "text"):
        parser.add_argument(f"--{operation}", action=Operation)
    options = parser.parse_args()
    layers = layers_of(getattr(options, "operations", []))
    if not layers:
        sys.exit("error: an image needs at least one --layer")
    print(write_image(options.output, options, layers))


if __name__ == "__main__":
    main()
