// SPDX-License-Identifier: Apache-2.0
//
// y = x · Wᵀ + b through cuBLASLt, with the algorithm found by timing.
//
//   x [M, K], W [N, K], b [N] or none, y [M, N]; all bfloat16 or all float16, rows contiguous, the
//   rows of x and W any distance apart. Products are summed in float32, also between the parts of a
//   split K; the bias is added in float32 by the epilogue; the result is rounded once.
//
// cuBLASLt is column-major, so it sees yᵀ [N, M] = W · xᵀ: its A is W (transposed), its B is x, its
// rows are N.
//
// The library's own guess is good but knows neither that weights come from HBM at every step of
// inference (nothing of them is left in L2 when a layer's turn comes again) nor which kernel wins
// on this very chip. So what the heuristics offer, variations of the best of it, and classic cuBLAS
// are timed, each with its weights in HBM.
//
// This file lists, times and launches; cublaslt.py decides what to search, when, and what to keep.
//
// link: cublasLt cublas

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#define KERNEL "gemm.cublaslt"
#include "include/launch.cuh"

namespace {

using custom_kernels::current_stream;
using custom_kernels::DeviceGuard;
using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what NVIDIA advises for Hopper
constexpr int kHeuristics = 64;

#define CHECK_CUBLAS(call)                                                                 \
  do {                                                                                     \
    cublasStatus_t status_ = (call);                                                       \
    if (status_ != CUBLAS_STATUS_SUCCESS)                                                  \
      TVM_FFI_THROW(RuntimeError) << KERNEL ": " << cublasGetStatusName(status_) << " in " \
                                  << #call;                                                \
  } while (0)

// ---- One GEMM, described to the library
// -----------------------------------------------------------------------

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
    stream = current_stream(device);
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
    return {device,   type,    m,       n,       k,          x_stride,
            w_stride, x_align, w_align, y_align, bias_align, bias != nullptr};
  }
};

// The descriptors of a problem. They live on the stack: setting them up costs less than a look-up
// would.
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

// ---- What lives as long as the process
// ------------------------------------------------------------------------

struct DeviceHandles {
  cublasLtHandle_t lt = nullptr;
  cublasHandle_t classic = nullptr;
};

// Never destroyed: at exit torch's allocator and the CUDA context may be gone before any static of
// ours.
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

// Call with the mutex held.
DeviceHandles& handles(int device) {
  DeviceHandles& found = state().handles[device];
  if (found.lt == nullptr) CHECK_CUBLAS(cublasLtCreate(&found.lt));
  return found;
}

void prepare_classic(int device) {
  DeviceHandles& found = handles(device);
  if (found.classic != nullptr) return;
  CHECK_CUBLAS(cublasCreate(&found.classic));
  // Parts of a split K are added in float32 here too.
  CHECK_CUBLAS(cublasSetMathMode(found.classic, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  CHECK_CUDA(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Scratch memory for one launch, from torch's allocator.
//
// Outside of a capture it is made once per stream and kept, so that kernels in flight on two
// streams never share it. A graph gets memory of its own pool instead, given back to that pool when
// the call ends: graphs that replay at once on different streams do not share it either, and later
// nodes of the same graph can use it again.
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

// ---- Launching
// ------------------------------------------------------------------------------------------------

cublasStatus_t launch_classic(const Problem& p, cublasHandle_t handle, cudaStream_t stream,
                              void* scratch) {
  const float one = 1.f, zero = 0.f;
  cublasStatus_t status = cublasSetStream(handle, stream);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasSetWorkspace(handle, scratch, kWorkspaceBytes);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  return cublasGemmEx_64(handle, CUBLAS_OP_T, CUBLAS_OP_N, p.n, p.m, p.k, &one, p.w, p.type,
                         p.w_stride, p.x, p.type, p.x_stride, &zero, p.y, p.type, p.n,
                         CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

// Call with the mutex held: it guards the handles, the classic one's stream among them.
cublasStatus_t launch(const Problem& p, const Description& d, const Choice& choice,
                      cudaStream_t stream, void* scratch) {
  const DeviceHandles& device = handles(p.device);
  if (choice.classic) return launch_classic(p, device.classic, stream, scratch);
  const float one = 1.f, zero = 0.f;
  return cublasLtMatmul(device.lt, &d.matmul, &one, p.w, &d.a, p.x, &d.b, &zero, p.y, &d.d, p.y,
                        &d.d, &choice.algo, scratch, choice.workspace, stream);
}

void launch(const Problem& p, const Choice& choice) {
  Tensor memory;
  if (choice.workspace > 0) memory = workspace(p, choice.workspace);
  void* scratch = memory.defined() ? memory.data_ptr() : nullptr;
  CHECK_CUBLAS(launch(p, Description(p), choice, p.stream, scratch));
}

// ---- What there is to choose from
// -----------------------------------------------------------------------------

// The heuristics' candidates within `workspace` bytes, best guess first. Empty if there is none.
std::vector<Choice> heuristics(const Problem& p, const Description& d, size_t workspace, int count,
                               bool may_split = true) {
  cublasLtMatmulPreferenceOpaque_t preference;
  CHECK_CUBLAS(cublasLtMatmulPreferenceInit(&preference));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    CHECK_CUBLAS(
        cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p.w_align);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p.x_align);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.y_align);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p.y_align);
  // Parts of a split K are added in float32, never in the output's 16 bits.
  const uint32_t reduction =
      may_split ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE;
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction);

  std::vector<cublasLtMatmulHeuristicResult_t> results(count);
  int found = 0;
  cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handles(p.device).lt, &d.matmul, &d.a, &d.b, &d.d, &d.d,
                                     &preference, count, results.data(), &found);
  if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED)
    CHECK_CUBLAS(status);
  std::vector<Choice> choices;
  for (int i = 0; i < found; ++i)
    if (results[i].state == CUBLAS_STATUS_SUCCESS)
      choices.push_back({false, results[i].workspaceSize, results[i].algo});
  return choices;
}

Choice first_guess(const Problem& p, const Description& d, bool may_split = true) {
  std::vector<Choice> choices = heuristics(p, d, kWorkspaceBytes, 1, may_split);
  if (choices.empty())
    TVM_FFI_THROW(RuntimeError) << KERNEL ": cuBLASLt has no algorithm for M=" << p.m
                                << " N=" << p.n << " K=" << p.k << " with rows " << p.x_stride
                                << " and " << p.w_stride << " apart";
  return choices[0];
}

// True if the library accepts the algorithm for this very problem; sets the workspace that it
// needs.
bool accepts(const Problem& p, const Description& d, Choice& choice) {
  cublasLtMatmulHeuristicResult_t result;
  cublasStatus_t status = cublasLtMatmulAlgoCheck(handles(p.device).lt, &d.matmul, &d.a, &d.b, &d.d,
                                                  &d.d, &choice.algo, &result);
  if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > kWorkspaceBytes) return false;
  choice.workspace = result.workspaceSize;
  return true;
}

template <typename T>
bool configure(Choice& choice, cublasLtMatmulAlgoConfigAttributes_t attribute, T value) {
  return cublasLtMatmulAlgoConfigSetAttribute(&choice.algo, attribute, &value, sizeof(value)) ==
         CUBLAS_STATUS_SUCCESS;
}

// The same kernel with K split otherwise, or with blocks in other clusters. Few rows leave most of
// the chip idle unless K is shared out, and the heuristics offer few of the ways to do so.
std::vector<Choice> variations(const Problem& p, const Description& d, const Choice& base) {
  std::vector<Choice> out;
  for (const int32_t split : {1, 2, 3, 4, 5, 6, 8, 10, 12, 16}) {
    Choice choice = base;
    const uint32_t scheme =
        split == 1 ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    if (configure(choice, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, split) &&
        configure(choice, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, scheme) && accepts(p, d, choice))
      out.push_back(choice);
  }
  for (uint16_t shape = CUBLASLT_CLUSTER_SHAPE_1x1x1; shape <= CUBLASLT_CLUSTER_SHAPE_1x16x1;
       ++shape) {
    Choice choice = base;
    if (configure(choice, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, shape) && accepts(p, d, choice))
      out.push_back(choice);
  }
  return out;
}

// ---- Timing
// ---------------------------------------------------------------------------------------------------

// One candidate as a CUDA graph that runs it once on each set of operands. A graph leaves out what
// launching from the host costs, and its kernels follow each other as closely as in an engine's own
// graphs.
class CandidateGraph {
 public:
  CandidateGraph(const std::vector<Problem>& sets, const Description& d, const Choice& choice,
                 cudaStream_t stream, void* scratch) {
    // Once outside of the capture: this loads the kernel, and shows whether the library launches it
    // at all.
    if (launch(sets[0], d, choice, stream, scratch) != CUBLAS_STATUS_SUCCESS) return;
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    for (const Problem& p : sets)
      if (status == CUBLAS_STATUS_SUCCESS) status = launch(p, d, choice, stream, scratch);
    cudaGraph_t graph = nullptr;
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    cudaError_t error = cudaSuccess;
    if (status == CUBLAS_STATUS_SUCCESS) error = cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    CHECK_CUDA(error);
    CHECK_CUDA(cudaEventCreate(&start_));
    CHECK_CUDA(cudaEventCreate(&end_));
  }
  CandidateGraph(CandidateGraph&& other) noexcept { *this = std::move(other); }
  CandidateGraph& operator=(CandidateGraph&& other) noexcept {
    std::swap(executable_, other.executable_);
    std::swap(start_, other.start_);
    std::swap(end_, other.end_);
    return *this;
  }
  ~CandidateGraph() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
    if (start_ != nullptr) cudaEventDestroy(start_);
    if (end_ != nullptr) cudaEventDestroy(end_);
  }

  bool runs() const { return executable_ != nullptr; }

  void replay(cudaStream_t stream) {
    CHECK_CUDA(cudaEventRecord(start_, stream));
    CHECK_CUDA(cudaGraphLaunch(executable_, stream));
    CHECK_CUDA(cudaEventRecord(end_, stream));
  }

  // Of the last replay, which must be over.
  double microseconds() const {
    float milliseconds;
    CHECK_CUDA(cudaEventElapsedTime(&milliseconds, start_, end_));
    return milliseconds * 1e3;
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
  cudaEvent_t start_ = nullptr, end_ = nullptr;
};

// A stream for the length of one search.
class OwnStream {
 public:
  OwnStream() { CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~OwnStream() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// ---- Plans: choices as integers, for Python to keep
// -----------------------------------------------------------

using Plan = Array<int64_t>;  // {classic, workspace, the algorithm's eight words}

constexpr size_t kAlgoWords = sizeof(cublasLtMatmulAlgo_t) / sizeof(int64_t);

Plan pack(const Choice& choice) {
  std::array<int64_t, kAlgoWords> words;
  std::memcpy(words.data(), &choice.algo, sizeof(choice.algo));
  Plan plan{static_cast<int64_t>(choice.classic), static_cast<int64_t>(choice.workspace)};
  for (int64_t word : words) plan.push_back(word);
  return plan;
}

Choice unpack(const Plan& plan) {
  if (plan.size() != 2 + kAlgoWords)
    TVM_FFI_THROW(ValueError) << KERNEL ": a plan has " << 2 + kAlgoWords << " integers, not "
                              << plan.size();
  Choice choice{plan[0] != 0, static_cast<size_t>(plan[1]), {}};
  std::array<int64_t, kAlgoWords> words;
  for (size_t i = 0; i < kAlgoWords; ++i) words[i] = plan[2 + i];
  std::memcpy(&choice.algo, words.data(), sizeof(choice.algo));
  return choice;
}

Array<Plan> pack(const std::vector<Choice>& choices) {
  Array<Plan> plans;
  for (const Choice& choice : choices) plans.push_back(pack(choice));
  return plans;
}

// True if this plan runs this problem; completes it.
bool usable(const Problem& p, Choice& choice) {
  if (!choice.classic) return accepts(p, Description(p), choice);
  prepare_classic(p.device);
  return p.bias == nullptr;
}

// ---- What Python calls
// ----------------------------------------------------------------------------------------

// Launches with the plan adopted for exactly this shape. False, and nothing done, if there is none.
bool run(TensorView x, TensorView w, Optional<TensorView> b, TensorView y) {
  const Problem p(x, w, b, y);
  std::lock_guard<std::mutex> guard(state().mutex);
  const auto found = state().choices.find(p.key());
  if (found == state().choices.end()) return false;
  DeviceGuard scope(p.device);
  launch(p, found->second);
  return true;
}

// Launches with the library's first guess and remembers nothing: for a capture that meets an
// unplanned shape. With a bias, K is not split: some kernels that split it round the sum before
// they add the bias, and only a search can tell which.
void run_unplanned(TensorView x, TensorView w, Optional<TensorView> b, TensorView y) {
  const Problem p(x, w, b, y);
  std::lock_guard<std::mutex> guard(state().mutex);
  DeviceGuard scope(p.device);
  launch(p, first_guess(p, Description(p), p.bias == nullptr));
}

// Launches with this plan and remembers nothing. False, and nothing done, if the library does not
// accept it here.
bool run_plan(TensorView x, TensorView w, Optional<TensorView> b, TensorView y, Plan plan) {
  const Problem p(x, w, b, y);
  Choice choice = unpack(plan);
  std::lock_guard<std::mutex> guard(state().mutex);
  DeviceGuard scope(p.device);
  if (!usable(p, choice)) return false;
  launch(p, choice);
  return true;
}

// Takes a plan for this shape. False if the library does not accept it here.
bool adopt(TensorView x, TensorView w, Optional<TensorView> b, TensorView y, Plan plan) {
  const Problem p(x, w, b, y);
  Choice choice = unpack(plan);
  std::lock_guard<std::mutex> guard(state().mutex);
  DeviceGuard scope(p.device);
  if (!usable(p, choice)) return false;
  state().choices[p.key()] = choice;
  return true;
}

// All plans worth timing. The first is what torch does for this shape: classic cuBLAS without a
// bias, cuBLASLt's first guess with one.
Array<Plan> candidates(TensorView x, TensorView w, Optional<TensorView> b, TensorView y) {
  const Problem p(x, w, b, y);
  const Description d(p);
  std::lock_guard<std::mutex> guard(state().mutex);
  DeviceGuard scope(p.device);
  std::vector<Choice> found;
  if (p.bias == nullptr) {  // classic cuBLAS has no epilogue
    prepare_classic(p.device);
    found.push_back({true, kWorkspaceBytes, {}});
  }
  found.push_back(first_guess(p, d));
  for (const size_t limit : {kWorkspaceBytes, kWorkspaceBytes / 8, size_t{0}})
    for (const Choice& choice : heuristics(p, d, limit, kHeuristics)) found.push_back(choice);
  return pack(found);
}

Array<Plan> variations_of(TensorView x, TensorView w, Optional<TensorView> b, TensorView y,
                          Plan plan) {
  const Problem p(x, w, b, y);
  std::lock_guard<std::mutex> guard(state().mutex);
  DeviceGuard scope(p.device);
  const Choice base = unpack(plan);
  return pack(base.classic ? std::vector<Choice>{} : variations(p, Description(p), base));
}

// Times every plan `rounds` times, all of them in turn, so that a drift of the clocks hits all
// alike. Each time is that of one pass over C+1 sets of operands: (x, w, y) and the copies (xs[i],
// ws[i], ys[i]), laid out like them. If the sets together exceed L2, every launch finds its
// operands in HBM. Overwrites y and ys. Returns microseconds per launch, a list per plan; an empty
// one if the plan does not run.
Array<Array<double>> time_plans(TensorView x, TensorView w, Optional<TensorView> b, TensorView y,
                                TensorView xs, TensorView ws, TensorView ys, Array<Plan> plans,
                                int64_t rounds) {
  const Problem p(x, w, b, y);
  const Description d(p);
  std::lock_guard<std::mutex> guard(state().mutex);
  DeviceGuard scope(p.device);
  std::vector<Problem> sets{p};
  for (int64_t i = 0; i < xs.size(0); ++i) {
    const auto at = [&](TensorView copies) {
      return static_cast<char*>(copies.data_ptr()) + i * copies.stride(0) * 2;
    };
    sets.push_back(p);
    sets.back().x = at(xs), sets.back().w = at(ws), sets.back().y = at(ys);
  }
  const Tensor scratch = workspace(p, kWorkspaceBytes);
  CHECK_CUDA(cudaStreamSynchronize(p.stream));

  OwnStream stream;
  std::vector<CandidateGraph> graphs;
  for (const Plan& plan : plans)
    graphs.emplace_back(sets, d, unpack(plan), stream, scratch.data_ptr());
  std::vector<Array<double>> times(graphs.size());
  std::vector<CandidateGraph*> order;
  for (CandidateGraph& graph : graphs)
    if (graph.runs()) order.push_back(&graph);
  for (int64_t round = 0; round < rounds && !order.empty(); ++round) {
    // Not timed: what comes first waits for the host to launch it, and would look slower than it
    // is.
    order.back()->replay(stream);
    for (CandidateGraph* graph : order) graph->replay(stream);
    CHECK_CUDA(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < graphs.size(); ++i)
      if (graphs[i].runs()) times[i].push_back(graphs[i].microseconds() / sets.size());
    std::reverse(order.begin(), order.end());  // so that each comes after either neighbour
  }
  return Array<Array<double>>(times.begin(), times.end());
}

int64_t library_version() { return static_cast<int64_t>(cublasLtGetVersion()); }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run_unplanned, run_unplanned);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run_plan, run_plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adopt, adopt);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(candidates, candidates);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(variations, variations_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(time_plans, time_plans);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(library_version, library_version);
