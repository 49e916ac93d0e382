// The choice of conv_gemm.cuh's tile; defines plan_conv_gemm, so that one unit alone includes it. The choice changes no
// bit of the result: which sums are taken apart (ranges) follows from the layer alone, tiles and blocks only decide who
// takes them.
#pragma once
#include "conv_gemm.cuh"
#include "conv_geometry.h"

namespace dcx {

// Every kernel that ships. 16-bit: large tiles for long signals, 64 x 64 where those would leave multiprocessors idle,
// 16 rows for a streamed frame, whose cost is reading the weights.
template <class T>
struct HalfKernels {
  using Large = ConvGemm<HalfTile<T, 128, 128, 2, 4>, 128, 128, 4, false, 1>;
  using LargeRanged = ConvGemm<HalfTile<T, 128, 128, 2, 4>, 128, 128, 4, true, 1>;
  using Narrow = ConvGemm<HalfTile<T, 128, 96, 4, 2>, 128, 96, 4, false, 1>;
  using Slim = ConvGemm<HalfTile<T, 128, 48, 4, 1>, 128, 48, 4, false, 3>;
  using Small = ConvGemm<HalfTile<T, 64, 64, 2, 2>, 64, 64, 4, true, 3>;
  using Frame = ConvGemm<HalfTile<T, 16, 64, 1, 4>, 16, 64, 8, true, 4>;
};
using FloatSmall = ConvGemm<FloatTile<64, 64>, 64, 64, 4, false, 3>;
using FloatFrame = ConvGemm<FloatTile<16, 64>, 16, 64, 6, false, 3>;
using Tf32Small = ConvGemm<Tf32Tile<64, 64, 2, 2>, 64, 64, 4, true, 3>;

inline int64_t conv_phases(const ConvGemmParams& p) { return p.phases.stride > 0 ? p.phases.stride : 1; }

// Parts that the reduction is cut into, so that one frame can occupy the device; a property of the layer.
inline int conv_ranges(const ConvGemmParams& p, bool is_float32) {
  const int64_t chunks = p.channels_padded / kDepth;
  const int64_t steps = chunks * (p.phases.stride > 0 ? 2 : p.taps);
  const int64_t wanted = is_float32 || steps < 32 ? 1 : steps < 64 ? 2 : steps < 128 ? 4 : 8;
  return static_cast<int>(minimum(wanted, chunks));
}

// Lays the kernel's tiles over the problem; false where its shared memory does not fit.
template <class K>
bool fit(const CudaContext& context, ConvGemmPlan& plan) {
  ConvGemmParams& p = plan.params;
  if (!K::kHasRanges && p.ranges > 1) return false;
  p.tile_rows = minimum(p.rows, int64_t{K::kTileRows});
  p.tile_items = minimum(p.batch, K::kTileRows / p.tile_rows);
  p.row_tiles = ceil_div(p.rows, p.tile_rows);
  p.column_tiles = ceil_div(p.columns, int64_t{K::kTileColumns});
  int64_t fewest_taps = p.phases.stride > 0 ? p.phases.taps(0) : p.taps, most_taps = fewest_taps;
  for (int64_t i = 1; i < p.phases.stride; ++i) {
    fewest_taps = minimum(fewest_taps, p.phases.taps(i));
    most_taps = maximum(most_taps, p.phases.taps(i));
  }
  // Several clips in a tile would each bring the reach of all taps along.
  p.per_tap = p.tile_items > 1;
  for (;;) {
    p.segment = (p.tile_rows - 1) * p.row_scale + 1 + (p.per_tap ? 0 : (most_taps - 1) * p.dilation);
    p.row_buffers = static_cast<int>(ceil_div(K::kDepthStages - 1, p.per_tap ? 1 : fewest_taps)) + 1;
    plan.smem_bytes = K::smem_bytes(p);
    if (plan.smem_bytes <= context.shared_bytes) break;
    if (p.per_tap) return false;
    p.per_tap = true;
  }
  plan.tiles = ceil_div(p.batch, p.tile_items) * p.row_tiles * p.column_tiles * conv_phases(p);
  p.spread = p.ranges > 1 && plan.tiles < context.multiprocessors;
  plan.grid = Grid{plan.tiles, 1, p.spread ? p.ranges : 1};
  plan.partial_floats = p.spread ? plan.tiles * p.ranges * K::kTileRows * K::kTileColumns : 0;
  plan.start = [](const CudaContext& where, const ConvGemmPlan& made) {
    launch<K>(where, made.params, made.grid, made.smem_bytes);
  };
  return true;
}

template <class T>
bool plan_half(const CudaContext& context, ConvGemmPlan& plan) {
  using Kernels = HalfKernels<T>;
  const ConvGemmParams& p = plan.params;
  const int64_t rows = p.batch * p.rows;
  const int64_t blocks = ceil_div(rows, int64_t{128}) * ceil_div(p.columns, int64_t{128}) * conv_phases(p);
  if (rows <= 16 && fit<typename Kernels::Frame>(context, plan)) return true;
  if (blocks >= context.multiprocessors) {
    const bool narrow = round_up(p.columns, 96) < round_up(p.columns, 128);
    if (p.columns <= 48 && fit<typename Kernels::Slim>(context, plan)) return true;
    if (narrow && fit<typename Kernels::Narrow>(context, plan)) return true;
    if (fit<typename Kernels::Large>(context, plan)) return true;
    if (fit<typename Kernels::LargeRanged>(context, plan)) return true;
  }
  return fit<typename Kernels::Small>(context, plan) || fit<typename Kernels::Frame>(context, plan);
}

ConvGemmPlan plan_conv_gemm(const CudaContext& context, DType dtype, const ConvGemmParams& params) {
  ConvGemmPlan plan;
  plan.params = params;
  ConvGemmParams& p = plan.params;
  const int64_t vector = 16 / element_size(dtype);
  const auto aligned = [vector](const Signal& s) {
    return s.stride_c == 1 && s.stride_t % vector == 0 && s.stride_b % vector == 0 &&
           reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
  };
  const bool tf32 = dtype == DType::kF32 && context.allow_tf32 && context.capability >= 80;
  p.vectors = aligned(p.x) && p.in_channels % vector == 0;
  p.vector_store = aligned(p.y) && p.columns % vector == 0;
  p.ranges = conv_ranges(p, dtype == DType::kF32 && !tf32);
  bool found = false;
  if (dtype == DType::kBF16 && context.capability < 80)
    throw std::runtime_error("bfloat16 needs a GPU of capability 8.0 or newer");
  if (dtype == DType::kBF16) found = plan_half<bf16>(context, plan);
  if (dtype == DType::kF16) found = plan_half<f16>(context, plan);
  if (tf32) found = fit<Tf32Small>(context, plan);
  if (dtype == DType::kF32 && !tf32)
    found = (p.batch * p.rows > 16 && fit<FloatSmall>(context, plan)) || fit<FloatFrame>(context, plan);
  if (!found) throw std::runtime_error("the convolution needs more shared memory than this GPU has");
  return plan;
}

}  // namespace dcx
