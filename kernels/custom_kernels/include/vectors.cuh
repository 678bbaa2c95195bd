// SPDX-License-Identifier: Apache-2.0
//
// Vectors: W neighbouring values of float, half or bfloat16, and what they are in float32. A vector
// has 16 bytes, or is a single value where rows are not aligned to that.
//
// The headers of tvm-ffi take most of a compile: a file that includes them, but for error.h, and
// what only passes arguments on, for the host alone, compiles in half the time. Kernels are
// instantiated outside of that part, since the device's compiler has to see it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlpack/dlpack.h>

#include <cstdint>
#include <type_traits>

namespace custom_kernels {

template <typename T>
constexpr int kWide = 16 / sizeof(T);  // values of a vector of 16 bytes

__device__ inline uint32_t pack(__nv_bfloat16, float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
__device__ inline uint32_t pack(__half, float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
__device__ inline float2 unpack(__nv_bfloat16, uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ inline float2 unpack(__half, uint32_t pair) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

template <typename T, int W>
struct Vector {
  using Raw = std::conditional_t<W != 1, uint4,
                                 std::conditional_t<sizeof(T) == 4, unsigned int, unsigned short>>;
  Raw raw;

  // The vector `index` of a row that is read once.
  __device__ static Vector load(const T* row, int index) {
    return {__ldcs(reinterpret_cast<const Raw*>(row) + index)};
  }
  // Of one that many rows use.
  __device__ static Vector load_shared(const T* row, int index) {
    return {__ldg(reinterpret_cast<const Raw*>(row) + index)};
  }
  __device__ void store(T* row, int index) const { reinterpret_cast<Raw*>(row)[index] = raw; }

  __device__ void unpack(float (&values)[W]) const {
    if constexpr (W == 1 && sizeof(T) == 2) {
      values[0] = custom_kernels::unpack(T{}, raw).x;
    } else {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(&raw);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if constexpr (sizeof(T) == 4)
          values[i] = __uint_as_float(words[i]);
        else if (i % 2 == 0)
          values[i] = custom_kernels::unpack(T{}, words[i / 2]).x;
        else
          values[i] = custom_kernels::unpack(T{}, words[i / 2]).y;
      }
    }
  }
  // Rounded to nearest even.
  __device__ static Vector pack(const float (&values)[W]) {
    Vector vector;
    if constexpr (W == 1 && sizeof(T) == 2) {
      vector.raw = static_cast<unsigned short>(custom_kernels::pack(T{}, values[0], 0.f));
    } else {
      uint32_t* words = reinterpret_cast<uint32_t*>(&vector.raw);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if constexpr (sizeof(T) == 4)
          words[i] = __float_as_uint(values[i]);
        else if (i % 2 == 0)
          words[i / 2] = custom_kernels::pack(T{}, values[i], values[i + 1]);
      }
    }
    return vector;
  }
};

// W values of a row of float32.
template <int W>
__device__ void load_floats(const float* row, int index, float (&values)[W]) {
  constexpr int kPart = W == 1 ? 1 : 4;
#pragma unroll
  for (int part = 0; part < W / kPart; ++part) {
    float some[kPart];
    Vector<float, kPart>::load_shared(row, index * (W / kPart) + part).unpack(some);
#pragma unroll
    for (int i = 0; i < kPart; ++i) values[part * kPart + i] = some[i];
  }
}

// Calls f with a null pointer to the type, and its W: 16 bytes, or 1.
template <typename F>
void with_vectors(DLDataType dtype, bool wide, F f) {
  auto with = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    wide ? f(type, std::integral_constant<int, kWide<T>>{})
         : f(type, std::integral_constant<int, 1>{});
  };
  if (dtype.code == kDLBfloat)
    with(static_cast<__nv_bfloat16*>(nullptr));
  else if (dtype.bits == 16)
    with(static_cast<__half*>(nullptr));
  else
    with(static_cast<float*>(nullptr));
}

// Whether rows start at multiples of 16 bytes.
inline bool aligned(const void* rows, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride_bytes % 16 == 0;
}

}  // namespace custom_kernels
