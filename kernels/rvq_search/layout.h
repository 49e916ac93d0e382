// Where each part of a packed quantiser lies, in elements; pack_rvq, rvq_search and rvq_lookup share it.
#pragma once
#include "../common/dtype.h"

namespace dcx {

constexpr int64_t kCodeGroup = 16;  // codebook entries side by side: one AVX-512 register of floats
// The rows in bytes, 128 + round(127 c), for the CPU's first pass (coarse.h): a pass takes 16 groups, one to a lane.
constexpr int64_t kCoarseDim = 8;  // at most; zeros behind D
constexpr int64_t kCoarseGroups = 16;
constexpr int64_t kCoarseRows = kCoarseGroups * kCodeGroup;
constexpr int kCoarseScale = 127;

struct RvqLayout {
  int64_t stages, entries, dim, channels;  // Q, N, D, C

  DCX_HOST_DEVICE int64_t code_columns() const { return round_up(stages * dim, kColumnUnit); }
  DCX_HOST_DEVICE int64_t channel_columns() const { return round_up(channels, kColumnUnit); }
  DCX_HOST_DEVICE int64_t groups() const { return ceil_div(entries, kCodeGroup); }
  DCX_HOST_DEVICE int64_t book_size() const { return groups() * (dim + 1) * kCodeGroup; }

  // gemm_pack.h panels of [C] x Q D: every stage's input projection at once.
  DCX_HOST_DEVICE int64_t in_panels() const { return 0; }
  // [code_columns]: in_bias_i - W_i sum_{j < i} out_bias_j.
  DCX_HOST_DEVICE int64_t in_bias() const { return in_panels() + channels * code_columns(); }
  // [Q][Q][D][D]: W_i V_j for j < i, what one chosen row takes off a later stage's e.
  DCX_HOST_DEVICE int64_t cross() const { return in_bias() + code_columns(); }
  // [Q][groups][D + 1][16]: the normalised rows' squares (infinity in the padding), then their D coordinates.
  DCX_HOST_DEVICE int64_t books() const { return cross() + stages * stages * dim * dim; }
  // [Q][N][D]: the rows as they are.
  DCX_HOST_DEVICE int64_t rows() const { return books() + stages * book_size(); }
  // gemm_pack.h panels of [Q D] x C: every stage's output projection at once.
  DCX_HOST_DEVICE int64_t out_panels() const { return rows() + stages * entries * dim; }
  // [Q][channel_columns]: out_bias summed over the stages up to and with this one.
  DCX_HOST_DEVICE int64_t out_bias() const { return out_panels() + stages * dim * channel_columns(); }
  // What the float64 redo on the CPU needs beside the exact weights above: in_bias and out_bias as they are,
  // [code_columns] and [Q][channel_columns], and per stage the norms of the error bound, [Q][Q + 2]: of W_i, of the
  // folded bias, and of W_i V_j for j < i.
  DCX_HOST_DEVICE int64_t plain_in_bias() const { return out_bias() + stages * channel_columns(); }
  DCX_HOST_DEVICE int64_t plain_out_bias() const { return plain_in_bias() + code_columns(); }
  DCX_HOST_DEVICE int64_t norms() const { return plain_out_bias() + stages * channel_columns(); }
  DCX_HOST_DEVICE int64_t norms_of(int64_t stage) const { return norms() + stage * (stages + 2); }
  // [Q]: how far a row in bytes is from its normalised row at most; infinity where the first pass may not be used.
  DCX_HOST_DEVICE int64_t coarse_errors() const { return norms_of(stages); }
  // [Q][passes][16 places][2][16 lanes][4] bytes: coordinates 4 h + k of row 16 (16 pass + lane) + place.
  DCX_HOST_DEVICE int64_t coarse_passes() const { return dim <= kCoarseDim ? ceil_div(entries, kCoarseRows) : 0; }
  DCX_HOST_DEVICE int64_t coarse_size() const { return coarse_passes() * kCoarseRows * kCoarseDim / 4; }
  DCX_HOST_DEVICE int64_t coarse_books() const { return round_up(coarse_errors() + stages, kCodeGroup); }
  DCX_HOST_DEVICE int64_t total() const { return coarse_books() + stages * coarse_size(); }
};

}  // namespace dcx
