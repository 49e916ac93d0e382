#pragma once
#include "../common/dtype.h"
#include "phases.h"

namespace dcx {

// y[b, :, q * S + p] = bias + sum_j W_{p, j} snake(x[b, :, q + first[p] + j])
struct SnakeUpsample1dParams {
  TensorView x;    // [B, Cin, T]
  TensorView y;    // [B, Cout, T']
  void* y_snaked;  // laid out as y: takes snake(y, out_alpha); null: none; a GPU's alone, as out_alpha
  // On the CPU: 0, direct; kUpsampleProducts of winograd.h when transposed: weight is then, phase by phase, what its
  // packer makes, and first a multiple of the stride; or kUpsampleDifferences of differences.h in repeat mode: panels
  // of [2 S][Cin].
  int64_t winograd;
  const void* weight;      // phase by phase, gemm_pack.h panels of [taps(p)][Cin] x Cout, compute type
  const void* bias;        // [round_up(Cout, 16)], compute type, zero-padded
  const void* alpha;       // [Cin], compute type
  const void* out_alpha;   // [Cout], compute type; null where y_snaked is
  const int64_t* lengths;  // [B], null: T each
  int64_t batch, in_channels, out_channels, in_steps, out_steps;
  int64_t first;  // output step that y begins with: y may be a stretch of the output (on the CPU)
  UpsamplePhases phases;
};

void launch_snake_upsample1d_cpu(const SnakeUpsample1dParams& params);

}  // namespace dcx
