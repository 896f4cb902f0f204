// No C++ exception may cross into Rust: an entry returns 0, or 1 with a message that ft_last_error gives.

#pragma once

#include <ATen/ATen.h>

#include <c10/core/GradMode.h>

#include <exception>
#include <new>

#ifndef _OPENMP
#error "without OpenMP at::parallel_for is a loop of one thread"
#endif

extern "C" void ft_set_error(const char *message);

template <typename F> int guarded(F body) {
  try {
    c10::AutoGradMode no_grad(false);
    body();
    return 0;
  } catch (const std::bad_alloc &) {
    // As libtorch's own allocators call it; what() is "std::bad_alloc".
    ft_set_error("out of memory");
    return 1;
  } catch (const std::exception &error) {
    ft_set_error(error.what());
    return 1;
  } catch (...) {
    ft_set_error("an exception that is not a std::exception");
    return 1;
  }
}

// The tensor of a handle, which stays the caller's.
inline at::Tensor &tensor(void *handle) { return *static_cast<at::Tensor *>(handle); }

// The elements of a tensor on the CPU, which has to be contiguous and of this dtype and shape.
template <typename T> T *elements(void *handle, const char *name, at::ScalarType type, at::IntArrayRef shape) {
  const at::Tensor &held = tensor(handle);
  TORCH_CHECK(held.is_cpu() && held.is_contiguous() && held.scalar_type() == type && held.sizes() == shape, name,
              " must be contiguous ", type, " ", shape, " on the CPU, found ", held.scalar_type(), " ", held.sizes());
  return static_cast<T *>(held.data_ptr());
}
