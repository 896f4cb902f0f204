#!/usr/bin/env bash
# Runs the tests of what computes, and a tiny job of each method and optimizer, on an emulated processor that has AVX2 and no
# AVX-512. They prove that nothing there needs an instruction that it lacks; what they compute is tested on real ones.
source "$(dirname "$0")/common.sh"

# The trainer's modules that compute.
COMPUTING=(compute:: generate:: model:: train:: weights::)

emulator=$("$REPO/tools/stage-qemu.sh") || { status=$?; [ $status = 3 ] && say "skipped: needs QEMU: the tests on an emulated processor" && exit; exit $status; }
host=$(rustc -vV | sed -n 's/^host: //p')
[ "$host" = x86_64-unknown-linux-gnu ] || { say "skipped: needs x86_64-unknown-linux-gnu, this is $host: the tests on an emulated processor"; exit; }
# The tests see to it that this is what they run on.
export FINETUNE_TEST_INSTRUCTIONS=avx2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cd "$REPO"
{
  CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$emulator cargo test --release --workspace --lib -- "${COMPUTING[@]}"
  FINETUNE_EMULATOR=$emulator cargo test --release --workspace --test it -- processors::
} 2>&1 | tee "$log"
for test in compute::shim::cpu::tests::every_kernel_of_the_table_runs_or_refuses processors::full_with_both; do
  grep -q "test $test ... ok" "$log" || die "$test did not run on the emulated processor; has it another name?"
done
