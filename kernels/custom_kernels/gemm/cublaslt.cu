// SPDX-License-Identifier: Apache-2.0
//
// y = x · Wᵀ + b through cuBLASLt, with the algorithm found by timing.
//
//   x [M, K], W [N, K], b [N] or none, y [M, N]; all bfloat16 or all float16, rows contiguous, the rows of x and
//   W any distance apart. Products are summed in float32, also between the parts of a split K; the bias is added
//   in float32 by the epilogue; the result is rounded once.
//
// cuBLASLt is column-major, so it sees yᵀ [N, M] = W · xᵀ: its A is W (transposed), its B is x, its rows are N.
//
// The library's own guess is good but knows neither that weights come from HBM at every step of inference
// (nothing of them is left in L2 when a layer's turn comes again) nor which kernel wins on this very chip. `search`
// therefore times what the heuristics offer, variations of the best of it, and classic cuBLAS, each with a cold L2.
//
// Python decides when to search and keeps what was found (cublaslt.py); this file holds no policy.
//
// link: cublasLt cublas

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace {

using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what NVIDIA advises for Hopper
constexpr int kHeuristics = 64;

#define CHECK_CUBLAS(call)                                                                      \
  do {                                                                                          \
    cublasStatus_t status_ = (call);                                                            \
    if (status_ != CUBLAS_STATUS_SUCCESS)                                                       \
      TVM_FFI_THROW(RuntimeError) << "gemm.cublaslt: " << cublasGetStatusName(status_) << " in " \
                                  << #call;                                                     \
  } while (0)

#define CHECK_CUDA(call)                                                                      \
  do {                                                                                        \
    cudaError_t error_ = (call);                                                              \
    if (error_ != cudaSuccess)                                                                \
      TVM_FFI_THROW(RuntimeError) << "gemm.cublaslt: " << cudaGetErrorName(error_) << " ("    \
                                  << cudaGetErrorString(error_) << ") in " << #call;          \
  } while (0)

// ---- One GEMM, described to the library -----------------------------------------------------------------------

// Bytes that both a pointer and every row after it are aligned to. No kernel asks for more than 16.
uint32_t alignment(const void* pointer, int64_t row_bytes) {
  uint64_t bits = reinterpret_cast<uint64_t>(pointer) | static_cast<uint64_t>(row_bytes) | 16;
  return static_cast<uint32_t>(bits & -bits);
}

using Key = std::array<int64_t, 12>;

struct Problem {
  int device;
  cudaStream_t stream;
  cudaDataType_t type;
  int64_t m, n, k, x_stride, w_stride;
  const void *x, *w, *bias;
  void* y;
  uint32_t x_align, w_align, y_align, bias_align;

  Problem(TensorView x_, TensorView w_, const Optional<TensorView>& b_, TensorView y_) {
    device = x_.device().device_id;
    stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device));
    type = x_.dtype().code == kDLBfloat ? CUDA_R_16BF : CUDA_R_16F;
    m = x_.size(0), n = w_.size(0), k = x_.size(1);
    // The distance between rows means nothing where there is one row.
    x_stride = m == 1 ? k : x_.stride(0);
    w_stride = n == 1 ? k : w_.stride(0);
    x = x_.data_ptr(), w = w_.data_ptr(), y = y_.data_ptr();
    bias = b_.has_value() ? b_.value().data_ptr() : nullptr;
    x_align = alignment(x, x_stride * 2), w_align = alignment(w, w_stride * 2);
    y_align = alignment(y, n * 2), bias_align = bias ? alignment(bias, 16) : 16;
  }

  Key key() const {
    return {device,  type,    m,       n,       k,          x_stride,
            w_stride, x_align, w_align, y_align, bias_align, bias != nullptr};
  }
};

// The descriptors of a problem. They live on the stack: setting them up costs less than a look-up would.
struct Description {
  // The library takes them by pointers to non-const and only reads them.
  mutable cublasLtMatmulDescOpaque_t matmul;
  mutable cublasLtMatrixLayoutOpaque_t a, b, d;

  explicit Description(const Problem& p) {
    CHECK_CUBLAS(cublasLtMatmulDescInit(&matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transposed = CUBLAS_OP_T;
    set(CUBLASLT_MATMUL_DESC_TRANSA, transposed);
    if (p.bias != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, p.type);
    }
    CHECK_CUBLAS(cublasLtMatrixLayoutInit(&a, p.type, p.k, p.n, p.w_stride));
    CHECK_CUBLAS(cublasLtMatrixLayoutInit(&b, p.type, p.k, p.m, p.x_stride));
    CHECK_CUBLAS(cublasLtMatrixLayoutInit(&d, p.type, p.n, p.m, p.n));
  }

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(&matmul, attribute, &value, sizeof(value)));
  }
};

// How to run a problem: an algorithm of cuBLASLt, or classic cuBLAS, which picks its own.
struct Choice {
  bool classic = false;
  size_t workspace = 0;
  cublasLtMatmulAlgo_t algo{};
};

// ---- What lives as long as the process ------------------------------------------------------------------------

struct DeviceHandles {
  cublasLtHandle_t lt = nullptr;
  cublasHandle_t classic = nullptr;
};

// Never destroyed: at exit torch's allocator and the CUDA context may be gone before any static of ours.
struct State {
  std::mutex mutex;
  std::map<int, DeviceHandles> handles;
  std::map<Key, Choice> choices;
  std::map<std::pair<int, cudaStream_t>, Tensor> workspaces;
};

State& state() {
  static State* instance = new State;
  return *instance;
}

// Sets the device of the calling thread for one scope; handles are bound to the device they are made on.
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

// Call with the mutex held.
DeviceHandles& handles(int device) {
  DeviceHandles& found = state().handles[device];
  if (found.lt == nullptr) CHECK_CUBLAS(cublasLtCreate(&found.lt));
  return found;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  CHECK_CUDA(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Scratch memory for one launch, from torch's allocator.
//
// Outside of a capture it is made once per stream and kept, so that kernels in flight on two streams never share
// it. A graph gets memory of its own pool instead, given back to that pool when the call ends: graphs that replay at
// once on different streams do not share it either, and later nodes of the same graph can use it again.
Tensor workspace(const Problem& p, size_t bytes) {
  const auto make = [&](int64_t size) {
    return Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {size}, DLDataType{kDLUInt, 8, 1},
                                DLDevice{kDLCUDA, p.device});
  };
  if (capturing(p.stream)) return make(static_cast<int64_t>(bytes));
  Tensor& kept = state().workspaces[{p.device, p.stream}];
  if (!kept.defined()) kept = make(kWorkspaceBytes);
  return kept;
}

// ---- Launching ------------------------------------------------------------------------------------------------

cublasStatus_t launch_classic(const Problem& p, const DeviceHandles& device, void* scratch) {
  const float one = 1.f, zero = 0.f;
  cublasStatus_t status = cublasSetStream(device.classic, p.stream);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasSetWorkspace(device.classic, scratch, kWorkspaceBytes);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  return cublasGemmEx_64(device.classic, CUBLAS_OP_T, CUBLAS_OP_N, p.n, p.m, p.k, &one, p.w, p.type,
                         p.w_stride, p.x, p.type, p.x_stride, &zero, p.y, p.type, p.n,
                         CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

// Call with the mutex held: it guards the workspace table and the classic handle's stream.
cublasStatus_t launch(const Problem& p, const Description& d, const Choice& choice) {
  const DeviceHandles& device = handles(p.device);
  const size_t bytes = choice.classic ? kWorkspaceBytes : choice.workspace;
  Tensor memory;
  if (bytes > 0) memory = workspace(p, bytes);
  void* scratch = memory.defined() ? memory.data_ptr() : nullptr;
  if (choice.classic) return launch_classic(p, device, scratch);
  const float one = 1.f, zero = 0.f;
  return cublasLtMatmul(device.lt, &d.matmul, &one, p.w, &d.a, p.x, &d.b, &zero, p.y, &d.d, p.y, &d.d,
                        &choice.algo, scratch, bytes, p.stream);
}

// ---- What there is to choose from -----------------------------------------------------------------------------

// The heuristics' candidates within `workspace` bytes, best guess first. Empty if there is none.
std::vector<Choice> heuristics(const Problem& p, const Description& d, size_t workspace, int count) {
  cublasLtMatmulPreferenceOpaque_t preference;
  CHECK_CUBLAS(cublasLtMatmulPreferenceInit(&preference));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p.w_align);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p.x_align);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.y_align);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p.y_align);
  // Parts of a split K are added in float32, never in the output's 16 bits.
  const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction);

  std::vector<cublasLtMatmulHeuristicResult_t> results(count);
  int found = 0;
  cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handles(p.device).lt, &d.matmul, &d.a, &d.b, &d.d, &d.d, &preference,
                                     count, results.data(), &found);
  if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED) CHECK_CUBLAS(status);
  std::vector<Choice> choices;
  for (int i = 0; i < found; ++i)
    if (results[i].state == CUBLAS_STATUS_SUCCESS)
      choices.push_back({false, results[i].workspaceSize, results[i].algo});
  return choices;
}

Choice first_guess(const Problem& p, const Description& d) {
  std::vector<Choice> choices = heuristics(p, d, kWorkspaceBytes, 1);
  if (choices.empty())
    TVM_FFI_THROW(RuntimeError) << "gemm.cublaslt: cuBLASLt has no algorithm for M=" << p.m << " N=" << p.n
                                << " K=" << p.k << " with rows " << p.x_stride << " and " << p.w_stride
                                << " apart";
  return choices[0];
}

// True if the library accepts the algorithm for this very problem; sets the workspace that it needs.
bool accepts(const Problem& p, const Description& d, Choice& choice) {
  cublasLtMatmulHeuristicResult_t result;
  cublasStatus_t status = cublasLtMatmulAlgoCheck(handles(p.device).lt, &d.matmul, &d.a, &d.b, &d.d, &d.d,
                                                  &choice.algo, &result);
  if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > kWorkspaceBytes) return false;
  choice.workspace = result.workspaceSize;
  return true;
}

// The same kernel with K split otherwise: few rows leave most of the chip idle unless K is shared out, and
// the heuristics offer few of the ways to do so.
std::vector<Choice> variations(const Problem& p, const Description& d, const Choice& base) {
  std::vector<Choice> out;
  for (const int32_t split : {1, 2, 3, 4, 5, 6, 8, 10, 12, 16}) {
    Choice choice = base;
    const uint32_t scheme =
        split == 1 ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    if (cublasLtMatmulAlgoConfigSetAttribute(&choice.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split,
                                             sizeof(split)) != CUBLAS_STATUS_SUCCESS ||
        cublasLtMatmulAlgoConfigSetAttribute(&choice.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme,
                                             sizeof(scheme)) != CUBLAS_STATUS_SUCCESS)
      continue;
    if (accepts(p, d, choice)) out.push_back(choice);
  }
  return out;
}

// ---- Timing ---------------------------------------------------------------------------------------------------

// Reads `count` vectors, more than L2 holds, so that nothing of the operands is left in it. It reads rather than
// writes: written lines would still be on their way to HBM, and slow down what is timed next.
__global__ void __launch_bounds__(256) evict_l2(const uint4* __restrict__ memory, int64_t count, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint4 value = memory[i];
    sum ^= value.x ^ value.y ^ value.z ^ value.w;
  }
  if (sum == 0x9e3779b9u) *sink = sum;  // keeps the loads; the scratch is zero, so it is never written
}

struct Candidate {
  Choice choice;
  std::vector<float> milliseconds;

  float median() {
    if (milliseconds.empty()) return INFINITY;
    const size_t half = milliseconds.size() / 2;
    std::nth_element(milliseconds.begin(), milliseconds.begin() + half, milliseconds.end());
    return milliseconds[half];
  }
};

class Timer {
 public:
  Timer(const Problem& p, const Description& d, TensorView scratch) : p_(p), d_(d), scratch_(scratch) {
    CHECK_CUDA(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, p.device));
  }
  ~Timer() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  // Loads the kernel of every candidate and drops those that the library refuses to launch after all.
  void warm_up(std::vector<Candidate>& candidates) {
    const auto refused = [&](Candidate& c) { return launch(p_, d_, c.choice) != CUBLAS_STATUS_SUCCESS; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), refused), candidates.end());
    CHECK_CUDA(cudaStreamSynchronize(p_.stream));
  }

  // Times each candidate `rounds` times, all of them in turn, so that a drift of the clocks hits all alike.
  void time(std::vector<Candidate>& candidates, int rounds) {
    while (events_.size() < 2 * candidates.size()) {
      cudaEvent_t event;
      CHECK_CUDA(cudaEventCreate(&event));
      events_.push_back(event);
    }
    for (int round = 0; round < rounds; ++round) {
      for (size_t i = 0; i < candidates.size(); ++i) {
        evict_l2<<<4 * processors_, 256, 0, p_.stream>>>(static_cast<const uint4*>(scratch_.data_ptr()),
                                                         scratch_.numel() / 16,
                                                         static_cast<uint32_t*>(scratch_.data_ptr()));
        CHECK_CUDA(cudaGetLastError());
        CHECK_CUDA(cudaEventRecord(events_[2 * i], p_.stream));
        CHECK_CUBLAS(launch(p_, d_, candidates[i].choice));
        CHECK_CUDA(cudaEventRecord(events_[2 * i + 1], p_.stream));
      }
      CHECK_CUDA(cudaStreamSynchronize(p_.stream));
      for (size_t i = 0; i < candidates.size(); ++i) {
        float elapsed;
        CHECK_CUDA(cudaEventElapsedTime(&elapsed, events_[2 * i], events_[2 * i + 1]));
        candidates[i].milliseconds.push_back(elapsed);
      }
    }
  }

 private:
  const Problem& p_;
  const Description& d_;
  TensorView scratch_;
  int processors_ = 0;
  std::vector<cudaEvent_t> events_;
};

// Best first, and only those within `slack` of the best, at most `count`.
void keep_best(std::vector<Candidate>& candidates, float slack, size_t count) {
  std::sort(candidates.begin(), candidates.end(),
            [](Candidate& left, Candidate& right) { return left.median() < right.median(); });
  const float limit = candidates.front().median() * slack;
  size_t kept = 1;
  while (kept < candidates.size() && kept < count && candidates[kept].median() <= limit) ++kept;
  candidates.resize(kept);
}

void add_new(std::vector<Candidate>& candidates, const std::vector<Choice>& choices) {
  for (const Choice& choice : choices) {
    const auto same = [&](const Candidate& c) {
      return c.choice.classic == choice.classic &&
             std::memcmp(&c.choice.algo, &choice.algo, sizeof(choice.algo)) == 0;
    };
    if (std::none_of(candidates.begin(), candidates.end(), same)) candidates.push_back({choice, {}});
  }
}

// A choice as integers, for Python to keep: {classic, workspace, the algorithm's eight words}.
constexpr size_t kAlgoWords = sizeof(cublasLtMatmulAlgo_t) / sizeof(int64_t);

Array<int64_t> pack(const Choice& choice) {
  std::array<int64_t, kAlgoWords> words;
  std::memcpy(words.data(), &choice.algo, sizeof(choice.algo));
  Array<int64_t> out;
  out.push_back(choice.classic);
  out.push_back(static_cast<int64_t>(choice.workspace));
  for (int64_t word : words) out.push_back(word);
  return out;
}

Choice unpack(const Array<int64_t>& packed) {
  if (packed.size() != 2 + kAlgoWords)
    TVM_FFI_THROW(ValueError) << "gemm.cublaslt: a plan has " << 2 + kAlgoWords << " integers, not "
                              << packed.size();
  Choice choice{packed[0] != 0, static_cast<size_t>(packed[1]), {}};
  std::array<int64_t, kAlgoWords> words;
  for (size_t i = 0; i < kAlgoWords; ++i) words[i] = packed[2 + i];
  std::memcpy(&choice.algo, words.data(), sizeof(choice.algo));
  return choice;
}

// ---- What Python calls ----------------------------------------------------------------------------------------

// Launches with the plan adopted for exactly this shape. False, and nothing done, if there is none.
bool run(TensorView x, TensorView w, Optional<TensorView> b, TensorView y) {
  const Problem p(x, w, b, y);
  std::lock_guard<std::mutex> guard(state().mutex);
  const auto found = state().choices.find(p.key());
  if (found == state().choices.end()) return false;
  OnDevice scope(p.device);
  CHECK_CUBLAS(launch(p, Description(p), found->second));
  return true;
}

// Launches with the library's first guess and remembers nothing: for a capture that meets an unplanned shape.
void run_unplanned(TensorView x, TensorView w, Optional<TensorView> b, TensorView y) {
  const Problem p(x, w, b, y);
  const Description d(p);
  std::lock_guard<std::mutex> guard(state().mutex);
  OnDevice scope(p.device);
  CHECK_CUBLAS(launch(p, d, first_guess(p, d)));
}

// Takes a plan for this shape. False if the library does not accept it here.
bool adopt(TensorView x, TensorView w, Optional<TensorView> b, TensorView y, Array<int64_t> plan) {
  const Problem p(x, w, b, y);
  const Description d(p);
  Choice choice = unpack(plan);
  std::lock_guard<std::mutex> guard(state().mutex);
  OnDevice scope(p.device);
  if (choice.classic) {
    DeviceHandles& device = handles(p.device);
    if (device.classic == nullptr) CHECK_CUBLAS(cublasCreate(&device.classic));
    CHECK_CUBLAS(cublasSetMathMode(device.classic, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  } else if (!accepts(p, d, choice)) {
    return false;
  }
  state().choices[p.key()] = choice;
  return true;
}

// Finds the fastest way to run this shape, with x, w and b as they are; overwrites y. `scratch` is uint8, zero, and
// larger than L2. Returns the plan, then its time and the time of the library's first guess in nanoseconds.
Array<int64_t> search(TensorView x, TensorView w, Optional<TensorView> b, TensorView y, TensorView scratch) {
  const Problem p(x, w, b, y);
  const Description d(p);
  std::lock_guard<std::mutex> guard(state().mutex);
  OnDevice scope(p.device);

  std::vector<Candidate> candidates;
  add_new(candidates, {first_guess(p, d)});
  for (const size_t limit : {kWorkspaceBytes, kWorkspaceBytes / 8, size_t{0}})
    add_new(candidates, heuristics(p, d, limit, kHeuristics));
  if (p.bias == nullptr) {  // classic cuBLAS has no epilogue
    DeviceHandles& device = handles(p.device);
    if (device.classic == nullptr) CHECK_CUBLAS(cublasCreate(&device.classic));
    CHECK_CUBLAS(cublasSetMathMode(device.classic, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    Choice classic;
    classic.classic = true;
    add_new(candidates, {classic});
  }

  Timer timer(p, d, scratch);
  timer.warm_up(candidates);
  if (candidates.empty()) CHECK_CUBLAS(CUBLAS_STATUS_NOT_SUPPORTED);
  const Choice guess = candidates.front().choice;
  timer.time(candidates, 3);
  const float guess_time = candidates.front().median();

  keep_best(candidates, 1.25f, 16);
  std::vector<Candidate> varied;
  for (size_t i = 0; i < std::min<size_t>(candidates.size(), 4); ++i)
    if (!candidates[i].choice.classic) add_new(varied, variations(p, d, candidates[i].choice));
  timer.warm_up(varied);
  timer.time(varied, 3);
  for (Candidate& candidate : varied) {
    const auto same = [&](const Candidate& c) {
      return std::memcmp(&c.choice.algo, &candidate.choice.algo, sizeof(candidate.choice.algo)) == 0;
    };
    if (std::none_of(candidates.begin(), candidates.end(), same)) candidates.push_back(candidate);
  }
  keep_best(candidates, 1.10f, 6);
  timer.time(candidates, 12);
  keep_best(candidates, 1.f, 1);

  Array<int64_t> out = pack(candidates.front().choice);
  out.push_back(static_cast<int64_t>(candidates.front().median() * 1e6f));
  out.push_back(static_cast<int64_t>(guess_time * 1e6f));
  return out;
}

int64_t library_version() { return static_cast<int64_t>(cublasLtGetVersion()); }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run_unplanned, run_unplanned);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adopt, adopt);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(search, search);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(library_version, library_version);
