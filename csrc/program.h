// What a stream does at every step: kernel launches and copies, put together once and run again and again without
// Python and without the dispatcher.
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

namespace dcx {

class Program {
 public:
  Program() = default;
  Program(const Program&) = delete;  // its steps point to it
  Program& operator=(const Program&) = delete;

  void add(std::function<void()> step) { steps_.push_back(std::move(step)); }

  // What `call` launches, in this thread, becomes steps instead of being run.
  void record(const std::function<void()>& call);

  // A step that copies between rows of state [slots, numel] and rows [n, numel], whose slots are those of the run.
  void keep(const at::Tensor& state, const at::Tensor& rows, bool into_state);

  void run(std::vector<int64_t> slots);

 private:
  std::vector<std::function<void()>> steps_;
  std::vector<int64_t> slots_;
  int64_t slots_least_ = 0;  // slots that a run has to name
};

// Which program this thread's launches are put into; null: none, they run.
Program*& recording();

// Launches a kernel of the CPU, or puts the launch into the program that records. `kept`: the tensors that params point
// into.
template <class Params, class... Kept>
void launch(void (*kernel)(const Params&), const Params& params, const Kept&... kept) {
  if (Program* program = recording(); program != nullptr)
    program->add([kernel, params, alive = std::make_tuple(kept...)] { kernel(params); });
  else
    kernel(params);
}

// Adds the class Program to the module.
void bind_program(pybind11::module_& module);

}  // namespace dcx
