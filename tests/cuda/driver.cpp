// A libcuda.so.1 without a GPU, for tests: it runs the kernels of trainer/cuda on the CPU, every thread of a block a coroutine,
// on "device memory" that is the host's. cuda.h declares what is defined here, so the compiler holds both to one signature.
//
// Barriers and shuffles are what they are on a GPU. Each warp runs as far as it can before the next one does, and the order
// alternates from launch to launch: a kernel that lacks a barrier, or whose result depends on which thread comes first, is found.
// A barrier that a thread never reaches is an error.

#include <cuda.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

// Blocks run one after another, so what a block shares may be static. Defined before the headers, which then leave it.
#define __shared__ static
#include <cuda_bf16.h>

namespace {

constexpr unsigned WARP_SIZE = 32;

struct Barrier {
  unsigned members, arrived, generation;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier all;
  float exchanged[1024];
  ucontext_t scheduler;
  unsigned current;
  // Whether a thread went on since the scheduler last looked.
  bool progress;
  void (*body)(void *);
  void *arguments;
};

Block block;

void pass() { swapcontext(&block.threads[block.current].context, &block.scheduler); }

void wait(Barrier &barrier) {
  const unsigned generation = barrier.generation;
  block.progress = true;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) {
    pass();
  }
  block.progress = true;
}

} // namespace

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim;

static void __syncthreads() { wait(block.all); }

static float __shfl_xor_sync(unsigned, float value, int distance) {
  Barrier &warp = block.warps[threadIdx.x / WARP_SIZE];
  block.exchanged[threadIdx.x] = value;
  wait(warp);
  const float other = block.exchanged[threadIdx.x ^ static_cast<unsigned>(distance)];
  wait(warp);
  return other;
}

// A name that glibc has taken.
#define __expf expf
static float __fdividef(float a, float b) { return a / b; }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::min;

#include "pointwise.cu"

namespace {

void enter() {
  block.body(block.arguments);
  block.threads[block.current].done = true;
  block.progress = true;
}

// Runs a warp until all its threads wait for others; whether one of them went on.
bool run_warp(unsigned warp, bool backwards) {
  bool went_on = false;
  do {
    block.progress = false;
    for (unsigned turn = 0; turn < WARP_SIZE; ++turn) {
      block.current = warp * WARP_SIZE + (backwards ? WARP_SIZE - 1 - turn : turn);
      if (!block.threads[block.current].done) {
        threadIdx.x = block.current;
        swapcontext(&block.scheduler, &block.threads[block.current].context);
      }
    }
    went_on |= block.progress;
  } while (block.progress);
  return went_on;
}

// Runs one block; false where threads wait for one that will not come.
bool run_block(bool backwards) {
  const unsigned warps = blockDim.x / WARP_SIZE;
  block.all = {blockDim.x, 0, 0};
  block.warps.assign(warps, {WARP_SIZE, 0, 0});
  for (Thread &thread : block.threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &block.scheduler;
    makecontext(&thread.context, enter, 0);
    thread.done = false;
  }
  bool went_on;
  do {
    went_on = false;
    for (unsigned turn = 0; turn < warps; ++turn) {
      went_on |= run_warp(backwards ? warps - 1 - turn : turn, backwards);
    }
  } while (went_on);
  return std::all_of(block.threads.begin(), block.threads.end(), [](const Thread &thread) { return thread.done; });
}

struct Kernel {
  const char *name;
  // Calls the kernel with the values that the launch's parameters point at.
  void (*call)(void *parameters);
};

template <auto kernel> struct Caller;
template <typename... A, void (*kernel)(A...)> struct Caller<kernel> {
  static void call(void *parameters) { call(static_cast<void **>(parameters), std::index_sequence_for<A...>()); }
  template <size_t... I> static void call(void **parameters, std::index_sequence<I...>) {
    kernel(*static_cast<A *>(parameters[I])...);
  }
};

#define KERNEL(name) {#name, Caller<name>::call}
const Kernel KERNELS[] = {
    KERNEL(finetune_swiglu),
    KERNEL(finetune_swiglu_backward),
    KERNEL(finetune_rms_norm),
    KERNEL(finetune_rms_norm_backward),
    KERNEL(finetune_rotate),
    KERNEL(finetune_cross_entropy),
    KERNEL(finetune_dropout),
    KERNEL(finetune_dropout_fp32),
};

// What a context and a module are handles of.
int context, module;
// Each thread of the host has its own.
thread_local CUcontext current;
std::mutex launches;

} // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE    ? "invalid argument"
          : error == CUDA_ERROR_NOT_FOUND      ? "named symbol not found"
          : error == CUDA_ERROR_INVALID_IMAGE  ? "device kernel image is invalid"
          : error == CUDA_ERROR_INVALID_DEVICE ? "invalid device ordinal"
                                               : "unspecified launch failure";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

// Of an H200.
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = 132;
    return CUDA_SUCCESS;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = 9;
    return CUDA_SUCCESS;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = 0;
    return CUDA_SUCCESS;
  default:
    return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice) {
  *found = reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext wanted) {
  current = wanted;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *loaded, const void *image) {
  *loaded = reinterpret_cast<CUmodule>(&module);
  uint32_t magic;
  std::memcpy(&magic, image, sizeof(magic));
  const bool is_aligned = reinterpret_cast<uintptr_t>(image) % 8 == 0;
  return is_aligned && magic == 0xba55ed50u && current != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
  for (const Kernel &kernel : KERNELS) {
    if (std::strcmp(kernel.name, name) == 0) {
      *function = reinterpret_cast<CUfunction>(const_cast<Kernel *>(&kernel));
      return CUDA_SUCCESS;
    }
  }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuLaunchKernel(CUfunction function, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads,
                        unsigned threads_y, unsigned threads_z, unsigned shared_bytes, CUstream stream, void **parameters,
                        void **extra) {
  static bool backwards = false;
  const bool fits = blocks > 0 && blocks_y == 1 && blocks_z == 1 && threads > 0 && threads <= 1024 &&
                    threads % WARP_SIZE == 0 && threads_y == 1 && threads_z == 1 && shared_bytes == 0;
  if (!fits || stream != nullptr || extra != nullptr || current == nullptr) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const std::lock_guard<std::mutex> one_at_a_time(launches);
  const auto *kernel = reinterpret_cast<const Kernel *>(function);
  block.body = kernel->call;
  block.arguments = parameters;
  block.threads.resize(threads);
  for (Thread &thread : block.threads) {
    thread.stack.resize(16384);
  }
  blockDim.x = threads;
  backwards = !backwards;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    if (!run_block(backwards)) {
      return CUDA_ERROR_LAUNCH_FAILED;
    }
  }
  return CUDA_SUCCESS;
}
}
