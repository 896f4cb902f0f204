// libtorch's profiler: what was computed on this thread between start and stop, and on the device. No exception crosses into
// Rust (guard.h).

#include <torch/csrc/autograd/profiler_kineto.h>

#include <cstdlib>
#include <set>
#include <string>

#include "guard.h"

extern "C" {

// `start_ns`, `duration_ns`; `on_device`: a kernel, not the call that launched it; `inputs`: dtype and shape of each tensor,
// "c10::BFloat16 4 5;float 5", empty for what is none.
typedef void (*ft_operation)(void *context, const char *name, uint64_t start_ns, uint64_t duration_ns, int on_device,
                             const char *inputs);

// Follows operations on the CPU, with `cuda` kernels on the device too.
int ft_profile_start(int cuda) {
  return guarded([&] {
    using torch::profiler::impl::ActivityType;
    // Kineto complains of every machine without a GPU.
    setenv("KINETO_LOG_LEVEL", "99", /*overwrite=*/0);
    std::set<ActivityType> activities{ActivityType::CPU};
    if (cuda) {
      activities.insert(ActivityType::CUDA);
    }
    torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO,
                                                 /*report_input_shapes=*/true);
    torch::autograd::profiler::prepareProfiler(config, activities);
    torch::autograd::profiler::enableProfiler(config, activities, {at::RecordScope::FUNCTION});
  });
}

// Ends it, hands over every operation, and writes a Chrome trace.
int ft_profile_stop(const char *trace, ft_operation tell, void *context) {
  return guarded([&] {
    auto result = torch::autograd::profiler::disableProfiler();
    for (const auto &event : result->events()) {
      std::string inputs;
      if (event.hasShapes()) {
        auto shapes = event.shapes();
        auto dtypes = event.hasTypes() ? event.dtypes() : c10::ArrayRef<std::string>();
        for (size_t at = 0; at < shapes.size(); ++at) {
          inputs += at == 0 ? "" : ";";
          inputs += at < dtypes.size() ? dtypes[at] : "";
          for (auto size : shapes[at]) {
            inputs += " " + std::to_string(size);
          }
        }
      }
      int on_device = event.deviceType() != c10::DeviceType::CPU;
      tell(context, event.name().c_str(), event.startNs(), event.durationNs(), on_device, inputs.c_str());
    }
    result->save(trace);
  });
}
}
