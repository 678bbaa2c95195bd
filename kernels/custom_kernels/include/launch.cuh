// SPDX-License-Identifier: Apache-2.0
//
// What every .cu file needs: on the host an error check, the device, the current stream; and both
// halves of a launch that may begin before the previous kernel has ended. A file names itself
// before it includes this: #define KERNEL "gemm.skinny".
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

// Programmatic dependent launch, compute capability 9.0 and above: with this attribute the blocks
// of a kernel may start while the last ones of the previous kernel in the stream run, so that
// starting them costs no time. The kernel must call wait_for_previous_kernel() before it reads what
// that one wrote, or writes what that one reads.
inline cudaLaunchAttribute early_launch() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start early as soon as every block has called this or ended.
__device__ __forceinline__ void launch_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace custom_kernels
