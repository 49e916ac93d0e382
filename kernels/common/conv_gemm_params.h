// The problem that conv_gemm.cuh solves, and the plan of how; plain C++, for the host side of every op that uses it.
#pragma once
#include "../snake_conv1d/params.h"
#include "../snake_upsample1d/params.h"
#include "cuda_context.h"

namespace dcx {

// A strided [B, T, C] tensor of the kernel's element type; strides in elements.
struct Signal {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_t = 0, stride_c = 0;
};

inline Signal signal_of(const TensorView& view) {
  return Signal{view.data, view.stride_b, view.stride_t, view.stride_c};
}

// Bytes from one signal's memory to another's that lies alike; 0 where there is none.
inline int64_t bytes_between(const void* from, const void* to) {
  return to != nullptr ? reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from) : 0;
}

// Whether rows of so many channels move 16 bytes, `vector` values, at a time.
inline bool moves_in_vectors(const Signal& s, int64_t channels, int64_t vector) {
  return s.stride_c == 1 && s.stride_t % vector == 0 && s.stride_b % vector == 0 && channels % vector == 0 &&
         reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
}

// Neighbouring phases of an upsampling that read the same steps: their outputs lie side by side in y, and stand side by
// side as columns of one GEMM. A convolution is one run of one phase.
struct ConvRun {
  int phase, phases;  // the first, and how many
  int first, taps;
  int weight_taps;  // taps of the phases in front
  int tile;         // the first column tile
};
constexpr int kMostRuns = 16;

struct ConvGemmParams {
  Signal x;                  // [B, in_steps, in_channels]
  Signal y;                  // [B, out_steps, columns], written
  Signal residual;           // [B, ., columns], data null: none; y[t] += residual[t + residual_shift]
  const void* weight;        // [every phase's taps][channels_padded][columns_padded] of the element type, zero-padded
  const float* bias;         // [columns], null: none
  const float* alpha;        // [in_channels], null: no Snake
  const float* out_alpha;    // [columns]: Snake on the output, before the residual; null: none
  const float* after_alpha;  // [columns], where out_alpha is null: Snake on what would be written; null: none
  int64_t snaked;            // bytes from y, plain then, to what takes after_alpha's Snake of it; 0: y takes it
  const int64_t* lengths;    // [B], null: in_steps each
  float* partial;            // one tile's sums per block, where ranges run in blocks of their own that are no cluster
  uint32_t* counters;        // [tiles], zeros, and left so
  int64_t batch, in_steps, in_channels, columns, columns_padded;
  int64_t out_steps;        // of the op
  int64_t rows;             // q's range in one clip
  int64_t channels;         // of a GEMM row: in_channels, or `fold` time steps of them side by side
  int64_t channels_padded;  // to whole steps
  int64_t row_step;         // time = (q * row_scale + j * dilation + first(p)) * row_step - pad_left + c / in_channels
  int64_t row_scale;
  int64_t taps, dilation, pad_left;  // of the GEMM; an upsampling takes its phases' taps
  int64_t op_in_steps;               // 0: in_steps; else what lengths and the residual count in, and all of x counts
  int64_t conv_taps, conv_stride, conv_dilation, conv_left, conv_right;  // of the op, for the length of its output
  UpsamplePhases phases;                                                 // stride 0: no upsampling
  int64_t residual_shift;
  int64_t residual_valid;  // 1: residual steps past the input's length count as zero; 0: they follow y
  Activation activation;
  // The tiling, by plan().
  int64_t tile_items, tile_rows;  // a tile covers tile_rows rows of each of tile_items clips
  int64_t row_tiles;              // per group of clips
  int64_t column_tiles;           // per phase
  int64_t segment;                // rows in shared memory per clip
  int ranges;                     // parts of the reduction that are summed apart and then added in order
  int row_buffers;
  int stages;              // of weights
  int64_t walking_blocks;  // of the grid, where blocks take tile after tile
  bool spread;             // a block per range; of conv_wgmma.cuh a cluster of them
  int64_t step_columns;    // columns of one output step (conv_wgmma.cuh: columns counts those of a run)
  ConvRun runs[kMostRuns];
  int run_count;
  bool weights_stand;  // nothing that may still run in front of the kernel in its stream writes them or the vectors
  bool per_tap;        // rows are loaded again for every tap
  bool tap_major;      // conv_few.cuh: the reduction goes tap by tap, then channel by channel, in one range
  bool vectors, vector_store, vector_residual;  // rows of x, y, residual move 16 bytes at a time
};

// Rows made for the GEMM by conv_rows.cuh: [B, rows, width].
struct ConvRowsParams {
  Signal x;  // [B, in_steps, in_channels]
  void* to;
  const float* alpha;      // [in_channels], null: no Snake
  const int64_t* lengths;  // [B], null: in_steps each
  int64_t in_steps, in_channels, channels, rows, width, row_step, pad_left;
  int64_t row_blocks;  // per clip
  bool vectors;        // rows of x move 16 bytes at a time
};

struct ConvGemmPlan {
  ConvGemmParams params;
  ConvRowsParams prepared;  // how x becomes the GEMM's rows, where prepared_bytes > 0
  Grid prepared_grid;
  int64_t prepared_bytes = 0;  // what prepared.to and params.x.data must hold, on 16 bytes
  Grid grid;
  int64_t smem_bytes = 0;
  int64_t partial_floats = 0;  // what params.partial must hold
  int64_t tiles = 0;           // zeros that params.counters must hold; both only where partial_floats > 0
  void (*start)(const CudaContext&, const ConvGemmPlan&) = nullptr;
};

// Fills in the tiling of params, whose shape and data stand already. Throws std::runtime_error where the device can't
// run it.
ConvGemmPlan plan_conv_gemm(const CudaContext& context, DType dtype, const ConvGemmParams& params);

// An op's own plan, defined in <op>.cu; weights as its CUDA packer makes them, bias and alpha [C] float32 or null.
ConvGemmPlan plan_snake_conv1d_cuda(const CudaContext& context, const SnakeConv1dParams& params);
ConvGemmPlan plan_snake_upsample1d_cuda(const CudaContext& context, const SnakeUpsample1dParams& params);

}  // namespace dcx
