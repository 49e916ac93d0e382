#include "replay.h"

#ifdef DCX_WITH_CUDA
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <utility>

#include "cuda.h"
#include "take_codes.h"

namespace dcx {
namespace {

class Event {
 public:
  Event() { C10_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { (void)cudaEventDestroy(event_); }

  void record(cudaStream_t stream) { C10_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  void make_wait(cudaStream_t stream) const { C10_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }
  void wait() const { C10_CUDA_CHECK(cudaEventSynchronize(event_)); }

 private:
  cudaEvent_t event_ = nullptr;
};

// What a call's codes are told by: its kernel writes `wrong`, and the event behind that kernel says when.
class Look {
 public:
  explicit Look(int device) : device_(device) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    event_.emplace();
    wrong_ = at::zeros({1}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
    on_device_ = pinned_on_device(wrong_);
  }

  const at::Tensor& wrong() const { return wrong_; }
  int device() const { return device_; }
  int64_t* on_device() const { return on_device_; }
  void clear() { *wrong_.mutable_data_ptr<int64_t>() = 0; }
  void record() { event_->record(c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device_)).stream()); }
  bool fine() const {
    {
      const pybind11::gil_scoped_release others_run;
      event_->wait();
    }
    return *wrong_.const_data_ptr<int64_t>() == 0;
  }

 private:
  int device_;
  std::optional<Event> event_;
  at::Tensor wrong_;
  int64_t* on_device_ = nullptr;
};

// One recording of a decode or of a stream's pass, for codes of one shape.
class Replay {
 public:
  Replay(pybind11::object graph, std::vector<std::pair<at::Tensor, int64_t>> inputs, at::Tensor output)
      : graph_(std::move(graph)), inputs_(std::move(inputs)), output_(std::move(output)) {
    TORCH_CHECK_VALUE(inputs_.size() == 1 || inputs_.size() == 2, "Replay: one or two inputs are needed, got ",
                      inputs_.size());
    exec_ = reinterpret_cast<cudaGraphExec_t>(graph_.attr("raw_cuda_graph_exec")().cast<uintptr_t>());
    const c10::cuda::CUDAGuard guard(output_.device());
    context_ = cuda_context();
    free_.emplace();
    for (const auto& [to, entries] : inputs_)
      TORCH_CHECK_VALUE(
          to.dim() == 3 && to.scalar_type() == at::kLong && to.is_contiguous() && to.device() == output_.device(),
          "Replay: inputs must be [B, q, F] int64, contiguous, on ", output_.device());
  }

  // The recording's audio of these codes, in a tensor of its own or in `out`; nothing, and nothing started, where
  // they are not as the inputs are, or where this is no moment for it.
  std::optional<at::Tensor> start(Look& look, const at::Tensor& semantic, const std::optional<at::Tensor>& acoustic,
                                  const std::optional<at::Tensor>& out) {
    const c10::DeviceIndex device = output_.device().index();
    if (c10::cuda::current_device() != device || look.device() != device ||
        acoustic.has_value() != (inputs_.size() == 2) || !fits(semantic, inputs_[0].first) ||
        (acoustic.has_value() && !fits(*acoustic, inputs_[1].first)))
      return std::nullopt;
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device).stream();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    if (status != cudaStreamCaptureStatusNone) return std::nullopt;
    wait(stream);
    // Memory first: once a stream's pass is under way its state goes on.
    const at::NoGradGuard no_gradients;
    at::Tensor audio = out.has_value() ? *out : at::empty_like(output_);
    TakeCodesParams p{};
    p.parts[0] = codes_part(inputs_[0].first, semantic, inputs_[0].second);
    if (acoustic.has_value()) p.parts[1] = codes_part(inputs_[1].first, *acoustic, inputs_[1].second);
    p.batch = semantic.size(0);
    p.frames = semantic.size(2);
    p.wrong = look.on_device();
    look.clear();
    context_.stream = stream;
    launch_take_codes_cuda(context_, p);
    look.record();
    C10_CUDA_CHECK(cudaGraphLaunch(exec_, stream));
    try {
      audio.copy_(output_);
    } catch (...) {
      release(stream);
      throw;
    }
    release(stream);
    return audio;
  }

  // Before and behind each other use of the recording.
  void wait() { wait(c10::cuda::getCurrentCUDAStream(output_.device().index()).stream()); }
  void release() { release(c10::cuda::getCurrentCUDAStream(output_.device().index()).stream()); }

 private:
  static bool fits(const at::Tensor& codes, const at::Tensor& to) {
    return !codes.key_set().has(c10::DispatchKey::Python) && codes.scalar_type() == at::kLong &&
           codes.device() == to.device() && codes.sizes() == to.sizes() && codes.layout() == at::kStrided;
  }

  // The last use may have been on another stream. Handles do not tell: one that was destroyed may be given out again.
  void wait(cudaStream_t stream) {
    if (used_) free_->make_wait(stream);
  }
  void release(cudaStream_t stream) {
    free_->record(stream);
    used_ = true;
  }

  pybind11::object graph_;                              // owns exec_
  std::vector<std::pair<at::Tensor, int64_t>> inputs_;  // and the entries of their codebooks
  at::Tensor output_;
  cudaGraphExec_t exec_ = nullptr;
  CudaContext context_;
  std::optional<Event> free_;
  bool used_ = false;
};

}  // namespace

void bind_replay(pybind11::module_& module) {
  pybind11::class_<Look>(module, "Look", "Whether the codes of one call at a time are in range.")
      .def(pybind11::init<int>(), pybind11::arg("device"))
      .def_property_readonly("wrong", &Look::wrong, "[1] int64 in pinned memory, which take_codes writes.")
      .def("clear", &Look::clear, "Before take_codes.")
      .def("record", &Look::record, "Behind it, on the current stream.")
      .def("fine", &Look::fine, "Waits for what was recorded; whether all codes were in range.");
  pybind11::class_<Replay>(module, "Replay", "Starts one recording for codes of one shape.")
      .def(pybind11::init<pybind11::object, std::vector<std::pair<at::Tensor, int64_t>>, at::Tensor>(),
           pybind11::arg("graph"), pybind11::arg("inputs"), pybind11::arg("output"))
      .def("start", &Replay::start, pybind11::arg("look"), pybind11::arg("semantic"), pybind11::arg("acoustic"),
           pybind11::arg("out"), pybind11::call_guard<pybind11::gil_scoped_release>(),
           "The audio, or None where nothing was started.")
      .def("wait", pybind11::overload_cast<>(&Replay::wait), "Makes the current stream wait for the last use.")
      .def("release", pybind11::overload_cast<>(&Replay::release), "Ends a use on the current stream.");
}

}  // namespace dcx

#else

namespace dcx {
void bind_replay(pybind11::module_&) {}
}  // namespace dcx

#endif  // DCX_WITH_CUDA
