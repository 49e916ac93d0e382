// What the host side of a CUDA kernel is told; plain C++.
#pragma once
#include <stdint.h>

namespace dcx {

// Where kernels run, and what the device allows; csrc fills it from torch.
struct CudaContext {
  void* stream = nullptr;     // cudaStream_t
  int device = 0;             // index, for what is set once per device
  int capability = 90;        // 10 * major + minor
  int multiprocessors = 132;  // what the choice of tiles aims to fill
  int shared_bytes = 232448;  // shared memory that a block may ask for
  bool allow_tf32 = false;    // float32 products may round their operands to tf32
  bool wgmma = false;         // the kernels of wgmma.cuh are there and run: capability 9.0, compiled for 9.0a
};

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

}  // namespace dcx
