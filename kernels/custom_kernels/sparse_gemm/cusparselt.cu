// SPDX-License-Identifier: Apache-2.0
//
// y = (A · Wᵀ) · a_scale · w_scale + b through cuSPARSELt, and one kernel for what it cannot fuse.
//
//   A [M, K'], int8, float8_e4m3fn or bfloat16; W compressed by the library; a_scale [M] and
//   w_scale [N] float32 with the 8-bit dtypes; b [N] bfloat16 or none; y [M, N] bfloat16.
//
// The library computes yᵀ [N, M] = W · Aᵀ, column-major: its rows are features. So it can scale by
// feature (its vector of alphas) and add a bias by feature, but not scale by token, and a bias
// comes after that. Fused are therefore:
//
//   bfloat16: everything; the result is rounded once.
//   int8: w_scale. The rest, y · a_scale + b, is a kernel that reads and writes y in place: the
//     result is rounded twice, and y goes through memory three times.
//   float8: nothing, since the library takes no vector of alphas there; the same kernel scales by
//     feature too.
//
// This file lists, times and launches; cusparselt.py decides when.
//
// link: cusparseLt

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cusparseLt.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>

#define KERNEL "sparse_gemm.cusparselt"
#include "include/launch.cuh"

namespace {

using custom_kernels::current_stream;
using custom_kernels::DeviceGuard;
using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

#define CHECK_SPARSE(call)                                                                    \
  do {                                                                                        \
    cusparseStatus_t status_ = (call);                                                        \
    if (status_ != CUSPARSE_STATUS_SUCCESS)                                                   \
      TVM_FFI_THROW(RuntimeError) << KERNEL ": " << cusparseLtGetErrorString(status_) << " (" \
                                  << static_cast<int>(status_) << ") in " #call;              \
  } while (0)

// ---- What the library cannot fuse
// ------------------------------------------------------------------------------

constexpr int kVector = 8;  // bfloat16 in 16 bytes
constexpr int kThreads = 256;

// out[m, n] = y[m, n] * a_scale[m] * w_scale[n] + b[n], eight at a time; without w_scale it is 1. y
// and out may be the same.
__global__ void __launch_bounds__(kThreads)
    scale_rows(const uint4* y, int64_t y_vectors, const float* a_scale, const float* w_scale,
               const __nv_bfloat16* bias, __nv_bfloat16* out, int64_t rows, int64_t columns) {
  const int64_t vectors = (columns + kVector - 1) / kVector;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= rows * vectors) return;
  const int64_t row = index / vectors, vector = index % vectors, column = vector * kVector;
  union {
    uint4 whole;
    __nv_bfloat16 part[kVector];
  } values;
  values.whole = y[row * y_vectors + vector];
  const float scale = a_scale[row];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const bool inside = column + i < columns;
    const float w = w_scale != nullptr && inside ? w_scale[column + i] : 1.f;
    const float b = bias != nullptr && inside ? __bfloat162float(bias[column + i]) : 0.f;
    values.part[i] = __float2bfloat16(fmaf(__bfloat162float(values.part[i]) * scale, w, b));
  }
  __nv_bfloat16* target = out + row * columns + column;
  if (columns % kVector == 0) {
    *reinterpret_cast<uint4*>(target) = values.whole;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (column + i < columns) target[i] = values.part[i];
}

// ---- One product, described to the library
// ----------------------------------------------------------------------

cudaDataType type_of(DLDataType dtype) {
  if (dtype.code == kDLInt) return CUDA_R_8I;
  return dtype.code == kDLBfloat ? CUDA_R_16BF : CUDA_R_8F_E4M3;
}

using Key = std::array<int64_t, 6>;

struct Problem {
  int device;
  cudaStream_t stream;
  cudaDataType type;
  int64_t m, n, k;  // n padded as the library wants it
  const void *a, *w, *w_scale, *bias;
  void* y;

  Problem(TensorView a_, TensorView w_, const Optional<TensorView>& w_scale_,
          const Optional<TensorView>& bias_, TensorView y_) {
    device = a_.device().device_id;
    stream = current_stream(device);
    type = type_of(a_.dtype());
    m = a_.size(0), n = y_.size(1), k = a_.size(1);
    a = a_.data_ptr(), w = w_.data_ptr(), y = y_.data_ptr();
    w_scale = w_scale_.has_value() ? w_scale_.value().data_ptr() : nullptr;
    bias = bias_.has_value() ? bias_.value().data_ptr() : nullptr;
  }

  // The bias is part of the description, so of the plan.
  Key key() const { return {device, type, m, n, k, reinterpret_cast<int64_t>(bias)}; }
};

constexpr uint32_t kAlignment = 16;

// A plan points into the descriptions that it is made of: it is never moved.
struct Plan {
  cusparseLtMatDescriptor_t w, a, y;
  cusparseLtMatmulDescriptor_t product;
  cusparseLtMatmulAlgSelection_t choice;
  cusparseLtMatmulPlan_t plan;
  size_t workspace = 0;

  Plan(const cusparseLtHandle_t* handle, const Problem& p, const Array<int64_t>& settings);
  Plan(const Plan&) = delete;
  ~Plan() {
    cusparseLtMatmulPlanDestroy(&plan);
#if CUSPARSELT_VERSION >= 800  // earlier ones have nothing to destroy here
    cusparseLtMatmulAlgSelectionDestroy(&choice);
#endif
    for (auto* matrix : {&w, &a, &y}) cusparseLtMatDescriptorDestroy(matrix);
  }
};

struct State {
  std::mutex mutex;
  std::map<int, cusparseLtHandle_t> handles;
  std::map<Key, std::unique_ptr<Plan>> plans;
};

// Never destroyed: at exit the CUDA context may be gone before any static of ours.
State& state() {
  static State* instance = new State;
  return *instance;
}

// Call with the mutex held, on the device.
const cusparseLtHandle_t* handle(int device) {
  auto [found, fresh] = state().handles.try_emplace(device);
  if (fresh) CHECK_SPARSE(cusparseLtInit(&found->second));
  return &found->second;
}

constexpr std::array kSettings{CUSPARSELT_MATMUL_ALG_CONFIG_ID, CUSPARSELT_MATMUL_SPLIT_K,
                               CUSPARSELT_MATMUL_SPLIT_K_MODE, CUSPARSELT_MATMUL_SPLIT_K_BUFFERS};

void describe_weight(const cusparseLtHandle_t* library, cusparseLtMatDescriptor_t* w, int64_t n,
                     int64_t k, cudaDataType type) {
  CHECK_SPARSE(cusparseLtStructuredDescriptorInit(
      library, w, n, k, k, kAlignment, type, CUSPARSE_ORDER_ROW, CUSPARSELT_SPARSITY_50_PERCENT));
}

Plan::Plan(const cusparseLtHandle_t* library, const Problem& p, const Array<int64_t>& settings) {
  describe_weight(library, &w, p.n, p.k, p.type);
  CHECK_SPARSE(cusparseLtDenseDescriptorInit(library, &a, p.k, p.m, p.k, kAlignment, p.type,
                                             CUSPARSE_ORDER_COL));
  CHECK_SPARSE(cusparseLtDenseDescriptorInit(library, &y, p.n, p.m, p.n, kAlignment, CUDA_R_16BF,
                                             CUSPARSE_ORDER_COL));
  CHECK_SPARSE(cusparseLtMatmulDescriptorInit(
      library, &product, CUSPARSE_OPERATION_NON_TRANSPOSE, CUSPARSE_OPERATION_NON_TRANSPOSE, &w, &a,
      &y, &y, p.type == CUDA_R_8I ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F));
  if (p.w_scale != nullptr) {
    const int on = 1;
    CHECK_SPARSE(cusparseLtMatmulDescSetAttribute(
        library, &product, CUSPARSELT_MATMUL_ALPHA_VECTOR_SCALING, &on, sizeof(on)));
  }
  if (p.bias != nullptr)
    CHECK_SPARSE(cusparseLtMatmulDescSetAttribute(library, &product, CUSPARSELT_MATMUL_BIAS_POINTER,
                                                  &p.bias, sizeof(p.bias)));
  CHECK_SPARSE(
      cusparseLtMatmulAlgSelectionInit(library, &choice, &product, CUSPARSELT_MATMUL_ALG_DEFAULT));
  // A mode of splitting K can only be set where K is split.
  for (size_t i = 0; i < settings.size(); ++i) {
    const int value = static_cast<int>(settings[i]);
    if (i < 2 || (settings[1] > 1 && value > 0))
      CHECK_SPARSE(
          cusparseLtMatmulAlgSetAttribute(library, &choice, kSettings[i], &value, sizeof(value)));
  }
  CHECK_SPARSE(cusparseLtMatmulPlanInit(library, &plan, &product, &choice));
  CHECK_SPARSE(cusparseLtMatmulGetWorkspace(library, &plan, &workspace));
}

// Scratch memory for one launch, from torch's allocator: safe to give back once the launch is
// queued, and of the graph's own pool during a capture.
Tensor scratch(const Problem& p, size_t bytes) {
  return Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {static_cast<int64_t>(bytes)},
                              DLDataType{kDLUInt, 8, 1}, DLDevice{kDLCUDA, p.device});
}

const void* alpha(const Problem& p) {
  static const float one = 1.f;
  return p.w_scale != nullptr ? p.w_scale : &one;
}

// ---- What Python calls
// ------------------------------------------------------------------------------------------

// Bytes of a compressed weight [n, k], and of the scratch memory that compressing takes.
Array<int64_t> compressed_size(TensorView expanded) {
  std::lock_guard<std::mutex> guard(state().mutex);
  const int device = expanded.device().device_id;
  DeviceGuard scope(device);
  cusparseLtMatDescriptor_t w;
  describe_weight(handle(device), &w, expanded.size(0), expanded.size(1),
                  type_of(expanded.dtype()));
  size_t bytes = 0, buffer = 0;
  CHECK_SPARSE(cusparseLtSpMMACompressedSize2(handle(device), &w, &bytes, &buffer));
  cusparseLtMatDescriptorDestroy(&w);
  return {static_cast<int64_t>(bytes), static_cast<int64_t>(buffer)};
}

void compress(TensorView expanded, TensorView out, TensorView buffer) {
  std::lock_guard<std::mutex> guard(state().mutex);
  const int device = expanded.device().device_id;
  DeviceGuard scope(device);
  cusparseLtMatDescriptor_t w;
  describe_weight(handle(device), &w, expanded.size(0), expanded.size(1),
                  type_of(expanded.dtype()));
  CHECK_SPARSE(cusparseLtSpMMACompress2(handle(device), &w, /*isSparseA=*/1,
                                        CUSPARSE_OPERATION_NON_TRANSPOSE, expanded.data_ptr(),
                                        out.data_ptr(), buffer.data_ptr(), current_stream(device)));
  cusparseLtMatDescriptorDestroy(&w);
}

// Lets the library time its algorithms for this shape; waits for the device, overwrites y. Returns
// the settings of the fastest.
Array<int64_t> search(TensorView a, TensorView w, Optional<TensorView> w_scale,
                      Optional<TensorView> bias, TensorView y) {
  const Problem p(a, w, w_scale, bias, y);
  std::lock_guard<std::mutex> guard(state().mutex);
  DeviceGuard scope(p.device);
  const cusparseLtHandle_t* library = handle(p.device);
  Plan plan(library, p, {});
  // Algorithms differ in what they need; the library asks for as much only once one is chosen.
  const Tensor memory = scratch(p, std::max(plan.workspace, size_t{64} << 20));
  cudaStream_t stream = p.stream;
  const float zero = 0.f;
  CHECK_SPARSE(cusparseLtMatmulSearch(library, &plan.plan, alpha(p), p.w, p.a, &zero, p.y, p.y,
                                      memory.data_ptr(), &stream, 1));
  Array<int64_t> settings;
  for (const auto attribute : kSettings) {
    int value = 0;
    CHECK_SPARSE(
        cusparseLtMatmulAlgGetAttribute(library, &plan.choice, attribute, &value, sizeof(value)));
    settings.push_back(value);
  }
  return settings;
}

// Makes the plan of exactly this shape with these settings; none are the library's default.
void adopt(TensorView a, TensorView w, Optional<TensorView> w_scale, Optional<TensorView> bias,
           TensorView y, Array<int64_t> settings) {
  const Problem p(a, w, w_scale, bias, y);
  std::lock_guard<std::mutex> guard(state().mutex);
  DeviceGuard scope(p.device);
  state().plans[p.key()] = std::make_unique<Plan>(handle(p.device), p, settings);
}

// y = w_scale · (A · Wᵀ) + b. False, and nothing done, if this shape has no plan.
bool multiply(TensorView a, TensorView w, Optional<TensorView> w_scale, Optional<TensorView> bias,
              TensorView y) {
  const Problem p(a, w, w_scale, bias, y);
  std::lock_guard<std::mutex> guard(state().mutex);
  const auto found = state().plans.find(p.key());
  if (found == state().plans.end()) return false;
  DeviceGuard scope(p.device);
  Plan& plan = *found->second;
  Tensor memory;
  if (plan.workspace > 0) memory = scratch(p, plan.workspace);
  cudaStream_t stream = p.stream;
  const float zero = 0.f;
  CHECK_SPARSE(cusparseLtMatmul(handle(p.device), &plan.plan, alpha(p), p.w, p.a, &zero, p.y, p.y,
                                memory.defined() ? memory.data_ptr() : nullptr, &stream, 1));
  return true;
}

// out [M, N] = y [M, its rows a multiple of 8] · a_scale [M] · w_scale [N] + b [N]; out may be y.
void scale(TensorView y, TensorView a_scale, Optional<TensorView> w_scale,
           Optional<TensorView> bias, TensorView out) {
  const int device = y.device().device_id;
  DeviceGuard scope(device);
  const int64_t rows = out.size(0), columns = out.size(1);
  const int64_t vectors = rows * ((columns + kVector - 1) / kVector);
  scale_rows<<<static_cast<unsigned>((vectors + kThreads - 1) / kThreads), kThreads, 0,
               current_stream(device)>>>(
      static_cast<const uint4*>(y.data_ptr()), y.size(1) / kVector,
      static_cast<const float*>(a_scale.data_ptr()),
      w_scale.has_value() ? static_cast<const float*>(w_scale.value().data_ptr()) : nullptr,
      bias.has_value() ? static_cast<const __nv_bfloat16*>(bias.value().data_ptr()) : nullptr,
      static_cast<__nv_bfloat16*>(out.data_ptr()), rows, columns);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(compressed_size, compressed_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(compress, compress);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(search, search);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adopt, adopt);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(multiply, multiply);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scale, scale);
