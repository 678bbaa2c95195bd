// SPDX-License-Identifier: Apache-2.0
//
// What the host side of every .cu file needs: an error check, the device, the current stream. A
// file names itself before it includes this: #define KERNEL "gemm.skinny".
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#ifndef KERNEL
#error "define KERNEL, the name that error messages begin with"
#endif

// Throws RuntimeError unless the call returns cudaSuccess. CUDA remembers the error of a call until
// it is asked for: here it is taken, so that it is not reported a second time by whoever asks next.
#define CHECK_CUDA(call)                                                                \
  do {                                                                                  \
    cudaError_t error_ = (call);                                                        \
    if (error_ != cudaSuccess) {                                                        \
      cudaGetLastError();                                                               \
      TVM_FFI_THROW(RuntimeError) << KERNEL << ": " << cudaGetErrorName(error_) << " (" \
                                  << cudaGetErrorString(error_) << ") in " << #call;    \
    }                                                                                   \
  } while (0)

namespace custom_kernels {

// The calling thread's device for one scope; handles and launches belong to the device that is
// current when they are made.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    CHECK_CUDA(cudaGetDevice(&before_));
    if (before_ != device_) CHECK_CUDA(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

// The stream that torch launches on.
inline cudaStream_t current_stream(int device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device));
}

}  // namespace custom_kernels
