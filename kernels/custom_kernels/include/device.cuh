// SPDX-License-Identifier: Apache-2.0
//
// A device's limits, and the launch of a kernel that may begin before the previous one has ended.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "include/launch.cuh"

namespace custom_kernels {

struct Device {
  int multiprocessors, shared_bytes, major;

  static const Device& get(int index) {
    static Device devices[64] = {};
    Device& device = devices[index % 64];
    if (device.multiprocessors == 0) {
      int multiprocessors;
      CHECK_CUDA(cudaDeviceGetAttribute(&device.shared_bytes,
                                        cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
      CHECK_CUDA(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index));
      CHECK_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
      device.multiprocessors = multiprocessors;  // last: it says that the rest is there
    }
    return device;
  }
};

constexpr int kStaticShared = 1024;  // more than any kernel's own

// In the chain of kernels that may each start before the one before it has ended.
__device__ inline void take_turn() {
  wait_for_previous_kernel();
  launch_next_kernel();
}

template <typename... Parameters, typename... Values>
void launch(void (*kernel)(Parameters...), int device, cudaStream_t stream, int64_t blocks,
            dim3 threads, int64_t shared_bytes, Values... values) {
  if (shared_bytes + kStaticShared > 48 << 10)
    CHECK_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Device::get(device).shared_bytes - kStaticShared));
  cudaLaunchAttribute attribute = early_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = Device::get(device).major >= 9 ? 1 : 0;
  CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(values)...));
}

}  // namespace custom_kernels
