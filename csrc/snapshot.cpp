#include "snapshot.h"

#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace dcx {
namespace {

// What the dictionaries of a model's modules hold, and of the tensors among it where they lie and how often each was
// edited. A model is looked at before every call, and has hundreds of parameters: that takes microseconds here.
class Snapshot {
 public:
  explicit Snapshot(const pybind11::list& tables) {
    for (const pybind11::handle table : tables) {
      tables_.push_back(pybind11::cast<pybind11::dict>(table));
      for (const auto& entry : tables_.back()) {
        held_.push_back(pybind11::reinterpret_borrow<pybind11::object>(entry.second));
        if (!THPVariable_Check(entry.second.ptr())) continue;
        const at::Tensor& tensor = THPVariable_Unpack(entry.second.ptr());
        tensors_.push_back({tensor, tensor.const_data_ptr(), tensor.scalar_type(), edits_of(tensor)});
      }
    }
  }

  bool holds() const {
    size_t seen = 0;
    for (const pybind11::dict& table : tables_) {
      PyObject* value = nullptr;
      for (Py_ssize_t at = 0; PyDict_Next(table.ptr(), &at, nullptr, &value) != 0; ++seen)
        if (seen == held_.size() || value != held_[seen].ptr()) return false;
    }
    if (seen != held_.size()) return false;
    for (const auto& [tensor, address, dtype, edits] : tensors_)
      if (tensor.const_data_ptr() != address || tensor.scalar_type() != dtype || edits_of(tensor) != edits)
        return false;
    return true;
  }

 private:
  struct Seen {
    at::Tensor tensor;
    const void* address;
    at::ScalarType dtype;
    uint32_t edits;
  };

  // An inference tensor has no count.
  static uint32_t edits_of(const at::Tensor& tensor) {
    return tensor.is_inference() ? 0 : static_cast<uint32_t>(tensor._version());
  }

  std::vector<pybind11::dict> tables_;
  std::vector<pybind11::object> held_;  // so that no other object can come to lie there
  std::vector<Seen> tensors_;
};

}  // namespace

void bind_snapshot(pybind11::module_& module) {
  pybind11::class_<Snapshot>(module, "Snapshot", "What dictionaries hold, and the tensors' addresses and edits.")
      .def(pybind11::init<const pybind11::list&>(), pybind11::arg("tables"))
      .def("holds", &Snapshot::holds, "Whether nothing has changed.");
}

}  // namespace dcx
