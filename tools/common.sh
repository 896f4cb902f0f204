# Sourced by the scripts beside it: where expensive products live, and how a pinned wheel gets there.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${FINETUNE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/finetune-operator}
export REPO CACHE

LIBTORCH_VERSION=2.11.0
LIBTORCH_DIR=$CACHE/libtorch-$LIBTORCH_VERSION-cpu
CUDA_VERSION=13.0.88 # of nvcc; 13.0 is what libtorch's CUDA half is built with
CUDA_DIR=$CACHE/cuda-$CUDA_VERSION
BASE_MODEL_DIR=$CACHE/models/SmolLM2-135M-Instruct-0.1.2-1 # wheel version, then the version of the conversion
PYTHON=${PYTHON:-python3}
export LIBTORCH_VERSION LIBTORCH_DIR CUDA_VERSION CUDA_DIR BASE_MODEL_DIR PYTHON

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
# Exit 3: this machine lacks something.
lacks() { printf 'error: %s\n' "$*" >&2; exit 3; }

# fetch_wheel REQUIREMENT SHA256 DIR: downloads one wheel of a registry into DIR unless it is there, and checks its digest.
fetch_wheel() {
  local requirement=$1 sha256=$2 dir=$3 file
  mkdir -p "$dir"
  for file in "$dir"/*.whl; do
    [ -e "$file" ] && echo "$sha256  $file" | sha256sum --check --status 2>/dev/null && { printf '%s\n' "$file"; return; }
  done
  say "downloading $requirement"
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.11 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform any \
    --dest "$dir" "$requirement" >&2
  for file in "$dir"/*.whl; do
    echo "$sha256  $file" | sha256sum --check --status 2>/dev/null && { printf '%s\n' "$file"; return; }
  done
  die "the wheel of $requirement does not have the pinned digest $sha256; delete $dir and try again, or check the registry"
}

# Debian keeps only the newest build of a release's package, so the release is what is pinned.
DEBIAN_RELEASE=12
export DEBIAN_RELEASE

# fetch_debian DIR WHAT PACKAGE…: downloads packages of Debian into DIR; nothing is installed. WHAT needs them.
fetch_debian() {
  local dir=$1 what=$2 tool lists apt
  shift 2
  for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || lacks "$tool is missing: $what from packages of Debian $DEBIAN_RELEASE"
  done
  # shellcheck source=/dev/null
  [ "$(. /etc/os-release && echo "$ID $VERSION_ID")" = "debian $DEBIAN_RELEASE" ] ||
    lacks "this is $(. /etc/os-release && echo "$PRETTY_NAME"); $what from packages of Debian $DEBIAN_RELEASE"
  # Lists of its own: the host's may be missing or old, and are not ours to change.
  lists=$dir/apt
  mkdir -p "$lists/lists/partial" "$lists/cache/archives/partial"
  apt=(apt-get -qq -o "Dir::State::Lists=$lists/lists" -o "Dir::Cache=$lists/cache" -o "APT::Sandbox::User=$(id -un)")
  "${apt[@]}" update >&2 || die "the lists of Debian's packages could not be downloaded"
  (cd "$dir" && "${apt[@]}" download "$@" >&2) || die "Debian's packages could not be downloaded"
  rm -r "$lists"
}
