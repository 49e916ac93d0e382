// The choice of conv_gemm.cuh's tile; defines plan_conv_gemm, so that one unit alone includes it. The choice changes no
// bit of the result: which sums are taken apart (ranges) follows from the layer alone, tiles and blocks only decide who
// takes them.
#pragma once
#include <type_traits>

#include "conv_few.cuh"
#include "conv_gemm.cuh"
#include "conv_geometry.h"
#include "conv_resident.cuh"
#include "conv_wgmma.cuh"

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
// On Hopper these take all 16-bit layers, whatever their size, since their channels go 64 at a time.
template <class T>
struct WgmmaKernels {
  using Large = ConvWgmma<T, 2, 128, 6, true, 1>;
  using Wide = ConvWgmma<T, 2, 192, 6, true, 1>;   // for deep layers: fewer reads of rows for each product
  using Flat = ConvWgmma<T, 2, 128, 3, false, 2>;  // without ranges: two blocks share a multiprocessor
  using Narrow = ConvWgmma<T, 2, 96, 6, false, 2>;
  using Slim = ConvWgmma<T, 2, 48, 5, false, 2>;
  using Half = ConvWgmma<T, 2, 64, 5, false, 2>;
  using Small = ConvWgmma<T, 1, 64, 8, true, 3>;
  using Helped = ConvWgmma<T, 1, 64, 8, true, 2, 1>;   // where blocks are few, with more threads to copy and finish
  using Frame = ConvWgmma<T, 1, 32, 12, false, 1, 1>;  // nearly all weights come before the kernel in front ends
};
// In front of those where an upsampling has many rows; by its channels.
template <class T>
struct ResidentKernels {
  using Few = ConvResident<T, 96, 96, 2, 3>;
  using Some = ConvResident<T, 192, 192, 1, 2>;
  using Many = ConvResident<T, 384, 96, 1, 2>;
};
// In front of those where a call has few rows; by the tiles of 8 rows that a warp multiplies.
template <class T>
struct FewKernels {
  using One = ConvFew<T, 1>;
  using Two = ConvFew<T, 2>;
  using Four = ConvFew<T, 4>;
};
using FloatSmall = ConvGemm<FloatTile<64, 64>, 64, 64, 4, false, 3>;
using FloatFrame = ConvGemm<FloatTile<16, 64>, 16, 64, 6, false, 3>;
using Tf32Small = ConvGemm<Tf32Tile<64, 64, 2, 2>, 64, 64, 4, true, 3>;

inline int64_t conv_phases(const ConvGemmParams& p) { return p.phases.stride > 0 ? p.phases.stride : 1; }

// Parts that the reduction is cut into, so that one frame can occupy the device; a property of the layer. depth:
// channels of a step.
inline int conv_ranges(const ConvGemmParams& p, bool is_float32, int64_t depth) {
  const int64_t products = p.channels_padded * (p.phases.stride > 0 ? 2 : p.taps);
  const int64_t wanted = is_float32 || products < 1024 ? 1 : products < 2048 ? 2 : products < 4096 ? 4 : 8;
  return static_cast<int>(minimum(wanted, ceil_div(p.channels_padded, depth)));
}

struct TapRange {
  int64_t fewest, most;
};
inline TapRange tap_range(const ConvGemmParams& p) {
  TapRange taps{p.phases.stride > 0 ? p.phases.taps(0) : p.taps, 0};
  taps.most = taps.fewest;
  for (int64_t i = 1; i < p.phases.stride; ++i) {
    taps.fewest = minimum(taps.fewest, p.phases.taps(i));
    taps.most = maximum(taps.most, p.phases.taps(i));
  }
  return taps;
}

// Lays a kernel's tiles over the rows and columns.
template <class K>
void lay_tiles(ConvGemmPlan& plan) {
  ConvGemmParams& p = plan.params;
  p.tile_rows = minimum(p.rows, int64_t{K::kTileRows});
  p.tile_items = minimum(p.batch, K::kTileRows / p.tile_rows);
  p.row_tiles = ceil_div(p.rows, p.tile_rows);
  p.column_tiles = ceil_div(p.columns, int64_t{K::kTileColumns});
}

template <class K>
void spread_ranges(const CudaContext& context, ConvGemmPlan& plan, int64_t phases) {
  ConvGemmParams& p = plan.params;
  plan.tiles = ceil_div(p.batch, p.tile_items) * p.row_tiles * p.column_tiles * phases;
  p.spread = p.ranges > 1 && plan.tiles < context.multiprocessors;
  plan.grid = Grid{plan.tiles, 1, p.spread ? p.ranges : 1};
  plan.partial_floats = p.spread ? plan.tiles * p.ranges * K::kTileRows * K::kTileColumns : 0;
}

// Lays the kernel's tiles over the problem; false where its shared memory does not fit.
template <class K>
bool fit(const CudaContext& context, ConvGemmPlan& plan) {
  ConvGemmParams& p = plan.params;
  if (!K::kHasRanges && p.ranges > 1) return false;
  lay_tiles<K>(plan);
  const TapRange taps = tap_range(p);
  // Several clips in a tile would each bring the reach of all taps along.
  p.per_tap = p.tile_items > 1;
  for (;;) {
    p.segment = (p.tile_rows - 1) * p.row_scale + 1 + (p.per_tap ? 0 : (taps.most - 1) * p.dilation);
    p.row_buffers = static_cast<int>(ceil_div(K::kDepthStages - 1, p.per_tap ? 1 : taps.fewest)) + 1;
    plan.smem_bytes = K::smem_bytes(p);
    if (plan.smem_bytes <= context.shared_bytes) break;
    if (p.per_tap) return false;
    p.per_tap = true;
  }
  spread_ranges<K>(context, plan, conv_phases(p));
  plan.start = [](const CudaContext& where, const ConvGemmPlan& made) {
    launch<K>(where, made.params, made.grid, made.smem_bytes);
  };
  return true;
}

// Phases that stand side by side: neighbours that read the same steps, where a step's columns are whole 16 bytes. False
// where there are too many runs.
inline bool lay_runs(ConvGemmParams& p, int64_t vector) {
  const int64_t phases = conv_phases(p);
  int64_t taps_before = 0;
  p.run_count = 0;
  for (int64_t i = 0; i < phases; ++i) {
    const int first = p.phases.stride > 0 ? static_cast<int>(p.phases.first(i)) : 0;
    const int taps = static_cast<int>(p.phases.stride > 0 ? p.phases.taps(i) : p.taps);
    ConvRun* last = p.run_count > 0 ? &p.runs[p.run_count - 1] : nullptr;
    if (last != nullptr && last->first == first && last->taps == taps && p.step_columns % vector == 0) {
      ++last->phases;
    } else {
      if (p.run_count == kMostRuns) return false;
      p.runs[p.run_count++] = ConvRun{static_cast<int>(i), 1, first, taps, static_cast<int>(taps_before), 0};
    }
    taps_before += taps;
  }
  return true;
}

inline int64_t run_tiles(ConvGemmParams& p, int64_t tile_columns) {
  int64_t tiles = 0;
  for (int i = 0; i < p.run_count; ++i) {
    p.runs[i].tile = static_cast<int>(tiles);
    tiles += ceil_div(p.runs[i].phases * p.step_columns, tile_columns);
  }
  return tiles;
}

// The plan is to start the kernel, behind the one that makes its rows where prepare_rows asks for that.
template <class K>
void start_behind_rows(ConvGemmPlan& plan) {
  plan.start = [](const CudaContext& where, const ConvGemmPlan& made) {
    if (made.prepared_bytes > 0) launch<ConvRows<typename K::Element>>(where, made.prepared, made.prepared_grid, 0);
    launch<K>(where, made.params, made.grid, made.smem_bytes, made.params.spread);
  };
}

// As fit, for conv_wgmma.cuh, whose runs stand. Where taps reach far, rows are brought tap by tap.
template <class K>
bool fit_wgmma(const CudaContext& context, ConvGemmPlan& plan) {
  ConvGemmParams& p = plan.params;
  if (!K::kHasRanges && p.ranges > 1) return false;
  lay_tiles<K>(plan);
  p.column_tiles = run_tiles(p, K::kTileColumns);
  const auto [fewest, most] = tap_range(p);
  const int64_t reach = (most - 1) * p.dilation, chunks = ceil_div(p.channels_padded, int64_t{K::kChunk});
  p.per_tap = p.tile_items > 1 || p.row_scale > 1 || reach > K::kTileRows;
  p.segment = K::kTileRows + (p.per_tap ? 0 : reach);
  p.stages = static_cast<int>(minimum(int64_t{K::kAhead + 2}, chunks * most));
  p.row_buffers = static_cast<int>(
      minimum(ceil_div(int64_t{K::kAhead + 1}, p.per_tap ? 1 : fewest) + 1, p.per_tap ? chunks * most : chunks));
  spread_ranges<K>(context, plan, 1);
  if (p.spread && p.ranges > K::kMostRanges) return false;
  plan.partial_floats = 0;  // a cluster's blocks keep their sums
  plan.smem_bytes = K::smem_bytes(p);
  if (plan.smem_bytes > context.shared_bytes) return false;
  start_behind_rows<K>(plan);
  return true;
}

// Lays conv_resident.cuh's blocks over an upsampling whose runs stand; false where it does not suit, or where tiles are
// too few to read weights for.
template <class K>
bool fit_resident(const CudaContext& context, ConvGemmPlan& plan) {
  constexpr int64_t kRounds = 3;  // of all blocks, at least: by arithmetic, fewer do not pay for reading the weights
  ConvGemmParams& p = plan.params;
  const auto [fewest, most] = tap_range(p);
  const bool plain = p.phases.stride > 0 && p.ranges == 1 && fewest == K::kTaps && most == K::kTaps &&
                     p.alpha == nullptr && p.out_alpha == nullptr && p.after_alpha == nullptr &&
                     p.residual.data == nullptr && p.activation == Activation::kNone && p.vector_store;
  // With three quarters of its channels or fewer, or of its columns two thirds, it would multiply too many zeros.
  if (!plain || p.channels_padded > K::kMostChannels || p.channels_padded * 4 <= K::kMostChannels * 3) return false;
  const int64_t units = run_tiles(p, K::kUnit), blocks = context.multiprocessors;
  const int64_t tiles = p.batch * ceil_div(p.rows, int64_t{K::kTileRows});
  p.column_tiles = units;
  if (units * K::kUnit * 2 > p.phases.stride * p.step_columns * 3 || !K::shares_out(p, blocks) ||
      tiles * units < kRounds * blocks * K::kTogether * K::kTileGroups)
    return false;
  p.tile_items = 1;
  p.tile_rows = K::kTileRows;
  p.row_tiles = ceil_div(p.rows, p.tile_rows);
  p.walking_blocks = blocks;
  p.spread = false;
  plan.smem_bytes = K::smem_bytes(p);
  if (plan.smem_bytes > context.shared_bytes) return false;
  plan.grid = Grid{blocks, 1, 1};
  start_behind_rows<K>(plan);
  return true;
}

// Has conv_rows.cuh make the rows where x can't be copied as it lies: Snake, channels not side by side in whole 16
// bytes, or a GEMM row of several steps of them.
template <class T>
void prepare_rows(ConvGemmPlan& plan) {
  constexpr int64_t kVector = Vector16<T>::kCount;
  ConvGemmParams& p = plan.params;
  if (p.alpha == nullptr && p.vectors) return;
  ConvRowsParams& r = plan.prepared;
  r.x = p.x;
  r.alpha = p.alpha;
  r.lengths = p.op_in_steps > 0 ? nullptr : p.lengths;
  r.in_steps = p.in_steps;
  r.in_channels = p.in_channels;
  r.vectors = p.vectors;
  const bool gathers = p.channels != p.in_channels && p.in_channels % kVector != 0;
  r.channels = gathers ? p.channels : p.in_channels;
  r.width = round_up(r.channels, kVector);
  r.row_step = gathers ? p.row_step : 1;
  r.pad_left = gathers ? p.pad_left : 0;
  r.rows = gathers ? (p.rows - 1) * p.row_scale + (p.taps - 1) * p.dilation + 1 : p.in_steps;
  const int64_t rows_at_once = maximum(int64_t{1}, ConvRows<T>::kThreads / (r.width / kVector));
  r.row_blocks = ceil_div(r.rows, rows_at_once * ConvRows<T>::kPasses);
  plan.prepared_grid = Grid{p.batch * r.row_blocks, 1, 1};
  plan.prepared_bytes = p.batch * r.rows * r.width * static_cast<int64_t>(sizeof(T));
  if (gathers) {
    p.row_step = 1;
    p.pad_left = 0;
    p.op_in_steps = p.in_steps;
    p.in_steps = r.rows;
  }
  if (gathers || p.channels == p.in_channels) p.in_channels = p.channels = r.width;
  p.x = Signal{nullptr, r.rows * r.width, r.width, 1};
  p.alpha = nullptr;
}

// Lays ConvFew's tiles of up to most_rows rows: rows in shared memory in whichever way they are fewer, and beside them
// all weights, or as many turns of them as there is room for, two at least.
template <class K>
bool fit_few(const CudaContext& context, int64_t most_rows, ConvGemmPlan& plan) {
  ConvGemmParams& p = plan.params;
  p.tile_rows = minimum(p.rows, most_rows);
  p.tile_items = minimum(p.batch, most_rows / p.tile_rows);
  p.row_tiles = ceil_div(p.rows, p.tile_rows);
  p.column_tiles = run_tiles(p, K::kTileColumns);
  const int taps = static_cast<int>(tap_range(p).most);
  p.segment = (p.tile_rows - 1) * p.row_scale + (taps - 1) * p.dilation + 1;
  p.per_tap = p.segment > p.tile_rows * taps;
  p.stages = 0;
  plan.smem_bytes = K::smem_bytes(p, taps);
  if (plan.smem_bytes > context.shared_bytes) {
    const int64_t turn = int64_t{p.ranges} * K::kTurn * K::kSliceBytes;
    const int64_t others = plan.smem_bytes - int64_t{K::slices(p, taps)} * K::kSliceBytes;
    p.stages = static_cast<int>(maximum(int64_t{0}, (context.shared_bytes - others) / turn));
    if (p.stages < 2) return false;
    plan.smem_bytes = K::smem_bytes(p, taps);
  }
  p.spread = false;
  plan.grid = Grid{ceil_div(p.batch, p.tile_items) * p.row_tiles * p.column_tiles, 1, 1};
  plan.start = [](const CudaContext& where, const ConvGemmPlan& made) {
    launch<K>(where, made.params, made.grid, made.smem_bytes);
  };
  return true;
}

// For so few rows that reading the weights is what takes time, or whose tiles are all there at once; the bits of
// conv_wgmma.cuh.
template <class T>
bool plan_few(const CudaContext& context, ConvGemmPlan& plan) {
  // More rows where their tiles are all there at once, and each reads few weights again.
  constexpr int64_t kFewRows = 64, kTileRows = 32, kBlocks = 2;
  constexpr int64_t kShallow = 3 * 192;  // a repeating upsampling's taps of a streamed frame's 96 rows
  using Kernels = FewKernels<T>;
  ConvGemmParams& p = plan.params;
  if (!p.vectors) return false;
  p.ranges = p.tap_major ? 1 : conv_ranges(p, false, kPanelColumns);
  if (!lay_runs(p, Vector16<T>::kCount)) return false;
  // Where there are more, blocks share them out.
  const bool few = !p.tap_major && p.batch * p.rows <= kFewRows;
  const int64_t wanted = few ? p.batch * p.rows : kTileRows;
  const auto fit_rows = [&](auto* kernel) {
    using K = std::remove_pointer_t<decltype(kernel)>;
    return fit_few<K>(context, minimum(int64_t{K::most_rows(p)}, few ? int64_t{K::kMostRows} : kTileRows), plan);
  };
  const bool fits = wanted <= Kernels::One::most_rows(p)   ? fit_rows(static_cast<typename Kernels::One*>(nullptr))
                    : wanted <= Kernels::Two::most_rows(p) ? fit_rows(static_cast<typename Kernels::Two*>(nullptr))
                                                           : fit_rows(static_cast<typename Kernels::Four*>(nullptr));
  return fits &&
         (few || p.tap_major ||
          (tap_range(p).most * p.channels_padded <= kShallow && plan.grid.x <= kBlocks * context.multiprocessors));
}

// The tile that computes least, or the small one where a large one would leave multiprocessors idle: ranges fill them
// better with small tiles, whose sums are quicker added up.
template <class T>
bool plan_wgmma(const CudaContext& context, ConvGemmPlan& plan) {
  using Kernels = WgmmaKernels<T>;
  ConvGemmPlan few = plan;
  if (plan_few<T>(context, few)) {
    plan = few;
    return true;
  }
  prepare_rows<T>(plan);
  ConvGemmParams& p = plan.params;
  p.ranges = conv_ranges(p, false, kPanelColumns);
  if (!lay_runs(p, Vector16<T>::kCount)) return false;
  using Resident = ResidentKernels<T>;
  if (fit_resident<typename Resident::Few>(context, plan) || fit_resident<typename Resident::Some>(context, plan) ||
      fit_resident<typename Resident::Many>(context, plan))
    return true;
  const int64_t rows = ceil_div(p.batch * p.rows, int64_t{128});
  const auto fills = [&](int64_t columns) {
    return rows * run_tiles(p, columns) * 5 >= context.multiprocessors * int64_t{3};
  };
  // What a tile multiplies, and, as so many columns more, what it costs to bring its rows.
  const auto computed = [&](int64_t columns) { return run_tiles(p, columns) * (columns + 32); };
  const int64_t least = minimum(minimum(computed(48), computed(64)), minimum(computed(96), computed(128)));
  if (computed(128) == least && fills(128) && fit_wgmma<typename Kernels::Flat>(context, plan)) return true;
  if (p.ranges > 1 && computed(192) <= least && fills(192) && fit_wgmma<typename Kernels::Wide>(context, plan))
    return true;
  if (computed(128) == least && fills(128) && fit_wgmma<typename Kernels::Large>(context, plan)) return true;
  if (computed(96) == least && fills(96) && fit_wgmma<typename Kernels::Narrow>(context, plan)) return true;
  if (computed(64) == least && fills(64) && fit_wgmma<typename Kernels::Half>(context, plan)) return true;
  if (computed(48) == least && fills(48) && fit_wgmma<typename Kernels::Slim>(context, plan)) return true;
  if (fills(128) && fit_wgmma<typename Kernels::Large>(context, plan)) return true;
  // Narrow tiles where all of them are on the device at once.
  const bool at_once = ceil_div(p.batch * p.rows, int64_t{64}) * run_tiles(p, 32) <= context.multiprocessors;
  if (at_once && fit_wgmma<typename Kernels::Frame>(context, plan)) return true;
  // By arithmetic, not timed: a second warpgroup where two blocks with it are all that a multiprocessor has.
  const int64_t tiles = ceil_div(p.batch * p.rows, int64_t{64}) * run_tiles(p, 64);
  const int64_t blocks = tiles * (tiles < context.multiprocessors ? p.ranges : 1);
  if (blocks <= 2 * int64_t{context.multiprocessors} && fit_wgmma<typename Kernels::Helped>(context, plan)) return true;
  return fit_wgmma<typename Kernels::Small>(context, plan);
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
  p.step_columns = p.columns;
  const int64_t vector = 16 / element_size(dtype);
  const bool tf32 = dtype == DType::kF32 && context.allow_tf32 && context.capability >= 80;
  p.vectors = moves_in_vectors(p.x, p.in_channels, vector);
  p.vector_store = moves_in_vectors(p.y, p.columns, vector) && p.snaked % 16 == 0;
  p.vector_residual = moves_in_vectors(p.residual, p.columns, vector);
  if (context.wgmma && dtype != DType::kF32) {
    ConvGemmPlan hopper = plan;
    if (dtype == DType::kBF16 ? plan_wgmma<bf16>(context, hopper) : plan_wgmma<f16>(context, hopper)) return hopper;
  }
  p.ranges = conv_ranges(p, dtype == DType::kF32 && !tf32, kDepth);
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
