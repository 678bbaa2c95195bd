// SPDX-License-Identifier: Apache-2.0
//
// y = x · Wᵀ + b for few tokens, as fast as the weights come from memory.
//
//   x [M, K], W [N, K], b [N] or none, y [M, N]; all bfloat16 or all float16; x and W have unit
//   inner stride and any row stride. Sums in float32, rounded once. Made for M <= 16; more rows are
//   done in slices of 16, and each slice streams W again.
//
// With so few tokens a layer costs what it takes to read W once: N·K·2 bytes, at the bandwidth of
// HBM. What is left to do is to have enough bytes on their way at every moment (latency times
// bandwidth is about 3 MB on an H200, 24 KB per SM), and to waste little at either end.
//
//   tile      8·R rows of W by all of K. Blocks walk over tiles; where that gives too few blocks, a
//             cluster of blocks shares one tile, each with its part of K.
//   warp      every `warps * ranks`-th step of 32 along K, for all rows of the tile: the warps of a
//             block read adjacent 64 bytes of each row.
//   lane      lane 4g+t copies 16 bytes (elements 8t to 8t+7 of the step) of row g of W, R times,
//             and of tokens g and g+8 of x. It copies exactly what it multiplies itself: shared
//             memory is a queue of D steps per lane, without a barrier anywhere in the loop.
//   multiply  mma m16n8k16: 16 tokens by 8 rows of W. The order of K within a step is free as long
//             as x and W agree, so that the 16 bytes of a lane are its fragments of two mma.
//   sum       partial sums go through shared memory and are added in a fixed order, over warps and
//             then over the blocks of a cluster: the same call gives the same bits.
//
// The queue runs across tiles: while one is summed, the next is on its way.
//
// dtypes: bfloat16 float16

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>

#define KERNEL "gemm.skinny"
#include "include/launch.cuh"

namespace {

using custom_kernels::current_stream;
using custom_kernels::DeviceGuard;
using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int kSlice = 16;      // tokens per block
constexpr int kStep = 32;       // elements of K per step of a warp
constexpr int kMaxWarps = 16;   // per block
constexpr int kRowsSums = 136;  // floats per 16 by 8 partial sums; 128 would put all into one bank

struct Problem {
  const void *x, *w, *bias;
  void* y;
  int64_t m, n, k, x_stride, w_stride;
};

// ---- One lane's instructions
// ------------------------------------------------------------------------------------------------

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes behind the thread's back, or writes zeros. x stays in L1 for the next tile, W
// passes by.
template <bool kKeep>
__device__ void copy_async(uint32_t to, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  if constexpr (kKeep)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
                 "r"(bytes)
                 : "memory");
}

__device__ void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ void store_shared(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// 8 elements of a row from `at` on, zeros where there are none. `kVector`: K is a multiple of 8 and
// every row starts at a multiple of 16 bytes.
template <typename T, bool kVector, bool kKeep>
__device__ void fetch(uint32_t to, const T* row, int64_t at, int64_t k, bool inside) {
  if constexpr (kVector) {
    inside = inside && at < k;
    copy_async<kKeep>(to, inside ? row + at : row, inside);
  } else {
    union {
      uint16_t elements[8];
      uint4 vector;
    } both;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      both.elements[i] =
          inside && at + i < k ? reinterpret_cast<const uint16_t*>(row)[at + i] : uint16_t{0};
    store_shared(to, both.vector);
  }
}

template <typename T>
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1);

template <>
__device__ void multiply<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ void multiply<__half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                 uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- The kernel
// ------------------------------------------------------------------------------------------------

// R: tile of 8·R rows of W. D: steps in a lane's queue. Launched in clusters of `ranks` blocks.
template <typename T, int R, int D, bool kVector>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) skinny(const Problem p, const int ranks) {
  extern __shared__ __align__(16) char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int rank = blockIdx.x % ranks;
  const int64_t first_tile = blockIdx.x / ranks, next_tile = gridDim.x / ranks;
  const int64_t tiles = (p.n + 8 * R - 1) / (8 * R);
  const int stride = ranks * warps, first_step = rank * warps + warp;
  // At least one: the launch sees to it that no warp is without work.
  const int steps = ((p.k + kStep - 1) / kStep - first_step + stride - 1) / stride;

  const int64_t first_token = int64_t{blockIdx.y} * kSlice;
  const int tokens = static_cast<int>(min(p.m - first_token, int64_t{kSlice}));
  const bool two = tokens > 8;
  const T* x0 = static_cast<const T*>(p.x) + (first_token + min(g, tokens - 1)) * p.x_stride;
  const T* x1 = static_cast<const T*>(p.x) + (first_token + min(g + 8, tokens - 1)) * p.x_stride;

  const uint32_t slots = R + (two ? 2 : 1);  // 16 bytes for each lane of a warp: W's, then x's
  const uint32_t queue = shared_address(memory) + (warp * D * slots * 32 + lane) * 16;
  const uint32_t stage_bytes = slots * 32 * 16;
  float* sums = reinterpret_cast<float*>(memory + warps * D * stage_bytes);  // [warp][R][16][8]
  float* own = sums + warps * R * kRowsSums;                                 // [16][8·R]
  float* bias = own + kSlice * 8 * R;                                        // [8·R]

  // What is copied next.
  int64_t tile = first_tile;
  int step = 0;
  uint32_t to = queue;
  const T* row = static_cast<const T*>(p.w) + (tile * 8 * R + g) * p.w_stride;

  custom_kernels::wait_for_previous_kernel();

  const auto copy_next = [&] {
    if (tile < tiles) {
      const int64_t at = (int64_t{step} * stride + first_step) * kStep + 8 * t;
      const T* from = row;
#pragma unroll
      for (int r = 0; r < R; ++r, from += 8 * p.w_stride)
        fetch<T, kVector, false>(to + r * 512, tile * 8 * R + 8 * r + g < p.n ? from : row, at, p.k,
                                 tile * 8 * R + 8 * r + g < p.n);
      fetch<T, kVector, true>(to + R * 512, x0, at, p.k, g < tokens);
      if (two) fetch<T, kVector, true>(to + (R + 1) * 512, x1, at, p.k, g + 8 < tokens);
      if (++step == steps) {
        step = 0;
        tile += next_tile;
        row += next_tile * 8 * R * p.w_stride;
      }
      to = to + stage_bytes == queue + D * stage_bytes ? queue : to + stage_bytes;
    }
    if constexpr (kVector) commit();
  };

#pragma unroll 1
  for (int d = 0; d < D - 1; ++d) copy_next();

  uint32_t from = queue;
  for (int64_t current = first_tile; current < tiles; current += next_tile) {
    // Asked for now, needed at the end.
    const int64_t biased = current * 8 * R + threadIdx.x;
    float own_bias = 0.f;
    if (p.bias != nullptr && threadIdx.x < 8 * R && biased < p.n)
      own_bias = static_cast<float>(static_cast<const T*>(p.bias)[biased]);

    float c[R][4] = {};
    for (int i = 0; i < steps; ++i) {
      if constexpr (kVector) wait<D - 2>();
      const uint4 a = load_shared(from + R * 512);
      uint4 b = {0, 0, 0, 0};
      if (two) b = load_shared(from + (R + 1) * 512);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const uint4 w = load_shared(from + r * 512);
        multiply<T>(c[r], a.x, b.x, a.y, b.y, w.x, w.y);
        multiply<T>(c[r], a.z, b.z, a.w, b.w, w.z, w.w);
      }
      from = from + stage_bytes == queue + D * stage_bytes ? queue : from + stage_bytes;
      copy_next();
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
      float* mine = sums + (warp * R + r) * kRowsSums + 8 * g + 2 * t;
      *reinterpret_cast<float2*>(mine) = {c[r][0], c[r][1]};
      if (two) *reinterpret_cast<float2*>(mine + 64) = {c[r][2], c[r][3]};
    }
    if (threadIdx.x < 8 * R) bias[threadIdx.x] = own_bias;
    __syncthreads();

    const auto write = [&](int index, float sum) {
      const int64_t token = first_token + index / (8 * R), n = current * 8 * R + index % (8 * R);
      if (n < p.n)
        static_cast<T*>(p.y)[token * p.n + n] = static_cast<T>(sum + bias[index % (8 * R)]);
    };
    for (int index = threadIdx.x; index < tokens * 8 * R; index += blockDim.x) {
      const int token = index / (8 * R), r = index % (8 * R) / 8, column = index % 8;
      float sum = 0.f;
      for (int i = 0; i < warps; ++i) sum += sums[(i * R + r) * kRowsSums + 8 * token + column];
      if (ranks == 1)
        write(index, sum);
      else
        own[index] = sum;
    }
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) {
      namespace cg = cooperative_groups;
      cg::cluster_group cluster = cg::this_cluster();
      cluster.sync();
      for (int index = rank * blockDim.x + threadIdx.x; index < tokens * 8 * R;
           index += ranks * blockDim.x) {
        float sum = 0.f;
        for (int i = 0; i < ranks; ++i) sum += cluster.map_shared_rank(own, i)[index];
        write(index, sum);
      }
      cluster.sync();  // nobody leaves or goes on while others read
      continue;
    }
#endif
    __syncthreads();
  }
}

// ---- The launch
// ------------------------------------------------------------------------------------------------

struct Config {
  int r;       // a tile has 8·r rows of W
  int warps;   // per block
  int ranks;   // blocks that share a tile
  int blocks;  // per SM, at most
};

struct Device {
  int multiprocessors, major, shared;
};

Device device_of(int index) {
  Device device;
  CHECK_CUDA(
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  CHECK_CUDA(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index));
  CHECK_CUDA(
      cudaDeviceGetAttribute(&device.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return device;
}

template <typename T, int R, int D, bool kVector>
void launch(const Problem& p, Config config, const Device& device, cudaStream_t stream) {
  // No warp without work, and no more than fit.
  const int64_t steps = (p.k + kStep - 1) / kStep;
  if (device.major < 9) config.ranks = 1;
  while (config.ranks > 1 && config.ranks * config.warps > steps) config.ranks /= 2;
  const size_t slots = R + (p.m > 8 ? 2 : 1);
  const size_t warp_bytes = D * slots * 512 + R * kRowsSums * 4, rest = (kSlice + 1) * 8 * R * 4;
  config.warps = static_cast<int>(std::min<int64_t>(
      {config.warps, steps, kMaxWarps, int64_t((device.shared - rest) / warp_bytes)}));
  const size_t shared = config.warps * warp_bytes + rest;

  const int64_t tiles = (p.n + 8 * R - 1) / (8 * R);
  const int64_t places = std::max(1, device.multiprocessors * config.blocks / config.ranks);
  const int64_t rounds = (tiles + places - 1) / places;
  const int64_t clusters = (tiles + rounds - 1) / rounds;

  const auto kernel = skinny<T, R, D, kVector>;
  if (shared > 48 << 10)
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)));
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3(clusters * config.ranks, (p.m + kSlice - 1) / kSlice);
  how.blockDim = dim3(32 * config.warps);
  how.dynamicSmemBytes = shared;
  how.stream = stream;
  cudaLaunchAttribute attributes[2];
  how.attrs = attributes;
  if (device.major >= 9) attributes[how.numAttrs++] = custom_kernels::early_launch();
  if (config.ranks > 1) {
    attributes[how.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[how.numAttrs].val.clusterDim.x = config.ranks;
    attributes[how.numAttrs].val.clusterDim.y = 1;
    attributes[how.numAttrs++].val.clusterDim.z = 1;
  }
  CHECK_CUDA(cudaLaunchKernelEx(&how, kernel, p, config.ranks));
}

template <typename T>
void dispatch(const Problem& p, const Config& config, const Device& device, cudaStream_t stream) {
  const bool vector = ((reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.w) |
                        p.k * 2 | p.x_stride * 2 | p.w_stride * 2) &
                       15) == 0;
  if (!vector) return launch<T, 1, 2, false>(p, config, device, stream);
  switch (config.r) {
    case 1:
      return launch<T, 1, 8, true>(p, config, device, stream);
    case 2:
      return launch<T, 2, 5, true>(p, config, device, stream);
    case 3:
      return launch<T, 3, 4, true>(p, config, device, stream);
    case 4:
      return launch<T, 4, 4, true>(p, config, device, stream);
    case 5:
      return launch<T, 5, 3, true>(p, config, device, stream);
  }
  TVM_FFI_THROW(ValueError) << KERNEL ": no kernel with tiles of 8 times " << config.r << " rows";
}

// Large tiles read x less often, but only an even share per SM keeps all of them at
// work: so the largest tile whose share is even. Numbers measured on an H200, cold L2.
Config choose(const Problem& p, const Device& device) {
  const int64_t tokens = std::min<int64_t>(p.m, kSlice);
  if (p.n * p.k < int64_t{3} << 19) return {2, p.k < 1024 ? 10 : 16, 1, 1};  // bound by latency
  int best = 1;
  double best_share = 0;
  for (const int r : {5, 4, 3, 2, 1}) {
    const int64_t tiles = (p.n + 8 * r - 1) / (8 * r);
    const int64_t rounds = (tiles + device.multiprocessors - 1) / device.multiprocessors;
    const double share = double(tiles) / double(rounds * device.multiprocessors);
    if (share > best_share + 0.02) best = r, best_share = share;
  }
  const int64_t tiles = (p.n + 8 * best - 1) / (8 * best);
  // Few rows and long ones: x would be read for every 8 rows of W. Rather share K in a cluster.
  if (tiles <= device.multiprocessors && best < 3 && tokens > 4 && p.k >= 2048)
    return {4, 10, 4, 1};
  if (tiles <= device.multiprocessors)
    return tokens > 1 && p.k >= 8192 ? Config{best, 6, 2, 3} : Config{best, 14, 1, 1};
  return {best, p.k < 2048 ? 4 : 8, 1, p.k < 2048 ? 4 : 2};
}

void run_as(TensorView x, TensorView w, Optional<TensorView> b, TensorView y,
            Array<int64_t> numbers) {
  const int index = x.device().device_id;
  const DeviceGuard guard(index);
  const auto stream = current_stream(index);
  Problem p;
  p.m = x.size(0), p.n = w.size(0), p.k = x.size(1);
  // The distance between rows means nothing where there is one row.
  p.x_stride = p.m == 1 ? p.k : x.stride(0), p.w_stride = p.n == 1 ? p.k : w.stride(0);
  p.x = x.data_ptr(), p.w = w.data_ptr(), p.y = y.data_ptr();
  p.bias = b.has_value() ? b.value().data_ptr() : nullptr;
  const Device device = device_of(index);
  Config config = choose(p, device);
  if (numbers.size() == 4)
    config = {int(numbers[0]), int(numbers[1]), int(numbers[2]), int(numbers[3])};
  if (x.dtype().code == kDLBfloat)
    dispatch<__nv_bfloat16>(p, config, device, stream);
  else
    dispatch<__half>(p, config, device, stream);
}

void gemm(TensorView x, TensorView w, Optional<TensorView> b, TensorView y) {
  run_as(x, w, b, y, {});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm, gemm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_as, run_as);
