#pragma once
#include <pybind11/pybind11.h>

namespace dcx {

// Adds the class Snapshot to the module.
void bind_snapshot(pybind11::module_& module);

}  // namespace dcx
