// SPDX-License-Identifier: Apache-2.0
//
// y = (A · Wᵀ) · a_scale · w_scale + b with a 2:4 sparse W: CUTLASS 3's sparse warp-specialized
// main loop for Hopper (TMA, sparse wgmma), and an epilogue visitor tree that applies scales and
// bias to the accumulators in registers. Nothing but y is written, rounded once; only tiles that
// are shared out along K take scratch memory for parts of sums.
//
//   A [M, K'], int8, float8_e4m3fn or bfloat16; W in two parts: values [N, K'/2] and metadata;
//   a_scale [M] and w_scale [N] float32, or none; b [N] bfloat16 or none; y [M, N] bfloat16, the
//   start of each row a multiple of 16 bytes, the others' rows contiguous.
//
// Only the first operand of the instruction can be sparse, so it is yᵀ [N, M] = W · Aᵀ that is
// computed: CUTLASS's "M" are our features, its "N" our tokens, and its column-major D is our y.
//
// What bounds it: a sparse instruction of 64 x n x 64 bytes reads n rows of A at twice the rate of
// a dense one; at n = 256 shared memory delivers 18 KiB in the 144 cycles for which the tensor core
// would take 128, and the copy engine writes there too. So tiles are as wide in tokens as they can
// be. Under load an H200 is held at its power limit before that: at 1.4 to 1.6 GHz, random float8
// runs a fifth slower than zeros do.
//
// float8: sums are kept in the tensor core's own accumulator throughout, as vLLM's dense kernels
// do.
//
// This file holds the tiles; cutlass.py says which one when.
//
// include: cutlass
// architectures: 9.0a

// Assertions in device code are calls, and calls keep wgmma from running asynchronously.
#ifndef NDEBUG
#define NDEBUG
#endif

#include <cuda_runtime.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>

// Only what Hopper needs: CUTLASS's own collections of headers take twice as long to read.
// clang-format off: the order matters.
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm90_sparse_mma_tma_gmma_ss_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_gmma_builder.inl"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"
#include "cutlass/kernel_hardware_info.hpp"
// clang-format on

namespace sparse_gemm {

using namespace cute;
using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;
using FfiTensor = tvm::ffi::Tensor;
namespace fusion = cutlass::epilogue::fusion;

#define CHECK_CUDA(call)                                                                         \
  do {                                                                                           \
    cudaError_t error_ = (call);                                                                 \
    if (error_ != cudaSuccess)                                                                   \
      TVM_FFI_THROW(RuntimeError) << "sparse_gemm.cutlass: " << cudaGetErrorName(error_) << " (" \
                                  << cudaGetErrorString(error_) << ") in " #call;                \
  } while (0)

// ---- One kernel
// ------------------------------------------------------------------------------------------------

using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using CooperativeFast = cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum;
using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using PingpongFast = cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum;

template <class Element_, class Accumulator, class Tile_, class Cluster_, class Schedule,
          class Scheduler_>
struct Gemm {
  using Element = Element_;
  using Tile = Tile_;
  using Cluster = Cluster_;
  using Scheduler = Scheduler_;
  using Output = cutlass::bfloat16_t;
  using EpilogueSchedule = std::conditional_t<std::is_base_of_v<Cooperative, Schedule>,
                                              cutlass::epilogue::TmaWarpSpecializedCooperative,
                                              cutlass::epilogue::TmaWarpSpecialized>;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  static constexpr int kAlign = 128 / cutlass::sizeof_bits<Element>::value;  // what TMA asks for

  // w_scale[n] * (a_scale[m] * sum) + b[n]; a null pointer is a vector of ones, or zeros for b.
  using TokenScale = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>, 1>;
  using FeatureScale = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<_1, _0, _0>, 1>;
  using Bias = fusion::Sm90ColBroadcast<0, Tile, Output, float, Stride<_1, _0, _0>, 1>;
  using Epilogue = fusion::Sm90EVT<
      fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Output, float, kRound>, FeatureScale,
      fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>, TokenScale,
                      fusion::Sm90AccFetch>,
      Bias>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, Accumulator, float, void,
      cutlass::layout::ColumnMajor, 8, Output, cutlass::layout::ColumnMajor, 8, EpilogueSchedule,
      Epilogue>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
      2 * kAlign, Element, cutlass::layout::ColumnMajor, kAlign, Accumulator, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue, Scheduler>;
  using SparseConfig = typename CollectiveMainloop::SparseConfig;
};

// tokens, features: sizes of a tile.
template <int features, int tokens, int k, class Cluster, class Schedule, class Scheduler>
using Fp8 = Gemm<cutlass::float_e4m3_t, float, Shape<Int<features>, Int<tokens>, Int<k>>, Cluster,
                 Schedule, Scheduler>;
template <int features, int tokens, int k, class Cluster, class Schedule, class Scheduler>
using Int8 =
    Gemm<int8_t, int32_t, Shape<Int<features>, Int<tokens>, Int<k>>, Cluster, Schedule, Scheduler>;
template <int features, int tokens, int k, class Cluster, class Schedule, class Scheduler>
using Bf16 = Gemm<cutlass::bfloat16_t, float, Shape<Int<features>, Int<tokens>, Int<k>>, Cluster,
                  Schedule, Scheduler>;

using Alone = Shape<_1, _1, _1>;
using Pair = Shape<_2, _1, _1>;  // two blocks of other features load the same A once
// Every block computes whole tiles; or the tiles of the last, not full wave are shared out along K,
// which takes scratch memory for partial sums and adds them in a fixed order.
using Whole = cutlass::gemm::PersistentScheduler;
using Shared = cutlass::gemm::StreamKScheduler;

// ---- Launching
// -------------------------------------------------------------------------------------------------

struct Problem {
  int device;
  cudaStream_t stream;
  void const *a, *a_scale, *values, *metadata, *w_scale, *bias;
  void* y;
  int m, n, k;
  int64_t y_stride;
  int swizzle, raster;
};

// CUTLASS's own entry point does the same under a name of two thousand letters.
template <class G>
__global__ void __launch_bounds__(G::Kernel::MaxThreadsPerBlock, 1)
    multiply(const __grid_constant__ typename G::Kernel::Params params) {
  extern __shared__ char shared[];
  typename G::Kernel kernel;
  kernel(params, shared);
}

struct Limits {
  int multiprocessors = 0, clusters = 0;
};

// Sets the device of the calling thread for one scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    CHECK_CUDA(cudaGetDevice(&before_));
    if (before_ != device) CHECK_CUDA(cudaSetDevice(device));
    now_ = device;
  }
  ~OnDevice() {
    if (before_ != now_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0, now_ = 0;
};

// What the device holds at once; asked for once. It also lets the kernel take all of shared memory.
template <class G>
Limits limits(int device) {
  static std::mutex mutex;
  static std::map<int, Limits> known;
  const std::lock_guard<std::mutex> guard(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  using Kernel = typename G::Kernel;
  Limits found;
  CHECK_CUDA(cudaFuncSetAttribute(multiply<G>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Kernel::SharedStorageSize));
  CHECK_CUDA(
      cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {size<0>(typename G::Cluster{}), size<1>(typename G::Cluster{}), 1};
  config.gridDim = dim3(attribute.val.clusterDim.x * found.multiprocessors,
                        attribute.val.clusterDim.y);  // it only has to be made of clusters
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK_CUDA(cudaOccupancyMaxActiveClusters(&found.clusters, multiply<G>, &config));
  return known[device] = found;
}

template <class G>
void launch(Problem const& p) {
  using Kernel = typename G::Kernel;
  using Element = typename G::Element;
  using Raster = cutlass::gemm::kernel::detail::RasterOrderOptions;
  const Limits device = limits<G>(p.device);
  const auto shape = make_shape(p.n, p.m, p.k, 1);
  typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      shape,
      {static_cast<Element const*>(p.values), G::SparseConfig::fill_layoutA(shape),
       static_cast<Element const*>(p.a), make_stride(int64_t{p.k}, _1{}, int64_t{0}),
       static_cast<uint8_t const*>(p.metadata), G::SparseConfig::fill_layoutE(shape)},
      {{{static_cast<float const*>(p.w_scale), 1.f},
        {{static_cast<float const*>(p.a_scale), 1.f}, {}, {}},
        {static_cast<cutlass::bfloat16_t const*>(p.bias)},
        {}},
       nullptr,
       {},
       static_cast<cutlass::bfloat16_t*>(p.y),
       make_stride(_1{}, p.y_stride, int64_t{0})},
      {p.device, device.multiprocessors, device.clusters}};
  arguments.scheduler.max_swizzle_size = p.swizzle;
  arguments.scheduler.raster_order = static_cast<Raster>(p.raster);
  FfiTensor scratch;
  if constexpr (std::is_same_v<typename G::Scheduler, Shared>) {
    // From torch's allocator, which hands it out again only behind this launch, and during a
    // capture from the graph's own pool.
    if (const size_t bytes = Kernel::get_workspace_size(arguments); bytes > 0) {
      scratch = FfiTensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {static_cast<int64_t>(bytes)},
                                        DLDataType{kDLUInt, 8, 1}, DLDevice{kDLCUDA, p.device});
      if (Kernel::initialize_workspace(arguments, scratch.data_ptr(), p.stream) !=
          cutlass::Status::kSuccess)
        TVM_FFI_THROW(RuntimeError) << "sparse_gemm.cutlass: the scratch memory cannot be cleared";
    }
  }
  const auto params =
      Kernel::to_underlying_arguments(arguments, scratch.defined() ? scratch.data_ptr() : nullptr);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {size<0>(typename G::Cluster{}), size<1>(typename G::Cluster{}), 1};
  cudaLaunchConfig_t config{};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = p.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK_CUDA(cudaLaunchKernelEx(&config, multiply<G>, params));
}

// ---- The tiles of each dtype, in the order in which cutlass.py numbers them
// --------------------------------------

// How all tiles of a dtype want the metadata; it depends on min(K of the tile, 128).
using Layout8 = Int8<128, 256, 128, Pair, Cooperative, Whole>::SparseConfig;
using Layout16 = Bf16<128, 256, 64, Pair, Cooperative, Whole>::SparseConfig;

struct Entry {
  void (*launch)(Problem const&);
  int features, tokens, k;
};

template <class G>
constexpr Entry entry() {
  using Tile = typename G::Tile;
  using Layout =
      std::conditional_t<cutlass::sizeof_bits<typename G::Element>::value == 8, Layout8, Layout16>;
  static_assert(
      std::is_same_v<typename G::SparseConfig::TensorEAtom, typename Layout::TensorEAtom>);
  return {launch<G>, size<0>(Tile{}), size<1>(Tile{}), size<2>(Tile{})};
}

constexpr Entry kFp8[] = {
    entry<Fp8<128, 256, 128, Pair, CooperativeFast, Whole>>(),
    entry<Fp8<128, 256, 128, Pair, CooperativeFast, Shared>>(),
    entry<Fp8<128, 128, 128, Pair, CooperativeFast, Whole>>(),
    entry<Fp8<64, 32, 256, Alone, PingpongFast, Whole>>(),
};
constexpr Entry kInt8[] = {
    entry<Int8<128, 256, 128, Pair, Cooperative, Whole>>(),
    entry<Int8<128, 256, 128, Pair, Cooperative, Shared>>(),
    entry<Int8<128, 128, 128, Pair, Cooperative, Whole>>(),
    entry<Int8<64, 32, 256, Alone, Pingpong, Whole>>(),
};
constexpr Entry kBf16[] = {
    entry<Bf16<128, 256, 64, Pair, Cooperative, Whole>>(),
    entry<Bf16<128, 256, 64, Pair, Cooperative, Shared>>(),
    entry<Bf16<64, 32, 64, Alone, Pingpong, Whole>>(),
};

// ---- What Python calls
// -------------------------------------------------------------------------------------------------

template <int size>
Entry const& pick(Entry const (&entries)[size], int64_t index) {
  if (index < 0 || index >= size)
    TVM_FFI_THROW(ValueError) << "sparse_gemm.cutlass: there are tiles 0 to " << size - 1
                              << ", not " << index;
  return entries[index];
}

void run(TensorView a, Optional<TensorView> a_scale, TensorView values, TensorView metadata,
         Optional<TensorView> w_scale, Optional<TensorView> bias, TensorView y, int64_t tile,
         int64_t swizzle, int64_t raster) {
  const auto pointer = [](Optional<TensorView> const& t) -> void const* {
    return t.has_value() ? t.value().data_ptr() : nullptr;
  };
  const int device = a.device().device_id;
  const Problem p{device,
                  static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device)),
                  a.data_ptr(),
                  pointer(a_scale),
                  values.data_ptr(),
                  metadata.data_ptr(),
                  pointer(w_scale),
                  pointer(bias),
                  y.data_ptr(),
                  static_cast<int>(a.size(0)),
                  static_cast<int>(y.size(1)),
                  static_cast<int>(a.size(1)),
                  y.stride(0),
                  static_cast<int>(swizzle),
                  static_cast<int>(raster)};
  const OnDevice scope(device);
  switch (a.dtype().code) {
    case kDLInt:
      return pick(kInt8, tile).launch(p);
    case kDLBfloat:
      return pick(kBf16, tile).launch(p);
    default:
      return pick(kFp8, tile).launch(p);
  }
}

// For a weight of [rows, 8 * bytes] and `bits` per value, the place in the metadata of each byte:
// byte j of a row says which of its values 8j to 8j+7 are kept. offsets [rows, bytes] int64, on the
// CPU; returns the bytes that the metadata takes. Needs no GPU.
int64_t metadata_offsets(TensorView offsets, int64_t bits) {
  const auto fill = [&](auto config) {
    const int rows = static_cast<int>(offsets.size(0)), bytes = static_cast<int>(offsets.size(1));
    const auto layout = decltype(config)::fill_layoutE(make_shape(rows, 1, 8 * bytes, 1));
    auto* out = static_cast<int64_t*>(offsets.data_ptr());
    for (int row = 0; row < rows; ++row)
      for (int byte = 0; byte < bytes; ++byte)
        out[int64_t{row} * bytes + byte] = layout(row, 8 * byte, 0) / 8;
    return static_cast<int64_t>(size(layout)) / 8;
  };
  return bits == 8 ? fill(Layout8{}) : fill(Layout16{});
}

// (features, tokens, k) of each tile of a dtype: 8 bits for float8, -8 for int8, 16 for bfloat16.
Array<Array<int64_t>> tiles(int64_t kind) {
  Array<Array<int64_t>> out;
  const auto add = [&](auto const& entries) {
    for (Entry const& e : entries) out.push_back(Array<int64_t>{e.features, e.tokens, e.k});
  };
  if (kind == 16)
    add(kBf16);
  else if (kind == 8)
    add(kFp8);
  else
    add(kInt8);
  return out;
}

}  // namespace sparse_gemm

TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, sparse_gemm::run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(metadata_offsets, sparse_gemm::metadata_offsets);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tiles, sparse_gemm::tiles);
