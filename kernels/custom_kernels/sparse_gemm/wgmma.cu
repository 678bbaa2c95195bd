// SPDX-License-Identifier: Apache-2.0
//
// y = (A · Wᵀ) · a_scale · w_scale + b with a 2:4 sparse W, or one that is half 2:4 and half dense,
// on Hopper's wgmma.
//
//   A [M, K'], int8, float8_e4m3fn or bfloat16; W as blocks of bytes, below; a_scale [M] and
//   w_scale [N] float32, or none; b [N] bfloat16 or none; y [M, N] bfloat16, the start of each row
//   a multiple of 16 bytes.
//
// Only the first operand of the instruction can be sparse, so yᵀ [N, M] = W · Aᵀ is computed: the
// instruction's "M" are our features, its "N" our tokens.
//
// A block of threads computes tiles of 64 · groups features x tokens. One warp loads (TMA) through
// a ring of stages in shared memory; `groups` warpgroups multiply, each its 64 features, scale,
// round once and store (TMA). A stage holds `steps` times 128 bytes of each row of A, and as much
// of W. Blocks form clusters of pair · split: the `pair` blocks of neighbouring features load half
// of the tokens each, for both; the `split` blocks share a tile out along K and add their sums
// through each other's shared memory, in a fixed order. A tile of kind `share` has no last, not
// full wave: its tiles are shared out along K, and their sums added through scratch memory, in a
// fixed order.
//
// W [64 features][128 bytes of K'][block], as wgmma.py's storage() writes it: a block is copied to
// shared memory as it is. It holds 64 x 64 bytes of values, as four columns of 64 rows x 16 bytes,
// and then the metadata: for each thread the registers that its instructions want.
//
// Of a mixed W a block has 128 features: such a block of 64 of them that are 2:4, then the 64
// others, dense, as eight columns of 64 rows x 16 bytes. One warpgroup multiplies the former and
// one the latter, by the same A, so that all tiles take the same time. They wait for each other by
// way of the ring only: one multiplies while the other stores. `places` says which eight
// neighbouring features are where; eights are stored one by one, 16 bytes of a row (TMA is slow at
// such boxes).
//
// What bounds it: an SM takes in 64 bytes per cycle, and 128 bytes of K' of a tile of
// 128 x 256 are 42 KiB: 672 cycles, for which the tensor core would take 512. So tiles are as wide
// in tokens as they can be. With many tokens an H200 is held at its power limit before that.
//
// With few tokens, memory bounds it, and how soon it is asked. Blocks may start while the kernel
// that writes A still runs: W does not depend on it, so its first part is brought to L2 meanwhile.
// That is a hint: what is multiplied is read after A is complete, so a weight may have been written
// just before, too. The kernel behind may start likewise when every block has asked for its last
// operands.
//
// float8: sums are kept in the tensor core's own accumulator throughout, as vLLM's dense kernels
// do.
//
// This file holds the tiles; wgmma.py says which one when.
//
// architectures: 9.0a

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

#define KERNEL "sparse_gemm.wgmma"
#include "include/launch.cuh"

namespace sparse_gemm {

using custom_kernels::current_stream;
using custom_kernels::DeviceGuard;
using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;
using FfiTensor = tvm::ffi::Tensor;

// ---- PTX
// -------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(void const* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t rank) {
  uint32_t out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
  return out;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// Brings global memory to L2: a hint, so it may run ahead of what wrote that memory.
__device__ __forceinline__ void prefetch(void const* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// All threads of one warpgroup.
__device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// The barrier may be another block's.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_bytes(uint32_t to, void const* from, uint32_t bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, CUtensorMap const* map, int x, int y,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// To the same place in every block of the mask, and completes on the same barrier there.
__device__ __forceinline__ void copy_box_to(uint16_t mask, uint32_t to, CUtensorMap const* map,
                                            int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(mask)
      : "memory");
}

__device__ __forceinline__ void store_box(CUtensorMap const* map, int x, int y, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(map),
      "r"(x), "r"(y), "r"(from)
      : "memory");
}

template <int pending>
__device__ __forceinline__ void wait_until_stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Two 8 x 8 matrices of which a thread holds two neighbours of a row, written column by column.
__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
               "r"(first), "r"(second)
               : "memory");
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// ---- wgmma, sparse and dense: d [64 x tokens] += a · b, a thread's part of d in registers
// --------------------------------------------

struct Fp8 {
  using Sum = float;
  static constexpr int kBytes = 1, kMetadata = 2;
};
struct Int8 {
  using Sum = int32_t;
  static constexpr int kBytes = 1, kMetadata = 2;
};
// Half of the threads' metadata counts for an instruction, and a selector says which: so one
// register holds that of two instructions.
struct Bf16 {
  using Sum = float;
  static constexpr int kBytes = 2, kMetadata = 1;
};

#define NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_32 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64                                                                         \
  NAMES_32                                                                               \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52" \
  ",%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_96                                                                               \
  NAMES_64                                                                                     \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%" \
  "86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_128                                                                            \
  NAMES_96                                                                                   \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%" \
  "114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SUMS_4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define SUMS_8(c, i) SUMS_4(c, i), SUMS_4(c, i + 4)
#define SUMS_16(c, i) SUMS_8(c, i), SUMS_8(c, i + 8)
#define SUMS_32(c, i) SUMS_16(c, i), SUMS_16(c, i + 16)
#define SUMS_64(c, i) SUMS_32(c, i), SUMS_32(c, i + 32)
#define SUMS_96(c, i) SUMS_64(c, i), SUMS_32(c, i + 64)
#define SUMS_128(c, i) SUMS_64(c, i), SUMS_64(c, i + 64)

#define WGMMA(Kind, sum, constraint, size, shape, types, more, a_, b_, e_, select_, add_) \
  template <int select>                                                                   \
  __device__ __forceinline__ void multiply(Kind, sum(&d)[size], uint64_t a, uint64_t b,   \
                                           uint32_t metadata, int add) {                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_                           \
                 ", 0;\n"                                                                 \
                 "wgmma.mma_async.sp.sync.aligned." shape types " {" NAMES_##size         \
                 "}, %" #a_ ", %" #b_ ", %" #e_ ", %" #select_ ", add" more ";\n}"        \
                 : SUMS_##size(constraint, 0)                                             \
                 : "l"(a), "l"(b), "r"(metadata), "n"(select), "r"(add));                 \
  }
#define WGMMAS(tokens, size, ...)                                                              \
  WGMMA(Fp8, float, "+f", size, "m64n" #tokens "k64", ".f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__) \
  WGMMA(Int8, int32_t, "+r", size, "m64n" #tokens "k64", ".s32.s8.s8", "", __VA_ARGS__)        \
  WGMMA(Bf16, float, "+f", size, "m64n" #tokens "k32", ".f32.bf16.bf16", ", 1, 1, 0, 0",       \
        __VA_ARGS__)
WGMMAS(16, 8, 8, 9, 10, 11, 12)
WGMMAS(32, 16, 16, 17, 18, 19, 20)
WGMMAS(64, 32, 32, 33, 34, 35, 36)
WGMMAS(128, 64, 64, 65, 66, 67, 68)
WGMMAS(192, 96, 96, 97, 98, 99, 100)
WGMMAS(256, 128, 128, 129, 130, 131, 132)

// Dense: half as many values of W and of A as a sparse instruction reads, 32 bytes of each row.
#define WGMMA_DENSE(Kind, sum, constraint, size, shape, types, more, a_, b_, add_)                 \
  __device__ __forceinline__ void multiply(Kind, sum(&d)[size], uint64_t a, uint64_t b, int add) { \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_                                    \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned." shape types " {" NAMES_##size                     \
                 "}, %" #a_ ", %" #b_ ", add" more ";\n}"                                          \
                 : SUMS_##size(constraint, 0)                                                      \
                 : "l"(a), "l"(b), "r"(add));                                                      \
  }
#define WGMMAS_DENSE(tokens, size, ...)                                                 \
  WGMMA_DENSE(Fp8, float, "+f", size, "m64n" #tokens "k32", ".f32.e4m3.e4m3", ", 1, 1", \
              __VA_ARGS__)                                                              \
  WGMMA_DENSE(Int8, int32_t, "+r", size, "m64n" #tokens "k32", ".s32.s8.s8", "", __VA_ARGS__)
WGMMAS_DENSE(16, 8, 8, 9, 10)
WGMMAS_DENSE(32, 16, 16, 17, 18)
WGMMAS_DENSE(64, 32, 32, 33, 34)
WGMMAS_DENSE(128, 64, 64, 65, 66)
WGMMAS_DENSE(192, 96, 96, 97, 98)
WGMMAS_DENSE(256, 128, 128, 129, 130)

// Keeps the compiler from reading a sum before it is waited for.
__device__ __forceinline__ void settle(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
__device__ __forceinline__ void settle(int32_t& sum) { asm volatile("" : "+r"(sum)::"memory"); }

// Where an operand lies in shared memory, rows adjacent along K. In units of 16 bytes: the start,
// the distance of neighbouring 16 bytes of a row, the distance of neighbouring 8 rows.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint64_t next, uint64_t rows,
                                            uint64_t swizzle) {
  return (address >> 4 & 0x3fff) | next << 16 | rows << 32 | swizzle << 62;
}

// ---- The kernel
// --------------------------------------------------------------------------------------------------

struct Arguments {
  uint8_t const* weight;
  float const *a_scale, *w_scale;
  __nv_bfloat16 const* bias;
  int m, n;
  int columns;        // blocks of W beside each other, as they lie in memory
  int steps;          // stages' worth of K'
  int feature_tiles;  // of a cluster
  int token_tiles;
  int pair, split;
  int box;                // tokens that one store writes
  int whole;              // tiles that are computed whole; what follows is for the others
  int rest;               // how many they are
  int shares;             // clusters that share one of them out along K
  uint4* parts;           // sums of parts of the others, of each block
  uint32_t* ready;        // whether they are there, of each warpgroup
  uint8_t const* places;  // of a mixed W: which eight features of its block each eight are
  __nv_bfloat16* y;
  int64_t y_stride;
};

template <class Kind_, int groups_, int tokens_, int steps_, int per_multiprocessor_,
          bool share_ = false, bool mixed_ = false>
struct Tile {
  using Kind = Kind_;
  static constexpr int groups = groups_;
  static constexpr int tokens = tokens_;
  static constexpr int steps = steps_;
  static constexpr int per_multiprocessor = per_multiprocessor_;
  static constexpr bool share = share_;
  static constexpr bool mixed = mixed_;
  static_assert(!mixed || groups == 2);
  static constexpr int features = 64 * groups;
  static constexpr int sums = tokens / 2;  // of a thread
  // Registers are shared out anew between the warpgroups where a thread holds many sums.
  static constexpr bool share_out = sums > 64;
  static constexpr int threads = 128 * groups + (share_out ? 128 : 32);
  static constexpr int registers = 232, registers_to_load = 40;
  static constexpr int sparse = 4096 + 512 * Kind::kMetadata;  // bytes of W for 64 features
  static constexpr int block = mixed ? sparse + 64 * 128 : sparse;
  static constexpr int blocks = mixed ? 1 : groups;  // beneath each other
  static constexpr int block_features = features / blocks;
  static constexpr int row = 128;  // bytes of A in a step
  static constexpr int stage_w = blocks * steps * block;
  static constexpr int stage_a = steps * tokens * row;
  static constexpr int chunk = tokens < 64 ? tokens : 64;  // tokens that are written at a time
  // Blocks of 16-bit weights leave room for a fifth stage where there is one buffer.
  static constexpr int buffers = tokens > chunk&& Kind::kBytes == 1 ? 2 : 1;
  static constexpr int staging = groups * buffers * chunk * 128;
  static constexpr int scales = groups * tokens * 4;
  static constexpr int fixed = staging + scales + 1280 /* barriers, and to align */;
  static constexpr int room = (227 * 1024 + 1024) / per_multiprocessor - 1024;
  static constexpr int stages = (room - fixed) / (stage_w + stage_a);
  // Bytes of each row of blocks that are on their way to L2 before A is there: what memory delivers
  // to an SM while the kernel that writes A runs, 1.5 to 2.5 us with few tokens.
  static constexpr int ahead = (64 << 10) / (per_multiprocessor * blocks);
  static constexpr int shared = fixed + stages * (stage_w + stage_a);
  static_assert(stages >= 2 && stages * 16 <= 256);
  // Sums of all parts fit into the ring, and a part is whole boxes.
  static constexpr bool splits =
      groups * 128 * sums * 4 <= stages * stage_a && (tokens & (tokens - 1)) == 0;
};

template <class T>
__global__ void __launch_bounds__(T::threads, T::per_multiprocessor)
    multiply_sparse(const __grid_constant__ Arguments p, const __grid_constant__ CUtensorMap a_map,
                    const __grid_constant__ CUtensorMap y_map) {
  using Kind = typename T::Kind;
  using Sum = typename Kind::Sum;
  extern __shared__ uint8_t shared_memory[];
  const uint32_t base = (shared_address(shared_memory) + 1023) & ~1023u;
  const uint32_t ring_a = base;
  const uint32_t staging = ring_a + T::stages * T::stage_a;
  const uint32_t ring_w = staging + T::staging;
  const uint32_t scales = ring_w + T::stages * T::stage_w;
  const uint32_t full = scales + T::scales, empty = full + 8 * T::stages;

  // The shuffle tells the compiler that all threads of a warp have the same.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = blockIdx.x % (p.pair * p.split);  // in the cluster
  const int in_pair = rank % p.pair, part = rank / p.pair;
  const int cluster = blockIdx.x / (p.pair * p.split);
  const int clusters = gridDim.x / (p.pair * p.split);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::stages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 4 * T::groups * p.pair);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (p.pair * p.split > 1)
    cluster_sync();
  else
    __syncthreads();

  // Blocks that run at the same time share operands in L2, so their tiles form about a square: some
  // tiles of tokens beside each other, then the next features.
  constexpr int kTogether = 8;
  const auto place = [&](int tile, int& feature_block, int& token) {
    const int whole = kTogether * p.feature_tiles;
    const int strip = tile / whole, inside = tile % whole;
    const int width = min(kTogether, p.token_tiles - strip * kTogether);
    feature_block = (inside / width * p.pair + in_pair) * T::blocks;
    token = (strip * kTogether + inside % width) * T::tokens;
  };

  // Of the clusters, counted from the last, each takes a share of a tile of the rest, or none. Who
  // has a tile's first share takes it last and adds the others, which were taken first by clusters
  // that started before: so nobody waits for long, or for a cluster that does not run yet.
  const int from_last = clusters - 1 - cluster;
  int next_tile = cluster;
  bool shares = T::share && from_last < p.rest * p.shares;
  const auto next = [&](int& tile, int& first_step, int& last_step) {
    int index = part, count = p.split;
    if (T::share && shares && (from_last >= p.rest || next_tile >= p.whole)) {
      shares = false;
      tile = p.whole + from_last % p.rest;
      index = from_last / p.rest;
      count = p.shares;
    } else if (next_tile < p.whole) {
      tile = next_tile;
      next_tile += clusters;
    } else {
      return false;
    }
    first_step = p.steps * index / count;
    last_step = p.steps * (index + 1) / count;
    return true;
  };
  int tile, first_step, last_step;

  const int last_block = (p.n + T::block_features - 1) / T::block_features - 1;
  if (!T::share && warp == 4 * T::groups && lane < T::blocks) {
    int feature_block, token;
    place(cluster, feature_block, token);
    const int64_t row = min(feature_block + lane, last_block);
    const int from = p.steps * part / p.split * T::steps;
    prefetch(p.weight + (row * p.columns + from) * T::block,
             min(T::ahead / T::block, p.columns - from) * T::block);
  }
  custom_kernels::wait_for_previous_kernel();

  if (warp >= 4 * T::groups) {
    if constexpr (T::share_out)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(T::registers_to_load));
    if (warp == 4 * T::groups && lane == 0) {
      const uint16_t mask = ((1u << p.pair) - 1) << (part * p.pair);
      int stage = 0;
      uint32_t phase = 1;
      while (next(tile, first_step, last_step)) {
        int feature_block, token;
        place(tile, feature_block, token);
#pragma unroll 1
        for (int step = first_step; step < last_step; ++step) {
          barrier_wait(empty + 8 * stage, phase);
          const uint32_t barrier = full + 8 * stage;
          barrier_expect(barrier, T::stage_w + T::stage_a);
          for (int i = 0; i < T::blocks; ++i) {
            // Features beyond the last are computed from the last ones and not written.
            const int64_t row = min(feature_block + i, last_block);
            copy_bytes(ring_w + stage * T::stage_w + i * T::steps * T::block,
                       p.weight + (row * p.columns + step * T::steps) * T::block,
                       T::steps * T::block, barrier);
          }
          for (int i = 0; i < T::steps; ++i) {
            const uint32_t to = ring_a + stage * T::stage_a + i * T::tokens * T::row;
            const int k = (step * T::steps + i) * (T::row / Kind::kBytes);
            if (p.pair == 1) {
              copy_box(to, &a_map, k, token, barrier);
            } else {
              const int half = in_pair * (T::tokens / 2);
              copy_box_to(mask, to + half * T::row, &a_map, k, token + half, barrier);
            }
          }
          if (++stage == T::stages) stage = 0, phase ^= 1;
        }
      }
      custom_kernels::launch_next_kernel();
    }
    if (!T::share && p.split > 1) {
      cluster_sync();
      cluster_sync();
    }
  } else {
    if constexpr (T::share_out)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::registers));
    const int group = warp / 4, thread = threadIdx.x % 128;
    const uint32_t group_staging = staging + group * T::buffers * T::chunk * 128;
    const uint32_t group_scales = scales + group * T::tokens * 4;
    // Where this thread's row of a transposed 8 x 8 matrix begins: swizzled, as the store undoes.
    const int column = 2 * (warp % 4) + (lane >> 3 & 1);
    const uint32_t own_row = (lane & 7) * 128 + ((column ^ (lane & 7)) << 4);
    // Arrives at the barriers of both blocks of a pair, which both write here.
    const uint32_t arrive_at =
        lane < p.pair && p.pair > 1 ? in_block(empty, part * p.pair + lane) : empty;
    int stage = 0;
    uint32_t phase = 0;
    int stored = 0;
    while (next(tile, first_step, last_step)) {
      int feature_block, token;
      place(tile, feature_block, token);
      int feature = feature_block * T::block_features + group * 64;
      int rows[2];  // that this thread finishes
      for (int i = 0; i < 2; ++i) rows[i] = feature + 16 * (warp % 4) + lane / 4 + 8 * i;
      if constexpr (T::mixed) {
        const uint8_t* const eights = p.places + 16 * min(feature_block, last_block) + 8 * group;
        for (int i = 0; i < 2; ++i)
          rows[i] = feature_block * T::block_features + 8 * eights[2 * (warp % 4) + i] + lane / 4;
        feature = feature_block * T::block_features + 8 * eights[thread % 8];  // that it stores
      }
      float w_scale[2], bias[2], a_scale[(T::tokens + 127) / 128];
      for (int i = 0; i < 2; ++i) {
        const bool inside = rows[i] < p.n;
        w_scale[i] = inside && p.w_scale ? p.w_scale[rows[i]] : 1.f;
        bias[i] = inside && p.bias ? __bfloat162float(p.bias[rows[i]]) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < (T::tokens + 127) / 128; ++i) {
        const int at = token + thread + 128 * i;
        a_scale[i] = p.a_scale && at < p.m ? p.a_scale[at] : 1.f;
      }

      Sum sums[T::sums];
      if constexpr (T::mixed) {
        // Without zeros, and two loops, the compiler lets every instruction wait for the one
        // before.
#pragma unroll
        for (int i = 0; i < T::sums; ++i) sums[i] = 0;
      }
      int before = 0, step = first_step;
      // The instructions of this step run on; those of the one before have read its stage.
      const auto step_done = [&] {
        if (step > first_step && lane < p.pair) barrier_arrive(arrive_at + 8 * before);
        before = stage;
        if (++stage == T::stages) stage = 0, phase ^= 1;
        return ++step < last_step;
      };
      const auto sums_done = [&] {
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < T::sums; ++i) settle(sums[i]);
      };
      const auto advance = [&](uint32_t (&metadata)[T::steps][2], uint32_t (&in_use)[T::steps][2]) {
        barrier_wait(full + 8 * stage, phase);
        const uint32_t w =
            ring_w + stage * T::stage_w + (T::mixed ? 0 : group * T::steps * T::block);
        const uint32_t a = ring_a + stage * T::stage_a;
#pragma unroll
        for (int i = 0; i < T::steps; ++i) {
          const uint32_t from = w + i * T::block + 4096 + thread * 4 * Kind::kMetadata;
          if constexpr (Kind::kMetadata == 2) {
            asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                         : "=r"(metadata[i][0]), "=r"(metadata[i][1])
                         : "r"(from));
          } else {
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(metadata[i][0]) : "r"(from));
          }
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < T::steps; ++i) {
          const uint64_t of_w = operand(w + i * T::block, 64, 8, 0);
          const uint64_t of_a = operand(a + i * T::tokens * T::row, 1, 64, 1);
          // One instruction takes 32 bytes of values and 64 of A.
          multiply<0>(Kind{}, sums, of_w, of_a, metadata[i][0],
                      T::mixed || i > 0 || step > first_step);
          multiply<Kind::kMetadata == 1>(Kind{}, sums, of_w + 128, of_a + 4,
                                         metadata[i][Kind::kMetadata - 1], 1);
        }
        wgmma_commit();
        wgmma_wait<1>();
        // The instructions read their metadata while they run: until here, these registers must
        // not be written.
#pragma unroll
        for (int i = 0; i < T::steps; ++i)
          for (int j = 0; j < Kind::kMetadata; ++j) asm volatile("" ::"r"(in_use[i][j]));
        return step_done();
      };
      uint32_t even[T::steps][2] = {}, odd[T::steps][2] = {};
      bool sparse = true;
      if constexpr (T::mixed) {
        sparse = group == 0;
        const auto advance_dense = [&] {
          barrier_wait(full + 8 * stage, phase);
          const uint32_t w = ring_w + stage * T::stage_w + T::sparse;
          const uint32_t a = ring_a + stage * T::stage_a;
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < T::steps; ++i) {
            const uint64_t of_w = operand(w + i * T::block, 64, 8, 0);
            const uint64_t of_a = operand(a + i * T::tokens * T::row, 1, 64, 1);
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply(Kind{}, sums, of_w + 128 * j, of_a + 2 * j, 1);
          }
          wgmma_commit();
          wgmma_wait<1>();
          return step_done();
        };
        if (!sparse) {
#pragma unroll 1
          while (advance_dense()) {
          }
          sums_done();
        }
      }
      if (sparse) {
#pragma unroll 1
        while (advance(even, odd) && advance(odd, even)) {  // every part has a step
        }
        sums_done();
#pragma unroll
        for (int i = 0; i < T::steps; ++i)
          for (int j = 0; j < Kind::kMetadata; ++j)
            asm volatile("" ::"r"(even[i][j]), "r"(odd[i][j]));
      }
      if (lane < p.pair) barrier_arrive(arrive_at + 8 * before);

      if (T::share && first_step > 0) {  // whoever has the first step finishes the tile
        uint4* to =
            p.parts + (int64_t{blockIdx.x} * T::groups + group) * T::sums / 4 * 128 + thread;
#pragma unroll
        for (int i = 0; i < T::sums; i += 4)
          __stcg(to + i / 4 * 128, make_uint4(reinterpret_cast<uint32_t const&>(sums[i]),
                                              reinterpret_cast<uint32_t const&>(sums[i + 1]),
                                              reinterpret_cast<uint32_t const&>(sums[i + 2]),
                                              reinterpret_cast<uint32_t const&>(sums[i + 3])));
        __threadfence();
        group_sync(group);
        if (thread == 0)
          asm volatile(
              "st.release.gpu.global.b32 [%0], 1;" ::"l"(p.ready + blockIdx.x * T::groups + group)
              : "memory");
        continue;
      }
      if (T::share && last_step < p.steps) {
        for (int other = 1; other < p.shares; ++other) {
          const int64_t block = (cluster - other * p.rest) * p.pair + in_pair;
          uint32_t ready;
          do {
            asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
                         : "=r"(ready)
                         : "l"(p.ready + block * T::groups + group)
                         : "memory");
          } while (!ready);
          uint4 const* from = p.parts + (block * T::groups + group) * T::sums / 4 * 128 + thread;
#pragma unroll
          for (int i = 0; i < T::sums; i += 4) {
            const uint4 v = __ldcg(from + i / 4 * 128);
            sums[i] += reinterpret_cast<Sum const&>(v.x);
            sums[i + 1] += reinterpret_cast<Sum const&>(v.y);
            sums[i + 2] += reinterpret_cast<Sum const&>(v.z);
            sums[i + 3] += reinterpret_cast<Sum const&>(v.w);
          }
        }
      }

#pragma unroll
      for (int i = 0; i < (T::tokens + 127) / 128; ++i)
        if (thread + 128 * i < T::tokens)
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(group_scales + (thread + 128 * i) * 4),
                       "f"(a_scale[i])
                       : "memory");

      // Eight tokens: scaled, rounded and transposed into the staging buffer.
      const auto finish = [&](uint32_t buffer, int unit, int place, Sum const* sum) {
        float2 scale;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(scale.x), "=f"(scale.y)
                     : "r"(group_scales + (8 * unit + 2 * (lane % 4)) * 4));
        uint32_t packed[2];
        for (int i = 0; i < 2; ++i) {
          const float x = fmaf(w_scale[i], scale.x * static_cast<float>(sum[2 * i]), bias[i]);
          const float y = fmaf(w_scale[i], scale.y * static_cast<float>(sum[2 * i + 1]), bias[i]);
          const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
          packed[i] = reinterpret_cast<uint32_t const&>(both);
        }
        store_transposed(buffer + 1024 * place + own_row, packed[0], packed[1]);
      };
      // Every buffer that is opened is stored: the last stores are those that are waited for.
      const auto open = [&] {
        if (!T::mixed && thread == 0) wait_until_stores_have_read<T::buffers - 1>();
        group_sync(group);
        return group_staging + (stored++ % T::buffers) * T::chunk * 128;
      };
      const auto write = [&](uint32_t buffer, int first_token) {
        if constexpr (T::mixed) {
          group_sync(group);
          const int end = feature < p.n ? min(p.box, p.m - first_token) : 0;
#pragma unroll
          for (int first = 0; first < T::chunk; first += 16) {
            const int i = first + thread / 8;
            if (i >= end) break;
            uint4 eight;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(eight.x), "=r"(eight.y), "=r"(eight.z), "=r"(eight.w)
                         : "r"(buffer + i * 128 + ((thread % 8 ^ i % 8) << 4)));
            *reinterpret_cast<uint4*>(p.y + (first_token + i) * p.y_stride + feature) = eight;
          }
        } else {
          asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
          group_sync(group);
          if (thread == 0 && feature < p.n) store_box(&y_map, feature, first_token, buffer);
        }
      };

      if (T::share || p.split == 1) {
#pragma unroll
        for (int first = 0; first < T::tokens; first += T::chunk) {
          if (token + first >= p.m) break;
          const uint32_t buffer = open();
#pragma unroll
          for (int i = 0; i < T::chunk / 8; ++i)
            finish(buffer, first / 8 + i, i, sums + (first / 8 + i) * 4);
          write(buffer, token + first);
        }
      } else {
        // Every block of the tile finishes some of its tokens: it gets the sums of all parts for
        // them, in its ring, which nobody uses any more.
        constexpr int kUnits = T::tokens / 8;
        const int units = kUnits / p.split;
        cluster_sync();
        const auto slot = [&](int from, int unit) {
          return base + (((from * units + unit) * T::groups + group) * 128 + thread) * 16;
        };
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          const int to = unit / units;
          asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                           in_block(slot(part, unit - to * units), to * p.pair + in_pair)),
                       "r"(reinterpret_cast<uint32_t const&>(sums[4 * unit])),
                       "r"(reinterpret_cast<uint32_t const&>(sums[4 * unit + 1])),
                       "r"(reinterpret_cast<uint32_t const&>(sums[4 * unit + 2])),
                       "r"(reinterpret_cast<uint32_t const&>(sums[4 * unit + 3]))
                       : "memory");
        }
        cluster_sync();
        const int in_box = p.box / 8;
        for (int first = 0; first < units; first += in_box) {
          const int first_token = token + (part * units + first) * 8;
          if (first_token >= p.m) break;
          const uint32_t buffer = open();
          for (int i = 0; i < in_box; ++i) {
            Sum total[4] = {};
            for (int from = 0; from < p.split; ++from) {
              uint32_t v[4];
              asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                           : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                           : "r"(slot(from, first + i)));
#pragma unroll
              for (int j = 0; j < 4; ++j) total[j] += reinterpret_cast<Sum const&>(v[j]);
            }
            finish(buffer, part * units + first + i, i, total);
          }
          write(buffer, first_token);
        }
      }
      group_sync(group);  // the scales are read: the next tile may write its own
    }
    if (thread == 0) wait_until_stores_have_read<0>();
  }
  // A block must not end while the other of its pair still arrives at its barriers.
  if (p.pair > 1) cluster_sync();
}

// ---- Launching
// -------------------------------------------------------------------------------------------------

struct Problem {
  int device;
  cudaStream_t stream;
  void const* a;
  int k;
  CUtensorMapDataType type;
  Arguments arguments;
};

// A matrix whose boxes of `box_columns` columns, 128 bytes, x `box_rows` rows are copied.
CUtensorMap describe(void const* data, CUtensorMapDataType type, int bytes, int64_t rows,
                     int64_t columns, int64_t stride, int box_rows) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, cuuint64_t const*,
                   cuuint64_t const*, cuuint32_t const*, cuuint32_t const*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // From the driver that is loaded: nothing here links with it.
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                cudaEnableDefault, &result));
    return reinterpret_cast<Encode>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride * bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / bytes),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t ones[] = {1, 1};
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(data), sizes, strides, box, ones,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    TVM_FFI_THROW(RuntimeError) << KERNEL ": a tensor map of " << rows << " x " << columns
                                << " is refused: CUresult " << static_cast<int>(result);
  return map;
}

template <class T>
cudaLaunchConfig_t configuration(cudaLaunchAttribute (&attributes)[2], int cluster, int blocks,
                                 cudaStream_t stream) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1] = custom_kernels::early_launch();  // quant_expand lets it
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(T::threads);
  config.dynamicSmemBytes = T::shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

// How many clusters the device holds at once; asked for once. It also lets the kernel take all of
// shared memory.
template <class T>
int resident(int device, int cluster) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> known;
  const std::lock_guard<std::mutex> guard(mutex);
  const auto key = std::make_pair(device, cluster);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  CHECK_CUDA(cudaFuncSetAttribute(multiply_sparse<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  T::shared));
  cudaLaunchAttribute attributes[2];
  const auto config = configuration<T>(attributes, cluster, cluster, nullptr);
  int count = 0;
  CHECK_CUDA(cudaOccupancyMaxActiveClusters(&count, multiply_sparse<T>, &config));
  return known[key] = count;
}

template <class T>
void launch(Problem const& problem) {
  Arguments p = problem.arguments;
  const int bytes = T::Kind::kBytes;
  const auto up = [](int64_t value, int64_t unit) {
    return static_cast<int>((value + unit - 1) / unit);
  };
  p.steps = up(int64_t{problem.k} * bytes, T::row * T::steps);
  if (!T::splits || T::share) p.split = 1;
  while (p.split > p.steps) p.split /= 2;  // every part has a step
  const int cluster = p.pair * p.split;
  const int at_once = resident<T>(problem.device, cluster);
  p.feature_tiles = up(p.n, T::features * p.pair);
  p.token_tiles = up(p.m, T::tokens);
  p.box = std::min(T::chunk, T::tokens / p.split);
  const auto a_map =
      describe(problem.a, problem.type, bytes, p.m, problem.k, problem.k, T::tokens / p.pair);
  const auto y_map =
      describe(p.y, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p.m, p.n, p.y_stride, p.box);
  const int tiles = p.feature_tiles * p.token_tiles;
  // Sums are handed over in the ring, once in the life of a block.
  const int clusters = p.split > 1 ? tiles : std::min(tiles, at_once);
  const int blocks = cluster * clusters;
  p.whole = tiles;
  p.rest = tiles % clusters;
  const int shares =
      p.rest > 0 ? std::min({problem.arguments.split, clusters / p.rest, p.steps}) : 1;
  FfiTensor scratch;
  if (T::share && shares > 1) {
    p.whole = tiles - p.rest;
    p.shares = shares;
    const int64_t flags = up(blocks * T::groups * 4, 128) * 128;
    const int64_t bytes = flags + int64_t{blocks} * T::groups * 128 * T::sums * 4;
    // From torch's allocator, which hands it out again only behind this launch, and during a
    // capture from the graph's own pool.
    scratch = FfiTensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {bytes}, DLDataType{kDLUInt, 8, 1},
                                      DLDevice{kDLCUDA, problem.device});
    auto* const data = static_cast<uint8_t*>(scratch.data_ptr());
    p.ready = reinterpret_cast<uint32_t*>(data);
    p.parts = reinterpret_cast<uint4*>(data + flags);
    CHECK_CUDA(cudaMemsetAsync(data, 0, flags, problem.stream));
  }
  cudaLaunchAttribute attributes[2];
  const auto config = configuration<T>(attributes, cluster, blocks, problem.stream);
  CHECK_CUDA(cudaLaunchKernelEx(&config, multiply_sparse<T>, p, a_map, y_map));
}

struct Entry {
  void (*launch)(Problem const&);
  int features, tokens, per_multiprocessor;
  bool share;
};

template <class T>
constexpr Entry entry() {
  return {launch<T>, T::features, T::tokens, T::per_multiprocessor, T::share};
}

// As wgmma.py numbers them: of 2:4 weights,
template <class Kind>
constexpr Entry kTiles[] = {
    entry<Tile<Kind, 2, 256, 1, 1>>(), entry<Tile<Kind, 2, 256, 1, 1, true>>(),
    entry<Tile<Kind, 2, 192, 1, 1>>(), entry<Tile<Kind, 2, 128, 1, 1>>(),
    entry<Tile<Kind, 2, 64, 2, 1>>(),  entry<Tile<Kind, 1, 32, 2, 2>>(),
    entry<Tile<Kind, 1, 16, 2, 2>>(),
};
// and of mixed ones.
template <class Kind>
constexpr Entry kMixedTiles[] = {
    entry<Tile<Kind, 2, 256, 1, 1, false, true>>(), entry<Tile<Kind, 2, 256, 1, 1, true, true>>(),
    entry<Tile<Kind, 2, 192, 1, 1, false, true>>(), entry<Tile<Kind, 2, 128, 1, 1, false, true>>(),
    entry<Tile<Kind, 2, 64, 2, 1, false, true>>(),  entry<Tile<Kind, 2, 32, 2, 1, false, true>>(),
    entry<Tile<Kind, 2, 16, 2, 1, false, true>>(),
};

// ---- What Python calls
// -------------------------------------------------------------------------------------------------

void run(TensorView a, Optional<TensorView> a_scale, TensorView weight, Optional<TensorView> places,
         Optional<TensorView> w_scale, Optional<TensorView> bias, TensorView y, int64_t tile,
         int64_t pair, int64_t split) {
  const auto pointer = [](Optional<TensorView> const& t) -> void const* {
    return t.has_value() ? t.value().data_ptr() : nullptr;
  };
  const int device = a.device().device_id;
  Problem p{device, current_stream(device), a.data_ptr(), static_cast<int>(a.size(1))};
  p.arguments.weight = static_cast<uint8_t const*>(weight.data_ptr());
  p.arguments.places = static_cast<uint8_t const*>(pointer(places));
  p.arguments.a_scale = static_cast<float const*>(pointer(a_scale));
  p.arguments.w_scale = static_cast<float const*>(pointer(w_scale));
  p.arguments.bias = static_cast<__nv_bfloat16 const*>(pointer(bias));
  p.arguments.y = static_cast<__nv_bfloat16*>(y.data_ptr());
  p.arguments.y_stride = y.stride(0);
  p.arguments.m = static_cast<int>(a.size(0));
  p.arguments.n = static_cast<int>(y.size(1));
  p.arguments.columns = static_cast<int>(weight.size(1));
  p.arguments.pair = static_cast<int>(pair);
  p.arguments.split = static_cast<int>(split);
  const DeviceGuard scope(device);
  const int code = a.dtype().code;
  p.type = code == kDLBfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const auto entry_of = [&](auto const& entries) -> Entry const& {
    if (tile < 0 || tile >= static_cast<int64_t>(std::size(entries)))
      TVM_FFI_THROW(ValueError) << KERNEL ": there is no tile " << tile;
    return entries[tile];
  };
  const bool mixed = places.has_value();
  if (mixed && code == kDLBfloat) TVM_FFI_THROW(ValueError) << KERNEL ": a mixed weight has 8 bits";
  Entry const& chosen =
      mixed ? code == kDLInt ? entry_of(kMixedTiles<Int8>) : entry_of(kMixedTiles<Fp8>)
      : code == kDLBfloat ? entry_of(kTiles<Bf16>)
      : code == kDLInt    ? entry_of(kTiles<Int8>)
                          : entry_of(kTiles<Fp8>);
  chosen.launch(p);
}

// (features, tokens, blocks on an SM, shared) of each tile, of 2:4 weights or of mixed ones.
Array<Array<int64_t>> tiles(bool mixed) {
  Array<Array<int64_t>> out;
  const auto append = [&](auto const& entries) {
    for (Entry const& e : entries)
      out.push_back(Array<int64_t>{e.features, e.tokens, e.per_multiprocessor, e.share});
  };
  if (mixed)
    append(kMixedTiles<Fp8>);
  else
    append(kTiles<Fp8>);
  return out;
}

}  // namespace sparse_gemm

TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, sparse_gemm::run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tiles, sparse_gemm::tiles);
