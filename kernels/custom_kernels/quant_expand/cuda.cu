// SPDX-License-Identifier: Apache-2.0
//
// q, scale = per-token quantization of x, expanded for a (2N-2):2N pattern.
//
//   x [M, K] bfloat16 or float16, unit inner stride, any row stride;
//   q [M, K'] int8 or float8_e4m3fn; scale [M] float32. Per row, in float32:
//   amax = max |x|, inv = qmax / amax, scale = amax / qmax, q = round(x · inv).
//   What is right is in reference.py, bit for bit; the order of a row of q in sparsity.py.
//
// The work is memory traffic: 2·K bytes in, K' out. A row is read once, into shared memory. From
// there every thread takes chunks of whole groups, quantizes them pair by pair, and joins
// neighbouring pairs into windows: a chunk is 16 contiguous bytes of the even section and 8 or 16
// of the odd one, so that all loads and stores are wide and nothing is gathered. Zeros behind the
// row in shared memory become the sections' padding.
//
// A team of warps has a row, a block has one or several teams. A row comes to its team in one of
// three ways:
//
//   bulk    by TMA's bulk copy (compute capability 9.0; rows aligned to 16 bytes): one thread
//           asks for the whole row, so that reading it holds up no registers and no instructions;
//   loads   by ordinary loads of 16 bytes, or of 2 where rows are not aligned;
//   tiles   for rows beyond shared memory: read twice, tile by tile.
//
// Blocks stay small and many, and the SM overlaps one's reading with another's writing:
// on an H200 that was faster than blocks that stay and prefetch their next rows into a ring. From
// compute capability 9.0 on the launch overlaps the end of the kernel before it.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define KERNEL "quant_expand.cuda"
#include "include/launch.cuh"

namespace {

using custom_kernels::current_stream;
using custom_kernels::DeviceGuard;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;

constexpr int kWarps = 16;      // of a block, except with tiles
constexpr int kTileWarps = 32;  // of a block with tiles

// ---- Formats ------------------------------------------------------------------------------------

// Two input values in a word, the first one low.
struct BFloat16 {
  static constexpr uint32_t kOne = 0x3f80;
  static __device__ float low(uint32_t word) { return __uint_as_float(word << 16); }
  static __device__ float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  static __device__ uint32_t max_abs(uint32_t a, uint32_t b) {
    __nv_bfloat162 wide = __hmax2_nan(as(a), __habs2(as(b)));
    return *reinterpret_cast<uint32_t*>(&wide);
  }
  static __device__ __nv_bfloat162 as(uint32_t word) {
    return *reinterpret_cast<__nv_bfloat162*>(&word);
  }
};

struct Float16 {
  static constexpr uint32_t kOne = 0x3c00;
  static __device__ float low(uint32_t word) { return __low2float(as(word)); }
  static __device__ float high(uint32_t word) { return __high2float(as(word)); }
  static __device__ uint32_t max_abs(uint32_t a, uint32_t b) {
    __half2 wide = __hmax2_nan(as(a), __habs2(as(b)));
    return *reinterpret_cast<uint32_t*>(&wide);
  }
  static __device__ __half2 as(uint32_t word) { return *reinterpret_cast<__half2*>(&word); }
};

// Two quantized values in the low half of a word; the high half is anything.
struct Int8 {
  static constexpr float kMax = 127.f;
  // Adding 1.5 · 2^23 rounds to an integer, to nearest even, and leaves it in the low bits.
  static __device__ uint32_t round(float value) {
    return __float_as_uint(__fadd_rn(value, 12582912.f));
  }
  static __device__ uint32_t pair(float low, float high) {
    return __byte_perm(round(low), round(high), 0x0040);
  }
};

struct Float8 {
  static constexpr float kMax = 448.f;
  static __device__ uint32_t pair(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
  }
};

// ---- The layout of a row ------------------------------------------------------------------------

constexpr int kAny = 0;  // any N, known at run time

// A thread's share of a row, as small as it can be while its parts of both sections stay aligned.
template <int N>
struct Chunk {
  static constexpr int kGroups = N == kAny ? 16 : N <= 3 ? 4 : 2;
  static constexpr int kEven = kGroups * 4 * (N / 2);       // bytes in the even section
  static constexpr int kOdd = kGroups * 4 * ((N - 1) / 2);  // bytes in the odd section
  static constexpr int kWords = kGroups * N;                // pairs of input values
};

struct Layout {
  int k;
  int n;          // of the pattern; 2 where nothing is expanded
  int odd_start;  // bytes from the start of a row of q ...
  int odd_end;
  int end;          // ... which is K'
  int chunks;       // that cover both sections, padding included
  int chunk_words;  // pairs of input values in a chunk
  // 2^32 / windows of a group in a section, rounded up; 0 for one window. For N = kAny.
  uint32_t even_inverse, odd_inverse;

  // Bytes of a row in shared memory, with the zeros behind it.
  __host__ __device__ int64_t row_bytes() const {
    return (int64_t{chunks} * chunk_words * 4 + 127) / 128 * 128;
  }
};

// What a row is multiplied with.
struct Factor {
  float inverse;
  int rare;  // see plain_values

  __device__ Factor(float amax, float qmax) : inverse(qmax / amax), rare(0) {
    if (!(amax > 0.f && amax <= FLT_MAX)) {
      inverse = 0.f, rare = 1;
    } else if (inverse > FLT_MAX) {
      inverse = qmax, rare = 2;
    }
  }
};

// Rewrite two values of a row that the common path would get wrong: 1, a row of zeros or with an
// infinity or a NaN, all of which become zero; 2, a row so small that qmax / amax is infinite, of
// which all but the zeros become ±qmax.
template <typename In>
__device__ uint32_t plain_values(uint32_t word, int rare) {
  if (rare == 1) return 0;
  uint32_t low = word & 0x7fff ? (word & 0x8000) | In::kOne : 0;
  uint32_t high = word & 0x7fff0000 ? (word & 0x80000000u) | In::kOne << 16 : 0;
  return high | low;
}

template <typename In, typename Out>
__device__ uint32_t quantize(uint32_t word, float inverse) {
  return Out::pair(__fmul_rn(In::low(word), inverse), __fmul_rn(In::high(word), inverse));
}

__device__ uint32_t window(uint32_t pair, uint32_t next) { return __byte_perm(pair, next, 0x5410); }

// Copy words, aligned to as much as their number allows.
template <int Words>
__device__ void copy(uint32_t* to, const uint32_t* from) {
  using Wide = std::conditional_t<Words % 4 == 0, uint4,
                                  std::conditional_t<Words % 2 == 0, uint2, uint32_t>>;
#pragma unroll
  for (int i = 0; i < Words * 4 / int(sizeof(Wide)); ++i)
    reinterpret_cast<Wide*>(to)[i] = reinterpret_cast<const Wide*>(from)[i];
}

// Quantize, expand and write the chunks [first, last) of a row, of which `words` holds the values.
template <typename In, typename Out, int N>
__device__ void emit(const uint32_t* words, const Layout& layout, int first, int last, int thread,
                     int threads, Factor factor, char* q) {
  if constexpr (N != kAny) {
    using C = Chunk<N>;
    for (int chunk = first + thread; chunk < last; chunk += threads) {
      alignas(16) uint32_t pairs[C::kWords];
      copy<C::kWords>(pairs, words + (chunk - first) * C::kWords);
      if (factor.rare) {
#pragma unroll
        for (uint32_t& pair : pairs) pair = plain_values<In>(pair, factor.rare);
      }
#pragma unroll
      for (uint32_t& pair : pairs) pair = quantize<In, Out>(pair, factor.inverse);
      alignas(16) uint32_t even[C::kEven / 4], odd[C::kOdd / 4 + 1];
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
#pragma unroll
        for (int j = 0; j < N - 1; ++j) {
          uint32_t joined = window(pairs[group * N + j], pairs[group * N + j + 1]);
          if (j % 2 == 0)
            even[group * (N / 2) + j / 2] = joined;
          else
            odd[group * ((N - 1) / 2) + j / 2] = joined;
        }
      }
      if (chunk * C::kEven < layout.odd_start)
        copy<C::kEven / 4>(reinterpret_cast<uint32_t*>(q + chunk * C::kEven), even);
      if constexpr (C::kOdd > 0) {
        int place = layout.odd_start + chunk * C::kOdd;
        if (place < layout.odd_end) copy<C::kOdd / 4>(reinterpret_cast<uint32_t*>(q + place), odd);
      }
    }
  } else {
    // One window at a time: neighbouring threads write neighbouring words.
    auto section = [&](int parity, int start, int end) {
      int count = parity ? (layout.n - 1) / 2 : layout.n / 2;  // windows of a group in this section
      uint32_t inverse = parity ? layout.odd_inverse : layout.even_inverse;
      int stop = min(last * 16 * count, (end - start) / 4);
      for (int i = first * 16 * count + thread; i < stop; i += threads) {
        int group = inverse ? __umulhi(i, inverse) : i;
        const uint32_t* from =
            words + (group - first * 16) * layout.n + 2 * (i - group * count) + parity;
        uint32_t low = from[0], high = from[1];
        if (factor.rare) {
          low = plain_values<In>(low, factor.rare), high = plain_values<In>(high, factor.rare);
        }
        reinterpret_cast<uint32_t*>(q + start)[i] =
            window(quantize<In, Out>(low, factor.inverse), quantize<In, Out>(high, factor.inverse));
      }
    };
    section(0, 0, layout.odd_start);
    if (layout.n > 2) section(1, layout.odd_start, layout.odd_end);
  }
}

__device__ void pad(const Layout& layout, int thread, int threads, char* q) {
  for (int place = layout.odd_end + thread * 16; place < layout.end; place += threads * 16)
    *reinterpret_cast<uint4*>(q + place) = make_uint4(0, 0, 0, 0);
}

// ---- Teams of warps -----------------------------------------------------------------------------

struct Team {
  int warps, index, thread, threads;

  __device__ explicit Team(int warps_) : warps(warps_), threads(warps_ * 32) {
    index = threadIdx.x / threads;
    thread = threadIdx.x - index * threads;
  }
  __device__ void sync() const {
    if (warps == 1)
      __syncwarp();
    else
      asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(threads) : "memory");
  }
  // The largest value that any thread found. Bits of absolute values order like the values, NaN
  // above infinity. `partial` has a word per warp; the call is a barrier for the team.
  template <typename In>
  __device__ float max_abs(uint32_t found, uint32_t* partial) const {
    uint32_t bits =
        max(__float_as_uint(In::low(found)), __float_as_uint(In::high(found))) & 0x7fffffffu;
    bits = __reduce_max_sync(0xffffffffu, bits);
    if (warps > 1) {
      if (thread % 32 == 0) partial[thread / 32] = bits;
      sync();
      bits = __reduce_max_sync(0xffffffffu, thread % 32 < warps ? partial[thread % 32] : 0);
    } else {
      sync();
    }
    return __uint_as_float(bits);
  }
};

template <typename Out>
__device__ void write_scale(float* scale, float amax) {
  *scale = amax <= FLT_MAX ? amax / Out::kMax : __uint_as_float(0x7fc00000u);
}

// ---- Kernels ------------------------------------------------------------------------------------

struct Arguments {
  const uint16_t* x;
  char* q;
  float* scale;
  int64_t rows, stride;  // of x, in elements
  Layout layout;
  int warps;     // of a team
  bool aligned;  // every row of x to 16 bytes
  bool bulk;
};

// In the chain of kernels that may each start before the one before it has ended.
__device__ void take_turn() {
  custom_kernels::wait_for_previous_kernel();
  custom_kernels::launch_next_kernel();
}

template <typename In>
__device__ uint32_t max_abs(uint32_t found, uint4 values) {
  found = In::max_abs(In::max_abs(found, values.x), values.y);
  return In::max_abs(In::max_abs(found, values.z), values.w);
}

// Put `count` values of a row into shared memory, zeros behind them up to `total`; returns the
// largest of those that this thread saw.
template <typename In>
__device__ uint32_t load(const uint16_t* x, int count, int total, bool aligned, const Team& team,
                         uint32_t* words) {
  constexpr int kBatch = 4;  // loads in flight
  uint32_t found = 0;
  int vectors = aligned ? count / 8 : 0;
  for (int start = team.thread; start < vectors; start += kBatch * team.threads) {
    uint4 batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int vector = start + i * team.threads;
      if (vector < vectors) batch[i] = __ldcs(reinterpret_cast<const uint4*>(x) + vector);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int vector = start + i * team.threads;
      if (vector < vectors) {
        found = max_abs<In>(found, batch[i]);
        reinterpret_cast<uint4*>(words)[vector] = batch[i];
      }
    }
  }
#pragma unroll 8
  for (int i = vectors * 8 + team.thread; i < total; i += team.threads) {
    uint16_t value = i < count ? x[i] : uint16_t{0};
    found = In::max_abs(found, value);
    reinterpret_cast<uint16_t*>(words)[i] = value;
  }
  return found;
}

#if __CUDA_ARCH__ >= 900
// The same for a whole row of which every part is aligned, by TMA's bulk copy.
template <typename In>
__device__ uint32_t fetch(const uint16_t* x, int count, int total, uint64_t* barrier,
                          const Team& team, uint32_t* words) {
  const uint32_t full = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  if (team.thread == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    // The rest of the team waits with this thread: for the row.
    take_turn();
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full),
                 "r"(count * 2)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(words))),
        "l"(x), "r"(count * 2), "r"(full)
        : "memory");
  }
  for (int i = count / 2 + team.thread; i < total / 2; i += team.threads) words[i] = 0;
  team.sync();  // the barrier exists
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(full)
      : "memory");
  uint32_t found = 0;
#pragma unroll 4
  for (int i = team.thread; i < count / 8; i += team.threads)
    found = max_abs<In>(found, reinterpret_cast<const uint4*>(words)[i]);
  return found;
}
#endif

extern __shared__ __align__(128) unsigned char shared[];

template <typename In, typename Out, int N>
__global__ void __launch_bounds__(kWarps * 32, 2) whole_rows(const __grid_constant__ Arguments a) {
  __shared__ uint32_t partial[kWarps];
  __shared__ __align__(8) uint64_t barriers[kWarps];
  const Team team(a.warps);
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / team.threads) + team.index;
  if (row >= a.rows) return;
  const uint16_t* x = a.x + row * a.stride;
  uint32_t* words = reinterpret_cast<uint32_t*>(shared + team.index * a.layout.row_bytes());
  const int total = a.layout.chunks * a.layout.chunk_words * 2;
  uint32_t found;
#if __CUDA_ARCH__ >= 900
  if (a.bulk) {
    found = fetch<In>(x, a.layout.k, total, barriers + team.index, team, words);
  } else
#endif
  {
    take_turn();
    found = load<In>(x, a.layout.k, total, a.aligned, team, words);
  }
  const float amax = team.max_abs<In>(found, partial + team.index * team.warps);
  char* q = a.q + row * a.layout.end;
  emit<In, Out, N>(words, a.layout, 0, a.layout.chunks, team.thread, team.threads,
                   Factor(amax, Out::kMax), q);
  pad(a.layout, team.thread, team.threads, q);
  if (team.thread == 0) write_scale<Out>(a.scale + row, amax);
}

// A block per row; the row is read once for its maximum and again tile by tile.
template <typename In, typename Out>
__global__ void __launch_bounds__(kTileWarps * 32)
    tiled_rows(const __grid_constant__ Arguments a, int tile_chunks) {
  __shared__ uint32_t partial[kTileWarps];
  take_turn();
  const Team team(a.warps);
  const int64_t row = blockIdx.x;
  const uint16_t* x = a.x + row * a.stride;
  char* q = a.q + row * a.layout.end;
  uint32_t found = 0;
  const int vectors = a.aligned ? a.layout.k / 8 : 0;
#pragma unroll 4
  for (int i = team.thread; i < vectors; i += team.threads)
    found = max_abs<In>(found, reinterpret_cast<const uint4*>(x)[i]);
#pragma unroll 8
  for (int i = vectors * 8 + team.thread; i < a.layout.k; i += team.threads)
    found = In::max_abs(found, x[i]);
  const float amax = team.max_abs<In>(found, partial);
  uint32_t* words = reinterpret_cast<uint32_t*>(shared);
  for (int chunk = 0; chunk < a.layout.chunks; chunk += tile_chunks) {
    int last = min(chunk + tile_chunks, a.layout.chunks);
    int start = chunk * a.layout.chunk_words * 2, total = (last - chunk) * a.layout.chunk_words * 2;
    team.sync();
    load<In>(x + start, min(total, a.layout.k - start), total, a.aligned, team, words);
    team.sync();
    emit<In, Out, kAny>(words, a.layout, chunk, last, team.thread, team.threads,
                        Factor(amax, Out::kMax), q);
  }
  pad(a.layout, team.thread, team.threads, q);
  if (team.thread == 0) write_scale<Out>(a.scale + row, amax);
}

// ---- Launch -------------------------------------------------------------------------------------

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

enum Way { kBulk, kLoads, kTiles };

struct Schedule {
  Way way;
  int warps;  // of a team
  int teams;  // of a block
};

constexpr int kStaticShared = 1024;  // more than any kernel's own

Layout layout_of(int64_t k, int n, int64_t end) {
  auto up = [](int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  };
  Layout layout{};
  int64_t groups = (k + 2 * n - 1) / (2 * n);
  int64_t odd_start = up(groups * 4 * (n / 2), 16);
  layout.k = static_cast<int>(k);
  layout.n = n;
  layout.odd_start = static_cast<int>(odd_start);
  layout.odd_end = static_cast<int>(odd_start + up(groups * 4 * ((n - 1) / 2), 16));
  layout.end = static_cast<int>(end);
  auto cover = [&](int groups_per_chunk) {
    int64_t even = groups_per_chunk * 4 * (n / 2), odd = groups_per_chunk * 4 * ((n - 1) / 2);
    layout.chunk_words = groups_per_chunk * n;
    layout.chunks = static_cast<int>((odd_start + even - 1) / even);
    if (odd)
      layout.chunks = std::max<int>(layout.chunks, (layout.odd_end - odd_start + odd - 1) / odd);
  };
  cover(n == 2   ? Chunk<2>::kGroups
        : n == 3 ? Chunk<3>::kGroups
        : n == 4 ? Chunk<4>::kGroups
        : n == 5 ? Chunk<5>::kGroups
                 : Chunk<kAny>::kGroups);
  auto inverse = [](uint32_t d) {
    return d > 1 ? static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d) : 0;
  };
  layout.even_inverse = inverse(n / 2), layout.odd_inverse = inverse((n - 1) / 2);
  return layout;
}

template <typename... Parameters, typename... Values>
void launch(void (*kernel)(Parameters...), int device, cudaStream_t stream, int64_t blocks,
            int threads, int64_t shared_bytes, Values... values) {
  if (shared_bytes + kStaticShared > 48 << 10)
    CHECK_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Device::get(device).shared_bytes - kStaticShared));
  cudaLaunchAttribute attribute = custom_kernels::early_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = Device::get(device).major >= 9 ? 1 : 0;
  CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(values)...));
}

template <typename In, typename Out, int N>
void launch_whole(const Arguments& a, const Schedule& s, int device, cudaStream_t stream) {
  launch(whole_rows<In, Out, N>, device, stream, (a.rows + s.teams - 1) / s.teams,
         s.warps * s.teams * 32, s.teams * a.layout.row_bytes(), a);
}

template <typename In, typename Out>
void launch_formats(Arguments& a, const Schedule& s, int device, cudaStream_t stream) {
  a.warps = s.warps, a.bulk = s.way == kBulk;
  if (s.way == kTiles) {
    constexpr int kGroups = Chunk<kAny>::kGroups;
    Layout& layout = a.layout;
    layout.chunk_words = kGroups * layout.n;
    layout.chunks = (layout.k + 2 * layout.n * kGroups - 1) / (2 * layout.n * kGroups);
    int tile = std::max(1, Device::get(device).shared_bytes / 3 / (layout.chunk_words * 4));
    return launch(tiled_rows<In, Out>, device, stream, a.rows, s.warps * 32,
                  tile * layout.chunk_words * 4, a, tile);
  }
  switch (a.layout.n) {
    case 2:
      return launch_whole<In, Out, 2>(a, s, device, stream);
    case 3:
      return launch_whole<In, Out, 3>(a, s, device, stream);
    case 4:
      return launch_whole<In, Out, 4>(a, s, device, stream);
    case 5:
      return launch_whole<In, Out, 5>(a, s, device, stream);
    default:
      return launch_whole<In, Out, kAny>(a, s, device, stream);
  }
}

Schedule choose(const Arguments& a, const Device& device) {
  const int64_t row_bytes = a.layout.row_bytes(), room = device.shared_bytes - kStaticShared;
  if (row_bytes > room) return {kTiles, kTileWarps, 1};
  Schedule s{a.aligned && a.layout.k % 8 == 0 && device.major >= 9 ? kBulk : kLoads, 1, 1};
  // Measured on an H200. Few rows: all hands to each. Many rows: small blocks, each thread with
  // some 50 values, and room for two blocks or more.
  const bool few = a.rows <= device.multiprocessors;
  const int values = few ? 448 : 1600;  // of a warp
  s.warps = std::clamp((a.layout.k + values - 1) / values, 1, kWarps);
  if (!few) {
    s.teams = std::max(1, (s.warps <= 2 ? 8 : 12) / s.warps);
    while (s.teams > 1 && (s.teams * row_bytes > room / 2 ||
                           a.rows < int64_t{2} * s.teams * device.multiprocessors))
      --s.teams;
  }
  return s;
}

void run(TensorView x, const Optional<String>& pattern, TensorView q, TensorView scale,
         const Schedule* forced) {
  int device = x.device().device_id;
  DeviceGuard on(device);
  auto stream = current_stream(device);
  int n = pattern.has_value() ? std::atoi(std::strchr(pattern.value().c_str(), ':') + 1) / 2 : 2;
  int64_t k = x.size(1), end = q.size(1);
  if (end > INT32_MAX || 2 * k > INT32_MAX)
    TVM_FFI_THROW(ValueError) << KERNEL ": a row of " << k << " values is too long";
  Arguments a{};
  a.x = static_cast<const uint16_t*>(x.data_ptr());
  a.q = static_cast<char*>(q.data_ptr());
  a.scale = static_cast<float*>(scale.data_ptr());
  a.rows = x.size(0);
  a.stride = a.rows > 1 ? x.stride(0) : k;  // of one row it means nothing
  a.layout = layout_of(k, n, end);
  a.aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.stride % 8 == 0;
  Schedule s = forced ? *forced : choose(a, Device::get(device));
  bool int8 = q.dtype().code == kDLInt;
  if (x.dtype().code == kDLBfloat)
    int8 ? launch_formats<BFloat16, Int8>(a, s, device, stream)
         : launch_formats<BFloat16, Float8>(a, s, device, stream);
  else
    int8 ? launch_formats<Float16, Int8>(a, s, device, stream)
         : launch_formats<Float16, Float8>(a, s, device, stream);
}

void quant_expand(TensorView x, Optional<String> pattern, DLDataType, TensorView q,
                  TensorView scale) {
  run(x, pattern, q, scale, nullptr);
}

// The same by a given schedule: for tests and measurements.
void quant_expand_by(TensorView x, Optional<String> pattern, TensorView q, TensorView scale,
                     int way, int warps, int teams) {
  Schedule s{static_cast<Way>(way), warps, teams};
  run(x, pattern, q, scale, &s);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quant_expand, quant_expand);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quant_expand_by, quant_expand_by);
