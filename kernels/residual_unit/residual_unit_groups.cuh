// residual_unit's kernels on Hopper's warpgroup products, and which of them runs.
#pragma once
#include "residual_unit_halves.cuh"
#include "residual_unit_plan.cuh"
#include "residual_unit_teams.cuh"
#include "residual_unit_wgmma.cuh"

namespace dcx {

// Where rows move 16 bytes at a time; bit for bit the results of residual_unit_launch.cuh's. The cheapest is taken, of
// equals the first.
template <class... K>
struct UnitKernels {};
template <class T, int kColumns>
struct WgmmaUnits;
template <class T>
struct WgmmaUnits<T, 32> {
  using All = UnitKernels<WgmmaUnit<T, 32, 2, 32, 0, 4>, WgmmaUnit<T, 32, 1, 32, 0, 4>>;
};
template <class T>
struct WgmmaUnits<T, 48> {
  using All = UnitKernels<WgmmaUnit<T, 48, 2, 48, 0, 3>, WgmmaUnit<T, 48, 1, 48, 0, 3>>;
};
template <class T>
struct WgmmaUnits<T, 64> {
  using All = UnitKernels<WgmmaUnit<T, 64, 2, 64, 0, 2>, WgmmaUnit<T, 64, 1, 64, 0, 2>>;
};
template <class T>
struct WgmmaUnits<T, 96> {
  using All = UnitKernels<WgmmaTeams<T, 96, 2>, WgmmaUnit<T, 96, 2, 48, 5, 2>, WgmmaUnit<T, 96, 1, 48, 10, 1>>;
};
template <class T>
struct WgmmaUnits<T, 128> {
  using All = UnitKernels<WgmmaUnit<T, 128, 2, 64, 4, 2>, WgmmaUnit<T, 128, 1, 64, 8, 1>>;
};
template <class T>
struct WgmmaUnits<T, 192> {
  using All = UnitKernels<WgmmaUnit<T, 192, 3, 64, 5, 1>, WgmmaHalves<T, 192, 2, 4>, WgmmaHalves<T, 192, 1, 6>>;
};

// Blocks take tile after tile, as many as find room at once.
template <class K>
void plan_tiles(const CudaContext& context, const ResidualUnitParams& p, ResidualUnitPlan& plan) {
  plan_fused<K>(p, plan);
  const int64_t teams = K::kTeams, per_clip = plan.params.row_tiles;
  plan.grid.x = minimum(ceil_div(plan.grid.x, teams), int64_t{context.multiprocessors} * K::kMinBlocks);
  plan.params.clips = static_cast<int>(p.batch);
  plan.params.step_clips = static_cast<int>(plan.grid.x * teams / per_clip);
  plan.params.step_tiles = static_cast<int>(plan.grid.x * teams % per_clip);
}

// In rows' products on a multiprocessor: a tile takes its own, and what stands around them takes as long as of 48.
// Teams have that at the same time, but for a phase at the end.
template <class K>
int64_t wgmma_cost(const CudaContext& context, const ResidualUnitParams& p) {
  constexpr int64_t kAround = 48, kTeams = K::kTeams;
  if (K::smem_bytes(p.dilation) > context.shared_bytes) return INT64_MAX;
  const int64_t tiles = p.batch * ceil_div(p.out_steps, int64_t{K::kTileRows});
  const int64_t rounds = ceil_div(tiles, context.multiprocessors * kTeams);
  return kTeams > 1 ? (rounds * kTeams + 1) * K::kTileRows : rounds * (K::kTileRows + kAround);
}

// Takes the cheapest, of equals the first; false where none fits.
template <class... K>
bool plan_cheapest(const CudaContext& context, const ResidualUnitParams& p, ResidualUnitPlan& plan, UnitKernels<K...>) {
  int64_t least = INT64_MAX;
  const auto offer = [&](int64_t cost, auto* plan_it) {
    if (cost >= least) return;
    least = cost;
    plan_it(context, p, plan);
  };
  (offer(wgmma_cost<K>(context, p), plan_tiles<K>), ...);
  return least < INT64_MAX;
}

template <class T>
bool plan_groups(const CudaContext& context, const ResidualUnitParams& p, ResidualUnitPlan& plan) {
  constexpr int64_t kMost = 1 << 30;  // steps and tiles are 32-bit there
  if (!context.wgmma || !plan.params.vectors || !plan.params.vector_store) return false;
  if (maximum(p.in_steps, p.out_steps) + p.pad_left + p.pad_right + kResidualUnitTaps * p.dilation >= kMost)
    return false;
  if (p.batch * p.out_steps >= kMost * 32) return false;
  return with_unit_width(p.channels, [&](auto width) {
    return plan_cheapest(context, p, plan, typename WgmmaUnits<T, decltype(width)::kValue>::All{});
  });
}

}  // namespace dcx
