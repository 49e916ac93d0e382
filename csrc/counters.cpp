#ifdef DCX_WITH_CUDA
#include "counters.h"

#include <ATen/ops/zeros.h>

#include <map>
#include <mutex>
#include <tuple>

#include "cuda.h"

namespace dcx {
namespace {

constexpr int64_t kRange = 256, kRanges = 1024;  // counters of a capture, and captures: 1 MiB

// A GPU's ranges. A captured graph keeps its range for good: it may be replayed as long as the process lives. Where
// none is left the graph clears its own.
struct Store {
  at::Tensor memory;
  int64_t taken = 0;
};

struct Stores {
  std::mutex mutex;
  std::map<int, Store> of_device;
  std::map<std::tuple<int, unsigned long long, void*>, int64_t> range_of;  // by device, capture and stream
};

Stores& stores() {
  static Stores* made = new Stores;  // not destroyed: CUDA may be gone by then
  return *made;
}

}  // namespace

at::Tensor take_counters(const CudaContext& context, int64_t count, const at::Tensor& x) {
  const auto options = x.options().dtype(at::kInt);
  const cudaStream_t stream = static_cast<cudaStream_t>(context.stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture));
  Stores& all = stores();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Store& store = all.of_device[context.device];
  if (status == cudaStreamCaptureStatusNone) {
    if (!store.memory.defined()) {  // ready before the first capture, in which memory would be the graph's own
      store.memory = at::zeros({kRanges * kRange}, options);
      C10_CUDA_CHECK(cudaStreamSynchronize(stream));
    }
    return at::zeros({count}, options);
  }
  const auto key = std::make_tuple(context.device, capture, context.stream);
  auto found = all.range_of.find(key);
  if (found == all.range_of.end() && store.memory.defined() && store.taken < kRanges)
    found = all.range_of.emplace(key, store.taken++).first;
  if (found == all.range_of.end() || count > kRange) return at::zeros({count}, options);
  return store.memory.narrow(0, found->second * kRange, count);
}

}  // namespace dcx
#endif  // DCX_WITH_CUDA
