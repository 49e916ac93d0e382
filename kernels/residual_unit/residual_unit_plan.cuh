// What the files that plan residual_unit's kernels share.
#pragma once
#include "residual_unit.cuh"

namespace dcx {

template <int kNumber>
struct Constant {
  static constexpr int kValue = kNumber;
};

// Calls visit with the next width; false where there is none.
template <class Visit>
bool with_unit_width(int64_t channels, const Visit& visit) {
  if (channels <= 32) return visit(Constant<32>{});
  if (channels <= 48) return visit(Constant<48>{});
  if (channels <= 64) return visit(Constant<64>{});
  if (channels <= 96) return visit(Constant<96>{});
  if (channels <= 128) return visit(Constant<128>{});
  if (channels <= kMostFusedChannels) return visit(Constant<kMostFusedChannels>{});
  return false;
}

template <class K>
void plan_fused(const ResidualUnitParams& p, ResidualUnitPlan& plan) {
  plan.params.row_tiles = ceil_div(p.out_steps, int64_t{K::kTileRows});
  plan.params.segment = static_cast<int>(K::segment(p.dilation));
  plan.grid = Grid{p.batch * plan.params.row_tiles, 1, 1};
  plan.smem_bytes = K::smem_bytes(p.dilation);
  plan.start = [](const CudaContext& where, const ResidualUnitPlan& made) {
    launch<K>(where, made.params, made.grid, made.smem_bytes);
  };
}

// Takes the cheapest kernel on Hopper's warpgroup products; false where the rows' layout, the signal's length or the
// device suits none. Compiled for bf16 and f16 in a file each.
template <class T>
bool plan_groups(const CudaContext& context, const ResidualUnitParams& p, ResidualUnitPlan& plan);

}  // namespace dcx
