// libtorch's profiler: what was computed on this thread between start and stop, and on the device. No exception crosses into
// Rust (guard.h).

#include <ATen/record_function.h>
#include <kineto/ActivityType.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <cstdlib>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "guard.h"

extern "C" {

// `start_ns`, `duration_ns`; `on_device`: a kernel, not the call that launched it; `launched_by`: of a kernel, which of the operations
// told, counted from 0, was the innermost one when it was launched, or -1; `inputs`: dtype and shape of each tensor,
// "c10::BFloat16 4 5;float 5", empty for what is none.
typedef void (*ft_operation)(void *context, const char *name, uint64_t start_ns, uint64_t duration_ns, int on_device,
                             int64_t launched_by, const char *inputs);

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
    // Operations only: kernels and calls of the CUDA runtime have correlation ids too, of another numbering.
    std::unordered_map<uint64_t, int64_t> operations;
    int64_t index = 0;
    for (const auto &event : result->events()) {
      if (event.activityType() == static_cast<uint8_t>(libkineto::ActivityType::CPU_OP)) {
        operations.emplace(event.correlationId(), index);
      }
      ++index;
    }
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
      auto launcher = on_device ? operations.find(event.linkedCorrelationId()) : operations.end();
      int64_t launched_by = launcher == operations.end() ? -1 : launcher->second;
      tell(context, event.name().c_str(), event.startNs(), event.durationNs(), on_device, launched_by, inputs.c_str());
    }
    result->save(trace);
  });
}

// Begins an operation on `inputs` that the profiler shows by this name, which outlives it. `record` is for ft_record_end; null
// where nobody looks.
int ft_record_start(const char *name, void *const *inputs, size_t num_inputs, void **record) {
  return guarded([&] {
    *record = nullptr;
    auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
    if (!callbacks) {
      return;
    }
    std::vector<c10::IValue> values;
    for (size_t at = 0; at < num_inputs; ++at) {
      values.emplace_back(tensor(inputs[at]));
    }
    auto begun = std::make_unique<at::RecordFunction>(std::move(*callbacks));
    begun->before(std::string_view(name), c10::ArrayRef<const c10::IValue>(values.data(), values.size()));
    *record = begun.release();
  });
}

// Ends it.
void ft_record_end(void *record) { delete static_cast<at::RecordFunction *>(record); }
}
