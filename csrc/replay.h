// Starting a recorded decode: codes in, the recording, its audio out, in one call from Python.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace dcx {

// Adds Look and Replay to the module, where it is built with CUDA.
void bind_replay(pybind11::module_& module);

}  // namespace dcx
