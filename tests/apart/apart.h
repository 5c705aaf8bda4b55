#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>

namespace apart {

extern std::atomic<int64_t> allocations;  // of memory of the device, so far
extern std::atomic<bool> waits_are_errors;

void register_hooks();

// The same memory as a tensor of the host.
at::Tensor on_host(const at::Tensor& tensor);

}  // namespace apart
