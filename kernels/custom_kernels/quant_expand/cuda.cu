// SPDX-License-Identifier: Apache-2.0
//
// q, scale = per-token quantization of x, expanded for a (2N-2):2N pattern.
//
//   x [M, K] bfloat16 or float16, unit inner stride, any row stride;
//   q [M, K'] int8 or float8_e4m3fn; scale [M] float32. Per row, in float32:
//   amax = max |x|, inv = qmax / amax, scale = amax / qmax, q = round(x · inv).
//   What is right is in reference.py, bit for bit; the order of a row of q in sparsity.py.
//
// The work is memory traffic: 2·K bytes in, K' out. A row is read once, into shared memory; how it
// is written from there is in quantize.cuh.
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

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cstdint>

#define KERNEL "quant_expand.cuda"
#include "include/quantize.cuh"

namespace {

using namespace custom_kernels;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;

constexpr int kWarps = 16;      // of a block, except with tiles
constexpr int kTileWarps = 32;  // of a block with tiles

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

#if __CUDA_ARCH__ >= 900
// What load does, for a whole row of which every part is aligned, by TMA's bulk copy.
template <typename In>
__device__ uint32_t fetch(const uint16_t* x, int count, int total, uint64_t* barrier,
                          const Team& team, uint32_t* words) {
  const uint32_t full = shared_address(barrier);
  if (team.thread == 0) {
    init_barrier(full);
    // The rest of the team waits with this thread: for the row.
    take_turn();
    expect_bytes(full, count * 2);
    copy_bulk(words, x, count * 2, full);
  }
  for (int i = count / 2 + team.thread; i < total / 2; i += team.threads) words[i] = 0;
  team.sync();  // the barrier exists
  wait_for_bytes(full);
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

enum Way { kBulk, kLoads, kTiles };

struct Schedule {
  Way way;
  int warps;  // of a team
  int teams;  // of a block
};

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
  with_pattern(a.layout.n, [&](auto n) { launch_whole<In, Out, n()>(a, s, device, stream); });
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
  int64_t k = x.size(1);
  Arguments a{};
  a.x = static_cast<const uint16_t*>(x.data_ptr());
  a.q = static_cast<char*>(q.data_ptr());
  a.scale = static_cast<float*>(scale.data_ptr());
  a.rows = x.size(0);
  a.stride = a.rows > 1 ? x.stride(0) : k;  // of one row it means nothing
  a.layout = layout_of(k, pattern, q.size(1));
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
