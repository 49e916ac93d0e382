// What the convolutions that are no GEMM share.
#pragma once
#include "../common/conv_gemm_params.h"
#include "../common/launch.cuh"

namespace dcx {

// A block per tile of rows of each clip, once p.segment and p.row_tiles stand.
template <class K>
void start_row_tiles(ConvGemmPlan& plan) {
  plan.grid = Grid{plan.params.batch * plan.params.row_tiles, 1, 1};
  plan.smem_bytes = K::smem_bytes(plan.params);
  plan.start = [](const CudaContext& where, const ConvGemmPlan& made) {
    launch<K>(where, made.params, made.grid, made.smem_bytes);
  };
}

}  // namespace dcx
