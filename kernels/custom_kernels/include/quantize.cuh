// SPDX-License-Identifier: Apache-2.0
//
// What kernels share that quantize a row to 8 bits and expand it for a (2N-2):2N pattern: the last
// half of their work. A team of warps has a row of bfloat16 or float16 in shared memory, with zeros
// behind it, and its largest absolute value (Team::max_abs); emit and pad write the row of q,
// write_scale its scale. What is right is in quantization.py and sparsity.py, bit for bit.
//
// From there every thread takes chunks of whole groups, quantizes them pair by pair, and joins
// neighbouring pairs into windows: a chunk is 16 contiguous bytes of the even section and 8 or 16
// of the odd one, so that all loads and stores are wide and nothing is gathered. Zeros behind the
// row become the sections' padding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "include/device.cuh"  // IWYU pragma: export

namespace custom_kernels {

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

__device__ inline uint32_t window(uint32_t pair, uint32_t next) {
  return __byte_perm(pair, next, 0x5410);
}

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

__device__ inline void pad(const Layout& layout, int thread, int threads, char* q) {
  for (int place = layout.odd_end + thread * 16; place < layout.end; place += threads * 16)
    *reinterpret_cast<uint4*>(q + place) = make_uint4(0, 0, 0, 0);
}

// Of rows of k values that become `end` bytes; without a pattern nothing is expanded.
inline Layout layout_of(int64_t k, const tvm::ffi::Optional<tvm::ffi::String>& pattern,
                        int64_t end) {
  if (end > INT32_MAX || 2 * k > INT32_MAX)
    TVM_FFI_THROW(ValueError) << KERNEL ": a row of " << k << " values is too long";
  int n = pattern.has_value() ? std::atoi(std::strchr(pattern.value().c_str(), ':') + 1) / 2 : 2;
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
// ---- TMA's bulk copies into shared memory, which a barrier counts ------------------------------

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// `barrier` is the address in shared memory of 8 bytes. For one thread; the others may
// wait_for_bytes after they met it.
__device__ inline void init_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Once, with the sum over all copies.
__device__ inline void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Both addresses and the number of bytes are multiples of 16.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ inline void wait_for_bytes(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier)
      : "memory");
}
#endif

// Calls f with N as a constant: one that has code of its own, or kAny.
template <typename F>
void with_pattern(int n, F f) {
  switch (n) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, kAny>{});
  }
}

}  // namespace custom_kernels
