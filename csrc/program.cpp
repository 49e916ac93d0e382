#include "program.h"

#include <c10/util/Exception.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>

namespace dcx {

Program*& recording() {
  static thread_local Program* program = nullptr;
  return program;
}

void Program::record(const std::function<void()>& call) {
  struct Recording {
    Program* before = recording();
    explicit Recording(Program* program) { recording() = program; }
    ~Recording() { recording() = before; }
  };
  const size_t before = steps_.size();
  {
    const Recording guard(this);
    call();
  }
  TORCH_CHECK(steps_.size() > before, "Program.record: the call must launch a kernel of the CPU, it launched none");
}

void Program::keep(const at::Tensor& state, const at::Tensor& rows, bool into_state) {
  for (const at::Tensor& t : {state, rows})
    TORCH_CHECK_VALUE(t.dim() == 2 && t.device().is_cpu() && (t.size(1) <= 1 || t.stride(1) == 1),
                      "Program.keep: rows must be 2-dimensional, whole and on the CPU");
  TORCH_CHECK_VALUE(state.size(1) == rows.size(1) && state.scalar_type() == rows.scalar_type(),
                    "Program.keep: rows must be as the state's");
  const size_t element = state.element_size(), bytes = static_cast<size_t>(rows.size(1)) * element;
  const auto at = [element](const at::Tensor& t, int64_t row) {
    return static_cast<char*>(t.data_ptr()) + row * t.stride(0) * static_cast<int64_t>(element);
  };
  slots_least_ = std::max(slots_least_, rows.size(0));
  add([this, state, rows, into_state, bytes, at] {
    for (int64_t i = 0; i < rows.size(0); ++i) {
      const int64_t slot = slots_[static_cast<size_t>(i)];
      TORCH_CHECK_INDEX(slot >= 0 && slot < state.size(0), "Program.run: slot ", slot, " is none");
      std::memcpy(into_state ? at(state, slot) : at(rows, i), into_state ? at(rows, i) : at(state, slot), bytes);
    }
  });
}

void Program::run(std::vector<int64_t> slots) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(slots.size()) >= slots_least_, "Program.run: slots must be ", slots_least_,
                    ", got ", slots.size());
  slots_ = std::move(slots);
  for (const std::function<void()>& step : steps_) step();
}

void bind_program(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<Program>(module, "Program", "Kernel launches and copies of the CPU, put together once.")
      .def(py::init<>())
      .def("record", &Program::record, py::arg("call"), "Puts what `call` launches behind what there is.")
      .def("keep", &Program::keep, py::arg("state"), py::arg("rows"), py::arg("into_state"),
           "Puts a copy between rows [n, numel] and those of state [slots, numel] that a run names.")
      .def(
          "zero", [](Program& p, const at::Tensor& rows) { p.add([rows] { rows.zero_(); }); }, py::arg("rows"))
      .def(
          "add", [](Program& p, const at::Tensor& y, const at::Tensor& x) { p.add([y, x] { y.add_(x); }); },
          py::arg("y"), py::arg("x"))
      .def("run", &Program::run, py::arg("slots"), py::call_guard<py::gil_scoped_release>(),
           "Runs everything in order.");
}

}  // namespace dcx
